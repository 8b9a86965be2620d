"""Warnings about probable mistakes in a data set that can be trained on nevertheless."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.copies import Prints, find_copies
from psmpi.data.labels import NUMBERED
from psmpi.data.names import listed
from psmpi.data.split import Dataset, Split
from psmpi.data.text import named
from psmpi.errors import counted

# Samples that are read, and most bytes of them.
ROWS, BYTES = 64, 1 << 22
# Usual numbers of channels of images.
CHANNELS = (1, 3, 4)
# Images with pixels up to this value are nearly black.
DIM = 32
# Values up to this magnitude count as scaled.
LARGE = 12
# Largest ratio of the magnitudes of test and training samples that needs no warning.
APART = 8


def find_doubts(dataset: Dataset, prints: Sequence[Prints] = ()) -> Iterator[str]:
    """Yield a phrase about each probable mistake in `dataset`, with what to do; reads a few samples.

    prints: fingerprints of training samples and of test samples, see `psmpi.data.identify`.

    Labels: a single class, classes without training or test samples, gaps in the numbers, numbers that may mark samples
    without a label. Texts: characters that only the test part has. Values: a constant column. Samples: values that are
    not scaled, channels that may be on another axis, test samples of another scale, test samples that are training
    samples.
    """
    yield from (
        _characters(dataset)
        if dataset.train.characters
        else _labels(dataset)
        if dataset.task == "classes"
        else _values(_counted(dataset.train), 0 if dataset.train.by_step else dataset.train.steps)
    )
    some = some_samples(dataset.train)
    yield from _samples(dataset, some)
    if len(prints) == 2:
        yield from find_copies(dataset, prints, some)


def _labels(dataset: Dataset) -> Iterator[str]:
    train, test = (
        np.bincount(_counted(split), minlength=dataset.outputs) > 0 for split in (dataset.train, dataset.test)
    )
    used, names = np.flatnonzero(train | test), dataset.train.names
    if len(used) == 1:
        yield f"all samples have the label {names[used[0]] if names else used[0]}: there is nothing to tell apart"
        return
    if names:
        yield from _marks(names)
    first, last = int(used[0]), int(used[-1])
    if first and not names:
        yield (
            f"the labels begin at {first}, and each number below has a score that nothing trains: number the classes "
            f"from 0, y - {first}"
        )
    gaps = first + np.flatnonzero(~(train | test)[first:last])
    if len(gaps) and not names:
        lone = last - int(used[-2]) > 2
        ignored = f"; if {last} marks samples to be ignored, remove these" if lone else ""
        yield f"no sample has the {_named(gaps, 'label')}: number the classes without gaps, {NUMBERED}{ignored}"
    for present, absent, of, lacking in (
        (test, train, dataset.tested, "training"),
        (train, test, "training", dataset.tested),
    ):
        classes = np.flatnonzero(present & ~absent)
        if len(classes):
            verb = "has" if len(classes) == 1 else "have"
            yield f"the {_named(classes, 'class', names)} {verb} {of} samples and no {lacking} samples"


def _marks(names: tuple[str, ...]) -> Iterator[str]:
    """Yield warnings for labels that may mark samples without a label: a negative one, one far above all others."""
    if not all(re.fullmatch(r"-?\d+", name) for name in names):
        return
    numbers = [int(name) for name in names]
    if numbers[0] < 0 and len(numbers) > 2 and numbers[1] >= 0:
        yield f"{numbers[0]} is a class: if it marks samples without a label, remove these"
    if numbers[-1] - numbers[-2] > max(2, numbers[-2] - numbers[0]):
        yield f"{numbers[-1]} is a class: if it marks samples to be ignored, remove these"


def _count(tokens: npt.NDArray[Any], outputs: int) -> npt.NDArray[np.int64]:
    """Count each of `outputs` tokens in `tokens` (n, steps): (outputs,)."""
    count = np.zeros(outputs, np.int64)
    # In parts, since np.bincount copies tokens to int64.
    for some in np.array_split(tokens, 1 + tokens.size // (1 << 20)):
        count += np.bincount(some.ravel(), minlength=outputs)
    return count


def _characters(dataset: Dataset) -> Iterator[str]:
    train, test = (_count(split.targets, dataset.outputs) for split in (dataset.train, dataset.test))
    unseen = np.flatnonzero((test > 0) & (train == 0))
    if len(unseen):
        some = ", ".join(named(dataset.train.characters[k]) for k in unseen[:5])
        more = f" and {len(unseen) - 5:,} more" if len(unseen) > 5 else ""
        share = test[unseen].sum() / test.sum()
        yield (
            f"{counted(len(unseen), 'character')} of the last tenth of the text, {100 * share:.2g} % of it, cannot be "
            f"learnt from what is before it: {some}{more}"
        )


def _counted(split: Split) -> npt.NDArray[Any]:
    """The targets of steps and samples that count: labels (n,) or values (n, outputs)."""
    if not split.by_step:
        return split.targets
    counts = split.targets >= 0 if split.task == "classes" else ~np.isnan(split.targets[..., 0])
    targets: npt.NDArray[Any] = split.targets[counts]
    return targets


def _named(classes: npt.NDArray[Any], what: str, names: tuple[str, ...] = ()) -> str:
    """Text that lists classes, such as "classes 1, 2, 3, 4, 5 and 20 more"; what: "class" or "label"."""
    several = {"class": "classes", "label": "labels"}[what]
    return f"{what if len(classes) == 1 else several} {listed([names[k] if names else str(k) for k in classes])}"


def _values(values: npt.NDArray[Any], steps: int) -> Iterator[str]:
    """Yield warnings about the values (n, outputs) of training samples.

    steps: the number of steps if the samples are sequences with one row of values each, else 0.
    """
    if values.shape[1] == steps > 1:
        yield (
            f"y has {steps} values for each sequence of {steps} steps, which are taken for values of the whole: for "
            "one at each step save y[..., None]"
        )
    fixed = np.flatnonzero((values == values[0]).all(axis=0))
    if len(values) > 1 and len(fixed):
        yield (
            f"all training samples have the value {values[0, fixed[0]]:g} in column {fixed[0]} of y: there is nothing "
            "to learn"
        )


def _samples(dataset: Dataset, some: npt.NDArray[Any]) -> Iterator[str]:
    shape = dataset.shape
    if len(shape) == 3 and shape[2] in CHANNELS and min(shape[:2]) > max(CHANNELS):
        yield (
            f"samples of the shape {shape} are taken for {shape[0]} channels of {shape[1]} x {shape[2]}: if the "
            "channels come last, add --layout nhwc"
        )
    if dataset.train.order is not None and len(shape) == 3 and shape[1] in CHANNELS and min(shape[0], shape[2]) > 4:
        yield (
            f"samples of the shape {shape} are taken for {shape[0]} channels of {shape[1]} x {shape[2]}: if the "
            "channels come first, leave --layout nhwc out"
        )
    if not some.size or not np.isfinite(some).all():
        return
    low, high = float(some.min()), float(some.max())
    if low == high and len(some) > 1:
        yield f"all values looked at in x are {low:g}: there is nothing to learn from"
        return
    empty = int((some == 0).all(axis=1).sum())
    if len(some) >= 8 and 8 * empty > len(some):
        yield (
            f"{empty} of {len(some)} samples looked at are zeros throughout: was the file written to its end, of all "
            "its parts?"
        )
    if dataset.train.tokens:
        return
    largest = max(-low, high)
    if dataset.train.scale == 1 and largest > LARGE:
        other = " (pixels: by 255, or save them as uint8)" if 127 < largest <= 255 else ""
        yield f"x has values up to {largest:g}, and networks learn from values of about 1: divide it by a number{other}"
    if some.dtype.kind == "u" and dataset.train.scale == 1 / 255 and high <= DIM:
        yield (
            f"x is uint8, is divided by 255 and has values up to {high:g} only, so that all are near 0: save it as "
            f"x.astype(np.float32){f' / {high:g}' if high != 1 else ''}"
        )
    if dataset.test.source is not dataset.train.source:
        tests = some_samples(dataset.test)
        most = [float(np.abs(values).max(initial=0)) if np.isfinite(values).all() else 0.0 for values in (some, tests)]
        if min(most) and max(most) > APART * min(most):
            yield f"x has values up to {most[0]:g}, x_test up to {most[1]:g}: scale both alike"


def some_samples(split: Split) -> npt.NDArray[Any]:
    """Some samples as stored, (k, features); of sparse ones only the columns with entries and one column of zeros."""
    if split.compressed is not None:
        return split.source.glance(ROWS)
    row = split.features * split.dtype.itemsize
    return split.source.glance(min(ROWS, max(1, BYTES // row)))
