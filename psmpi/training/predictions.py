"""Predictions of samples, collected minibatch by minibatch, written to a file and printed on rank 0."""

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

# Up to so many classes have a matrix of confusion in JSON; more classes have a list of pairs.
MATRIX = 40


def room(out: str) -> AbstractContextManager[IO[bytes] | None]:
    """Open an unnamed file for the values of all samples, in the folder of --out; None without --out."""
    try:
        return tempfile.TemporaryFile(dir=Path(out).parent) if out else nullcontext()
    except OSError as error:
        raise _unwritable(Path(out), error) from None


class Predictions:
    """The predictions of n samples, on rank 0.

    options: of psmpi.predict; targets: of the samples, None if unknown; outputs: indices of the predicted classes or
    values, out of `known`; file: for the values (n, outputs) of `dtype`, or None. steps: number of steps of a sequence
    if each step is predicted, else 0; then steps take the place of samples, in order, and a step whose label is below 0
    or whose target is NaN does not count. characters: the classes of a text, else "". names: of the classes, () if they
    go by number.
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
        """Write the values (b, outputs) of some samples to the file."""
        if self.file is None:
            return
        try:
            self.file.seek(at.start * values.shape[1] * values.itemsize)
            self.file.write(values)
            self.file.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def all_values(self) -> Any:
        """The values (n, outputs) of all samples, mapped from the file."""
        assert self.file is not None
        if not self.n:
            return np.empty((0, len(self.outputs)), self.dtype)
        return np.memmap(self.file, self.dtype, "r", shape=(self.n, len(self.outputs))).view(np.ndarray)

    def numbers(self, k: int) -> list[int]:
        """[sample], or [sequence, step], of prediction k."""
        return list(divmod(k, self.steps)) if self.steps else [k]

    @property
    def titles(self) -> list[str]:
        """The titles of `numbers`."""
        return ["sample", "step"] if self.steps else ["sample"]

    def shaped(self, arrays: dict[str, Any]) -> dict[str, Any]:
        """Reshape arrays (n, ...) of steps to (sequences, steps, ...); other arrays stay as they are."""
        if not self.steps:
            return arrays
        return {
            name: one.reshape(-1, self.steps, *one.shape[1:]) if np.ndim(one) and len(one) == self.n else one
            for name, one in arrays.items()
        }

    def summary(self) -> dict[str, Any]:
        """The entries of the report that follow from the options."""
        o = self.options
        summary = {"checkpoint": o.checkpoint, "dataset": o.dataset, "split": o.split}
        return summary | {"samples": self.n // max(1, self.steps)} | ({"steps": self.steps} if self.steps else {})


class Values(Predictions):
    """Predicted values."""

    def __init__(self, *known: Any):
        super().__init__(*known)
        # Sums over the samples seen, for each output: squared errors, targets, squared targets.
        self.sums, self.seen = np.zeros((3, len(self.outputs))), 0
        self.first = np.zeros((min(self.n, FIRST), len(self.outputs)), self.dtype)

    def take(self, at: slice, values: Any) -> None:
        """Add the values (b, outputs) of the samples `at`."""
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
        """Write and print the values, with errors if targets are known."""
        report = self.summary() | {"outputs": self.outputs.tolist()}
        if self.targets is not None:
            report["rmse"] = sqrt(self.sums[0].sum() / max(1, self.seen * len(self.outputs)))
        if self.options.out:
            self._write()
        if self.options.json:
            tell(json.dumps(report))
            return
        rows = [[*self.numbers(k), *row] for k, row in enumerate(self.first)]
        show_values(report, self.sums / max(1, self.seen), self.titles, rows)

    def _write(self) -> None:
        values = self.all_values()
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


class Choices(Predictions):
    """Predicted classes: for each sample the classes of its largest scores."""

    def __init__(self, *known: Any):
        super().__init__(*known)
        self.labels = np.full(self.n, -1) if self.targets is None else self.targets
        self.choices = np.zeros((self.n, min(TOP, len(self.outputs))), np.int64)
        self.first = np.zeros((min(self.n, FIRST), self.choices.shape[1]), self.dtype)

    def take(self, at: slice, scores: Any, classes: Any = None) -> None:
        """Add the scores (b, outputs) of the samples `at`, or the largest scores and their classes, (b, TOP) each."""
        if classes is None:
            self.keep(at, scores)
            best, places = largest(scores.T, TOP)
            scores, classes = best.T, self.outputs[places.T]
        self.choices[at] = classes
        if at.start < FIRST:
            self.first[at.start : at.stop] = scores[: FIRST - at.start]

    def report(self) -> None:
        """Write and print the predictions, with accuracies if labels are known."""
        labels, choices, known = self.labels, self.choices, self.known
        if self.options.out:
            self._write()
        report = self.summary() | {"classes": self.outputs.tolist()}
        if self.names:
            report["names"] = [self.called(c) for c in report["classes"]]
        if self.steps and labels.max(initial=-1) >= 0:
            labels, choices = labels[labels >= 0], choices[labels >= 0]
        predicted = choices[:, 0]
        # A part of a network has scores of some classes only, which give no accuracy.
        if len(labels) and labels.min() >= 0 and len(self.outputs) == known:
            report["accuracy"] = float(np.count_nonzero(predicted == labels) / len(labels))
            if known > TOP:
                report["top5"] = float(np.count_nonzero(choices == labels[:, None]) / len(labels))
            if known <= MATRIX:
                confusion = np.zeros((known, known), int)
                np.add.at(confusion, (labels, predicted), 1)
                report["confusion"] = confusion.tolist()
            else:
                report["confused"] = confused(labels, predicted)
        if self.options.json:
            tell(json.dumps(report))
        else:
            rows = [
                (self.numbers(k), chosen, scores)
                for k, (chosen, scores) in enumerate(zip(self.choices[:FIRST].tolist(), self.first, strict=True))
            ]
            names = [repr(one) for one in self.characters] or self.names
            show_choices(report, labels, predicted, names, self.titles, rows)

    def called(self, label: int) -> Any:
        """A class as it stands in files: its name, or its number."""
        return self.names[label] if self.names else label

    def _write(self) -> None:
        predicted, scores = self.choices[:, 0], self.all_values()
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
