"""Data sets of sparse samples in the text format of SVMlight and LIBSVM, see psmpi.data.svmtext."""

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
    """Whether a name is that of a text of sparse samples, such as own.svm, own.svm.t and own.svm.bz2."""
    return _NAME.fullmatch(Path(name).name) is not None


def open_svmlight(
    name: str, path: Path, split_seed: int, numbering: Numbering | None = None, predicted: bool = False
) -> Dataset:
    """Open a text of sparse samples as a data set; its test samples are in the file of the same name with .t.

    Without that file a fifth of the samples is held out, see `psmpi.data.open_dataset`. Training labels that are all
    written as integers are classes: two different integers, in order, or numbers from 0 or 1 on. Other labels are
    values to learn. Features are numbered from 1, or from 0 if an index is 0. numbering: replaces these rules, with its
    number of features or more. predicted: labels that are all 0 are unknown if no class has the label 0. Values are
    float32.

    UserError for texts in another format, for other labels, and for test labels that are not integers if the training
    labels are.
    """
    paths = [path, *_tests(path)]
    texts = [read_text(file) for file in paths]
    numbering = _numbering(paths, texts, numbering)
    splits = [_split(file, text, numbering, predicted) for file, text in zip(paths, texts, strict=True)]
    del texts
    if len(splits) == 1:
        return _held_out(name, path, splits[0], split_seed)
    train, test = splits
    return Dataset(name, _outputs(train, test), train.shape, train, test)


def open_whole_svmlight(path: Path, numbering: Numbering | None = None) -> Split:
    """All samples of a text as one split, see `open_svmlight`; unknown labels are -1."""
    text = read_text(path)
    return _split(path, text, _numbering([path], [text], numbering), True)


def _tests(path: Path) -> list[Path]:
    """The file of test samples beside a file of training samples, [] if there is none; UserError for several."""
    parts = _NAME.fullmatch(path.name)
    assert parts is not None
    stem, before, suffix, after, _ = parts.groups()
    if before or after:
        return []
    names = [f"{stem}{end}{packed}" for end in (f"{suffix}.t", f".t{suffix}") for packed in ("", *PACKED)]
    tests = [path.with_name(name) for name in names if path.with_name(name).is_file()]
    if len(tests) > 1:
        raise UserError(
            f"{path}: the test samples may be those of {' or of '.join(file.name for file in tests)}: leave one of "
            "these files there"
        )
    return tests


def _numbering(paths: Sequence[Path], texts: Sequence[Samples], trained: Numbering | None) -> Numbering:
    """The numbering of texts that belong together; trained: the numbering of a trained network, which they must fit."""
    lowest = min(int(text.indices.min(initial=1)) for text in texts)
    first = min(lowest, 1) if trained is None else trained.first
    if lowest < first:
        raise UserError(
            f"{paths[0]}: found the index 0, and what the network was trained on has features numbered from {first}: "
            "number them alike"
        )
    features = 1 + max(int(text.indices.max(initial=first)) for text in texts) - first
    if trained is not None:
        return trained._replace(features=max(features, trained.features))
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
    # In place, since the indices of the text are not needed again.
    columns -= np.int32(numbering.first)
    rows = Compressed(text.starts, columns, text.values, numbering.features)
    targets = _classes(path, text, numbering, predicted) if numbering.labels else text.labels[:, None]
    shape = (numbering.features,)
    return Split(frozen(targets), shape, 1.0, CompressedRows(rows, str(path)), numbering=numbering)


def _classes(path: Path, text: Samples, numbering: Numbering, predicted: bool) -> npt.NDArray[np.int64]:
    """Class numbers (n,) of the labels; -1 if labels are unknown."""
    known, labels = numbering.labels, text.labels
    if len(known) == 2:
        classes = np.where(labels == known[0], 0, np.where(labels == known[1], 1, -1))
    else:
        classes = np.maximum(labels - known[0], -1).astype(np.int64)
    wrong = np.flatnonzero((classes < 0) | (labels != np.floor(labels)))
    if predicted and len(wrong) == len(labels) and not labels.any():
        return np.full(len(labels), -1)
    if len(wrong):
        raise UserError(
            f"{path}: sample {wrong[0]} has the label {labels[wrong[0]]:g}; what the network was trained on has "
            f"{' and '.join(map(str, known)) if len(known) == 2 else f'labels from {known[0]} on'}: write these, or in "
            "all lines 0 where none is known"
        )
    return classes


def _held_out(name: str, path: Path, whole: Split, split_seed: int) -> Dataset:
    """Make a data set of all samples of a text, with a fifth of them as test samples; UserError for too few."""
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
