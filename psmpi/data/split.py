"""Splits of data sets: targets in memory, samples read row by row on demand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from psmpi.data.compressed import Compressed
from psmpi.data.compressed_rows import CompressedRows
from psmpi.data.rows import RowSource

if TYPE_CHECKING:
    from psmpi.data.augment import Augmentation

Rows = npt.NDArray[np.int64]

# Tokens that a vocabulary has at most.
MAX_TOKENS = 1 << 22
# Keeps these random numbers apart from all others drawn from the same seed.
_TAG = 0x73706C69


class Numbering(NamedTuple):
    """What the numbers in a text of sparse samples mean, see psmpi.data.svmlight.

    first: the number of the first feature, 0 or 1. labels: the labels of the two classes, or that of class 0 alone,
    which others follow; () where samples have values. features: how many there are.
    """

    first: int
    labels: tuple[int, ...]
    features: int


@dataclass(frozen=True, eq=False)
class Split:
    """The training or the test samples of a data set.

    targets: what is learnt, read-only: labels (n,) int64, or in a regression values (n, outputs) float64. Of sequences
        that have a target at each step labels (n, steps), -1 where none counts, or values (n, steps, outputs), NaN
        there. Labels of texts are int8 or int16, as their tokens are: a minibatch of them is int64.
    shape: the shape of one sample, (channels, height, width), (features,), or of a sequence (features, steps).
    scale: the factor that takes stored values to [0, 1]: 1/255 for uint8 images, 1/16 for the digits, 1.0 for
        floats.
    source: where the samples lie.
    index: (n,) int64, increasing: the rows of `source` that make up this split; None for all of them.
    lengths: (n,) int32, the steps of each sequence, 1 to those of `shape`; None: all.
    order: (features,) int64, where the source has each value of a sample; None: in this order.
    vocabulary: the tokens that there are, where the data set knows it; else 0.
    characters: of a text, what its tokens stand for, token k for the k-th; else "".
    names: of the classes, class k has the k-th; () where labels are their numbers.
    columns: of a table, the names of the features, feature k has the k-th; () where they have none.
    numbering: of a text of sparse samples, what its numbers mean.
    memory: the bytes of samples that a process keeps, see psmpi.data.bounded; -1: as many as it needs.
    augmentation: what is done to images when they are fetched.
    """

    targets: npt.NDArray[Any]
    shape: tuple[int, ...]
    scale: float
    source: RowSource
    index: Rows | None = None
    lengths: npt.NDArray[np.int32] | None = None
    order: Rows | None = None
    vocabulary: int = 0
    characters: str = ""
    names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    numbering: Numbering | None = None
    memory: int = -1
    augmentation: Augmentation | None = None

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.targets)

    @property
    def task(self) -> str:
        """The kind of the targets: "classes" (labels) or "regression" (values)."""
        return "classes" if self.targets.dtype.kind == "i" else "regression"

    @property
    def steps(self) -> int:
        """The steps of a sequence, the longest; 0 where samples are no sequences."""
        return self.shape[1] if len(self.shape) == 2 else 0

    @property
    def tokens(self) -> bool:
        """Whether samples are sequences of tokens, whole numbers that an embedding looks up."""
        return self.steps > 0 and self.scale == 1.0 and self.dtype.kind in "iu"

    @property
    def by_step(self) -> bool:
        """Whether each step of a sequence has a target of its own."""
        return self.targets.ndim == (2 if self.task == "classes" else 3)

    @cached_property
    def counts(self) -> Rows:
        """The targets of each sample that count, (n,): 1, or its steps with a target."""
        if not self.by_step:
            return np.ones(self.n, np.int64)
        counted = self.targets >= 0 if self.task == "classes" else ~np.isnan(self.targets[..., 0])
        found: Rows = np.count_nonzero(counted, axis=1)
        return found

    def count(self, ids: Rows) -> int:
        """The targets that count of the samples `ids` (b,), at least 1: what a mean loss divides by."""
        return max(1, int(self.counts[ids].sum())) if self.by_step else len(ids)

    @property
    def labels(self) -> Rows:
        """The targets (n,), or (n, steps), int64 of classes; ValueError in a regression."""
        if self.task != "classes":
            raise ValueError("these samples have values and no labels")
        return self.targets

    @property
    def features(self) -> int:
        """The number of values in a sample, prod(shape)."""
        return prod(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype, in native byte order: uint8, float32 or float64."""
        return self.source.dtype

    def read(self, rows: npt.ArrayLike) -> npt.NDArray[Any]:
        """Read the samples `rows`, (k,) integers in 0..n-1 in any order, repetitions allowed.

        Returns a new C-contiguous array (k, prod(shape)) of the stored dtype, unscaled. Needs memory for the
        result and a few chunks of a MiB. Raises IndexError for rows outside 0..n-1, TypeError for rows that
        are no integers, ValueError for rows that are no vector, and UserError where the file is damaged,
        truncated or gone.
        """
        wanted = as_rows(rows, self.n)
        out = np.empty((len(wanted), self.features), self.dtype)
        if len(wanted):
            order = np.argsort(wanted, kind="stable")
            ordered = wanted[order]
            if self.index is not None:
                ordered = self.index[ordered]
            self.source.read_into(ordered, order, out)
        return out if self.order is None else np.ascontiguousarray(out[:, self.order])

    def taken(self, rows: Rows) -> Compressed | None:
        """The samples `rows`, (k,) int64 in 0..n-1, as compressed rows; None where samples are not sparse."""
        return None if self.order is not None else self.source.taken(rows if self.index is None else self.index[rows])

    @cached_property
    def compressed(self) -> Compressed | None:
        """All samples as compressed rows, in the order of the split; None where samples are not sparse."""
        return self.taken(np.arange(self.n, dtype=np.int64))

    def pieces(self, rows: Rows) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Read the samples `rows`, strictly increasing in 0..n-1, some at a time, going through the source once.

        Yields (i, values): the samples rows[i : i + k] as `read` returns them, (k, prod(shape)), which hold until the
        next piece. Raises UserError as `read` does.
        """
        pieces = self.source.pieces(rows if self.index is None else self.index[rows], self.features)
        if self.order is None:
            yield from pieces
        else:
            yield from ((i, np.ascontiguousarray(values[:, self.order])) for i, values in pieces)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set: samples of `shape`, a training and a test split; `outputs`: classes, or values of a sample.

    held_out: whether the test samples were drawn from those of one array, by a split seed. own: of private data sets,
    the training samples that this rank can read; None: all. validation: samples that no step sees, None for none;
    unseen: in a training with those, which `test` then has, the test samples.
    """

    name: str
    outputs: int
    shape: tuple[int, ...]
    train: Split
    test: Split
    held_out: bool = False
    own: range | None = None
    validation: Split | None = None
    unseen: Split | None = None

    def for_training(self) -> Dataset:
        """The data set of a training: what it tests are the validation samples, where there are any."""
        if self.validation is None:
            return self
        return replace(self, test=self.validation, unseen=self.test, validation=None, held_out=True)

    @property
    def tested(self) -> str:
        """The samples that a training tests: "test" or "validation"."""
        return "test" if self.unseen is None else "validation"

    @property
    def task(self) -> str:
        """The task, see `Split.task`."""
        return self.train.task


def as_rows(rows: npt.ArrayLike, n: int) -> Rows:
    """Return `rows` as (k,) int64; raise TypeError, ValueError or IndexError unless integers in 0..n-1."""
    given = np.asarray(rows)
    if given.ndim != 1:
        raise ValueError(f"rows have to be a vector, not an array of shape {given.shape}")
    if given.size == 0:
        return np.empty(0, np.int64)
    if given.dtype.kind not in "iu":
        raise TypeError(f"rows have to be integers, not {given.dtype}")
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= n:
        raise IndexError(f"rows {low}..{high} asked for, but there are rows 0..{n - 1} only")
    return given.astype(np.int64, copy=False)


def batch_targets(targets: npt.NDArray[Any], ids: npt.ArrayLike) -> npt.NDArray[Any]:
    """The `targets` of the samples `ids` (b,) of a split as a batch has them: (b,) int64, or (outputs, b) float64.

    Of sequences with a target at each step (steps, b), or (outputs, steps, b). IndexError unless ids are those of
    samples.
    """
    found: npt.NDArray[Any] = targets[as_rows(ids, len(targets))].T
    return found if found.dtype.kind == "f" else found.astype(np.int64, copy=False)


def frozen(targets: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A read-only copy of `targets`: of labels int64, of values float64."""
    copy = targets.astype(np.float64 if targets.dtype.kind == "f" else np.int64)
    copy.flags.writeable = False
    return copy


def every_fifth(count: int) -> npt.NDArray[np.bool_]:
    """Which of `count` rows are test samples where every fifth is: those with index % 5 == 4."""
    chosen = np.zeros(count, np.bool_)
    chosen[4::5] = True
    return chosen


def random_fifth(targets: npt.NDArray[Any], seed: int) -> npt.NDArray[np.bool_]:
    """Which rows are test samples: a random fifth of each class, or of all samples where the targets are values.

    targets: labels (n,) or values (n, outputs). Of n samples about n / 5 are drawn, of a class of c samples c / 5
    rounded down or up, one at least of 5 and more, and never all. They depend on the targets and the seed alone. None
    is drawn where no class has two samples.
    """
    count = len(targets)
    sequence = np.random.SeedSequence([seed, _TAG])
    order = np.random.Generator(np.random.Philox(sequence)).permutation(count)
    if targets.ndim == 1:
        # Class by class, in random order within each. Of any five that follow each other one is drawn, so that the
        # classes share the rounding; the only sample of a class is for training.
        order = order[np.argsort(targets[order], kind="stable")]
        ordered = targets[order]
        same = ordered[1:] == ordered[:-1]
        order = order[np.append(same, False) | np.append(False, same)]
    drawn = order[4::5] if len(order) > 4 else order[-1:]
    chosen = np.zeros(count, np.bool_)
    chosen[drawn] = True
    return chosen


def hold_out(held_out: npt.NDArray[np.bool_], whole: Split) -> tuple[Split, Split]:
    """Split samples into (train, test), the test samples being the rows `held_out`, (n,); sparse ones are copied."""
    train, test = (_part(whole, np.flatnonzero(chosen).astype(np.int64)) for chosen in (~held_out, held_out))
    return train, test


def _part(whole: Split, rows: Rows) -> Split:
    targets = frozen(whole.targets[rows])
    if isinstance(whole.source, CompressedRows):
        return replace(whole, targets=targets, source=whole.source.apart(rows))
    lengths = None if whole.lengths is None else whole.lengths[rows]
    return replace(whole, targets=targets, index=rows if whole.index is None else whole.index[rows], lengths=lengths)
