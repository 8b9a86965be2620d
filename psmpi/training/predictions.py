"""What is found of predicted samples, minibatch by minibatch: written and shown on rank 0."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import sqrt
from pathlib import Path
from typing import IO, Any

import numpy as np

from psmpi.errors import UserError
from psmpi.nn.metric import TOP, largest
from psmpi.output import tell
from psmpi.training.findings import FIRST, confused, show_choices, show_values

# Classes whose confusion is a matrix in JSON; of more it is a list of pairs.
MATRIX = 40


def room(out: str) -> AbstractContextManager[IO[bytes] | None]:
    """A file without a name for the values of all samples, beside the one that --out names; None where none does."""
    try:
        return tempfile.TemporaryFile(dir=Path(out).parent) if out else nullcontext()
    except OSError as error:
        raise _unwritable(Path(out), error) from None


class Found:
    """What is found of n samples, on rank 0.

    options: of psmpi.predict; targets: of the samples, None where they are not known; outputs: numbers of the classes
    or values that are predicted, of `known` in all; file: where their values (n, outputs) of `dtype` go, if anywhere.
    steps: where each step of sequences is predicted, their number; steps then stand for samples, those of a sequence
    one after the other, and some may have a target that does not count, a label below 0 or values that are NaN.
    characters: of a text, those that are the classes; else "". names: of the classes, () where these are numbers.
    """

    def __init__(
        self,
        options: Any,
        targets: Any,
        outputs: Sequence[int],
        known: int,
        n: int,
        dtype: Any,
        file: IO[bytes] | None,
        steps: int = 0,
        characters: str = "",
        names: tuple[str, ...] = (),
    ):
        if steps:
            n *= steps
            targets = None if targets is None else targets.reshape(n, *targets.shape[2:])
        self.steps, self.characters, self.names = steps, characters, names
        self.options, self.targets, self.n, self.dtype, self.file = options, targets, n, dtype, file
        self.outputs, self.known, self.path = np.array(outputs), known, Path(options.out)

    def keep(self, at: slice, values: Any) -> None:
        """Put the values (b, outputs) of some samples into the file."""
        if self.file is None:
            return
        try:
            self.file.seek(at.start * values.shape[1] * values.itemsize)
            self.file.write(values)
            self.file.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def kept(self) -> Any:
        """The values (n, outputs) of all samples, of which only what is looked at is in memory."""
        assert self.file is not None
        if not self.n:
            return np.empty((0, len(self.outputs)), self.dtype)
        return np.memmap(self.file, self.dtype, "r", shape=(self.n, len(self.outputs))).view(np.ndarray)

    def numbers(self, k: int) -> list[int]:
        """The number of a sample, or of a sequence and of its step."""
        return list(divmod(k, self.steps)) if self.steps else [k]

    @property
    def titles(self) -> list[str]:
        """The titles of `numbers`."""
        return ["sample", "step"] if self.steps else ["sample"]

    def shaped(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Arrays of samples (n, ...), of each step of sequences (sequences, steps, ...); others as they are."""
        if not self.steps:
            return arrays
        return {
            name: one.reshape(-1, self.steps, *one.shape[1:]) if np.ndim(one) and len(one) == self.n else one
            for name, one in arrays.items()
        }

    def summary(self) -> dict[str, Any]:
        """What the options name."""
        o = self.options
        found = {"checkpoint": o.checkpoint, "dataset": o.dataset, "split": o.split}
        return found | {"samples": self.n // max(1, self.steps)} | ({"steps": self.steps} if self.steps else {})


class Values(Found):
    """Predicted values."""

    def __init__(self, *known: Any):
        super().__init__(*known)
        # Of each output, sums over the samples seen: squared errors, targets, squared targets.
        self.sums, self.seen = np.zeros((3, len(self.outputs))), 0
        self.first = np.zeros((min(self.n, FIRST), len(self.outputs)), self.dtype)

    def take(self, at: slice, values: Any) -> None:
        """Take the values (b, outputs) of some samples."""
        self.keep(at, values)
        if at.start < FIRST:
            self.first[at.start : at.stop] = values[: FIRST - at.start]
        if self.targets is not None:
            wanted = self.targets[at][:, self.outputs].astype(np.float64)
            counts = ~np.isnan(wanted).any(axis=1) if self.steps else slice(None)
            off, wanted = values[counts] - wanted[counts], wanted[counts]
            self.sums += (off**2).sum(axis=0), wanted.sum(axis=0), (wanted**2).sum(axis=0)
            self.seen += len(off)

    def report(self) -> None:
        """Write and print the values beside the targets, if these are known."""
        found = self.summary() | {"outputs": self.outputs.tolist()}
        if self.targets is not None:
            found["rmse"] = sqrt(self.sums[0].sum() / max(1, self.seen * len(self.outputs)))
        if self.options.out:
            self._write()
        if self.options.json:
            tell(json.dumps(found))
            return
        rows = [[*self.numbers(k), *row] for k, row in enumerate(self.first)]
        show_values(found, self.sums / max(1, self.seen), self.titles, rows)

    def _write(self) -> None:
        values = self.kept()
        columns = {f"value_{k}": values[:, at] for at, k in enumerate(self.outputs)}
        arrays = {"values": values, "outputs": self.outputs}
        if self.targets is not None:
            wanted = self.targets[:, self.outputs]
            columns = {f"target_{k}": wanted[:, at] for at, k in enumerate(self.outputs)} | columns
            arrays["targets"] = wanted
        rows = (
            [*self.numbers(k), *(repr(float(v)) for v in row)]
            for k, row in enumerate(zip(*columns.values(), strict=True))
        )
        _save(self.path, self.shaped(arrays), [*self.titles, *columns], rows)


class Choices(Found):
    """Predicted classes: of each sample those of its largest scores."""

    def __init__(self, *known: Any):
        super().__init__(*known)
        self.labels = np.full(self.n, -1) if self.targets is None else self.targets
        self.choices = np.zeros((self.n, min(TOP, len(self.outputs))), np.int64)
        self.first = np.zeros((min(self.n, FIRST), self.choices.shape[1]), self.dtype)

    def take(self, at: slice, scores: Any, classes: Any = None) -> None:
        """Take the scores (b, outputs) of some samples, or the largest with their classes (b, TOP)."""
        if classes is None:
            self.keep(at, scores)
            best, places = largest(scores.T, TOP)
            scores, classes = best.T, self.outputs[places.T]
        self.choices[at] = classes
        if at.start < FIRST:
            self.first[at.start : at.stop] = scores[: FIRST - at.start]

    def report(self) -> None:
        """Write and print the predictions, and how good they are."""
        labels, choices, known = self.labels, self.choices, self.known
        if self.options.out:
            self._write()
        found = self.summary() | {"classes": self.outputs.tolist()}
        if self.names:
            found["names"] = [self.called(c) for c in found["classes"]]
        if self.steps and labels.max(initial=-1) >= 0:
            labels, choices = labels[labels >= 0], choices[labels >= 0]
        predicted = choices[:, 0]
        # A part of the classes scores, and cannot choose among all.
        if len(labels) and labels.min() >= 0 and len(self.outputs) == known:
            found["accuracy"] = float(np.count_nonzero(predicted == labels) / len(labels))
            if known > TOP:
                found["top5"] = float(np.count_nonzero(choices == labels[:, None]) / len(labels))
            if known <= MATRIX:
                confusion = np.zeros((known, known), int)
                np.add.at(confusion, (labels, predicted), 1)
                found["confusion"] = confusion.tolist()
            else:
                found["confused"] = confused(labels, predicted)
        if self.options.json:
            tell(json.dumps(found))
        else:
            rows = [
                (self.numbers(k), chosen, scores)
                for k, (chosen, scores) in enumerate(zip(self.choices[:FIRST].tolist(), self.first, strict=True))
            ]
            names = [repr(one) for one in self.characters] or self.names
            show_choices(found, labels, predicted, names, self.titles, rows)

    def called(self, label: int) -> Any:
        """A class as files have it: by its name, or number."""
        return self.names[label] if self.names else label

    def _write(self) -> None:
        predicted, scores = self.choices[:, 0], self.kept()
        arrays = {"predicted": predicted, "labels": self.labels, "scores": scores, "classes": self.outputs}
        if self.names:
            arrays["names"] = np.array([self.called(c) for c in self.outputs])
        rows = (
            [*self.numbers(k), self.called(label) if label >= 0 else "", self.called(choice), *map(repr, row.tolist())]
            for k, (label, choice, row) in enumerate(zip(self.labels, predicted, scores, strict=True))
        )
        titles = [*self.titles, "label", "predicted", *(f"score_{self.called(c)}" for c in self.outputs)]
        _save(self.path, self.shaped(arrays), titles, rows)


def _save(path: Path, arrays: dict[str, Any], titles: list[str], rows: Iterable[list[Any]]) -> None:
    """Write arrays to an .npz file, or a table to a .csv file."""
    try:
        if path.suffix == ".npz":
            np.savez(path, **arrays)
            return
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(titles)
            writer.writerows(rows)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"--out {path}: {error.strerror}; give the path of a file that can be written")
