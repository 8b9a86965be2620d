"""Data sets in the text format of SVMlight and LIBSVM, see psmpi.data.svmtext, as sparse samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psmpi.data.compressed import Compressed
from psmpi.data.compressed_rows import CompressedRows
from psmpi.data.labels import MAX_CLASSES
from psmpi.data.split import Dataset, Numbering, Split, every_fifth, frozen, hold_out, random_fifth
from psmpi.data.svmtext import PACKED, WHOLE, Samples, read_text
from psmpi.errors import UserError, counted

SVM = (".svm", ".libsvm", ".svmlight")
_NAME = re.compile(r"(.+?)(\.t)?(\.svm|\.libsvm|\.svmlight)(\.t)?(\.gz|\.bz2|\.xz)?", re.IGNORECASE)


def is_svmlight(name: str) -> bool:
    """Whether a data set is a text of sparse samples, by its name: own.svm, own.svm.t, own.svm.bz2, ..."""
    return _NAME.fullmatch(Path(name).name) is not None


def open_svmlight(
    name: str, path: Path, split_seed: int, numbering: Numbering | None = None, predicted: bool = False
) -> Dataset:
    """A text of samples as a data set; its test samples are those of the file of that name with .t, if there is one.

    Else a fifth is held out, see `psmpi.data.open_dataset`. Labels of training samples that are all written as integers
    are classes: two different ones in their order, or numbers from 0 or 1 on; others are values to learn. Features are
    numbered from 1, from 0 where an index is 0. Or all that is as `numbering` says, and there are at least as many
    features; predicted: labels that are all 0, where 0 is none, stand for unknown ones. Values are float32.

    UserError for texts that are not in order, for labels that are none of these, and for test labels that are not
    integers where those of training are.
    """
    paths = [path, *_tests(path)]
    texts = [read_text(one) for one in paths]
    numbering = _numbering(paths, texts, numbering)
    splits = [_split(one, text, numbering, predicted) for one, text in zip(paths, texts, strict=True)]
    del texts
    if len(splits) == 1:
        return _held_out(name, path, splits[0], split_seed)
    train, test = splits
    return Dataset(name, _outputs(train, test), train.shape, train, test)


def open_whole_svmlight(path: Path, numbering: Numbering | None = None) -> Split:
    """All samples of a text as one split, see `open_svmlight`; labels are -1 where they are unknown."""
    text = read_text(path)
    return _split(path, text, _numbering([path], [text], numbering), True)


def _tests(path: Path) -> list[Path]:
    """The file of test samples beside one of training samples; UserError where there are several."""
    parts = _NAME.fullmatch(path.name)
    assert parts is not None
    stem, before, suffix, behind, _ = parts.groups()
    if before or behind:
        return []
    names = [f"{stem}{end}{packed}" for end in (f"{suffix}.t", f".t{suffix}") for packed in ("", *PACKED)]
    found = [path.with_name(one) for one in names if path.with_name(one).is_file()]
    if len(found) > 1:
        raise UserError(
            f"{path}: the test samples may be those of {' or of '.join(one.name for one in found)}: leave one of these "
            "files there"
        )
    return found


def _numbering(paths: Sequence[Path], texts: Sequence[Samples], given: Numbering | None) -> Numbering:
    """What numbers mean in texts that belong together."""
    lowest = min(int(text.indices.min(initial=1)) for text in texts)
    first = min(lowest, 1) if given is None else given.first
    if lowest < first:
        raise UserError(
            f"{paths[0]}: found the index 0, and what the network was trained on has features numbered from {first}: "
            "number them alike"
        )
    features = 1 + max(int(text.indices.max(initial=first)) for text in texts) - first
    if given is not None:
        return given._replace(features=max(features, given.features))
    if texts[0].real_line:
        return Numbering(first, (), features)
    for path, text in zip(paths, texts, strict=True):
        if text.real_line:
            raise UserError(
                f"{path}, line {text.real_line}: the label is not an integer, and those of {paths[0].name} are, so "
                f"that they are classes: write an integer here, or, for values to learn, one of {paths[0].name} with "
                "a point, as 1.0"
            )
    labels = np.unique(np.concatenate([np.unique(text.labels) for text in texts]))
    if max(abs(labels[0]), abs(labels[-1])) > WHOLE:
        raise UserError(
            f"{paths[0]}: found the label {labels[np.abs(labels).argmax()]:.0f}; expected integers below 2^53"
        )
    if len(labels) > 2 and not (labels[0] in (0, 1) and labels[-1] < MAX_CLASSES):
        shown = ", ".join(f"{label:.0f}" for label in labels[:4])
        raise UserError(
            f"{paths[0]}: the labels are {shown}{', ...' if len(labels) > 4 else ''}; expected two different integers, "
            f"or classes numbered from 0 or 1, {MAX_CLASSES} at most: number them so, or write values to learn with a "
            "point, as 3.0"
        )
    return Numbering(first, tuple(int(label) for label in labels[: 2 if len(labels) == 2 else 1]), features)


def _split(path: Path, text: Samples, numbering: Numbering, predicted: bool) -> Split:
    columns = text.indices
    # In place: the text has no other use for them.
    columns -= np.int32(numbering.first)
    rows = Compressed(text.starts, columns, text.values, numbering.features)
    targets = _classes(path, text, numbering, predicted) if numbering.labels else text.labels[:, None]
    shape = (numbering.features,)
    return Split(frozen(targets), shape, 1.0, CompressedRows(rows, str(path)), numbering=numbering)


def _classes(path: Path, text: Samples, numbering: Numbering, predicted: bool) -> npt.NDArray[np.int64]:
    """The classes of labels; -1 where they are unknown."""
    known, labels = numbering.labels, text.labels
    if len(known) == 2:
        found = np.where(labels == known[0], 0, np.where(labels == known[1], 1, -1))
    else:
        found = np.maximum(labels - known[0], -1).astype(np.int64)
    wrong = np.flatnonzero((found < 0) | (labels != np.floor(labels)))
    if predicted and len(wrong) == len(labels) and not labels.any():
        return np.full(len(labels), -1)
    if len(wrong):
        raise UserError(
            f"{path}: sample {wrong[0]} has the label {labels[wrong[0]]:g}; what the network was trained on has "
            f"{' and '.join(map(str, known)) if len(known) == 2 else f'labels from {known[0]} on'}: write these, or in "
            "all lines 0 where none is known"
        )
    return found


def _held_out(name: str, path: Path, whole: Split, split_seed: int) -> Dataset:
    """A data set whose test samples are a fifth of these."""
    y = whole.targets
    if len(y) < 5:
        raise UserError(
            f"{path}: the file has {counted(len(y), 'sample')}, too few to hold out a fifth for testing; write more, "
            f"or test samples into {path.name}.t"
        )
    chosen = every_fifth(len(y)) if split_seed < 0 else random_fifth(y, split_seed)
    if not chosen.any():
        raise UserError(
            f"{path}: each of the {len(y)} samples has a label of its own, so that none can be held out for testing; "
            f"write test samples into {path.name}.t"
        )
    train, test = hold_out(chosen, whole)
    return Dataset(name, _outputs(train, test), train.shape, train, test, held_out=True)


def _outputs(train: Split, test: Split) -> int:
    if train.task == "regression":
        return 1
    return max(
        len(train.numbering.labels) if train.numbering else 0, *(int(s.targets.max()) + 1 for s in (train, test))
    )
