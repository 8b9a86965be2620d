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

# Most tokens of a vocabulary.
MAX_TOKENS = 1 << 22
# Key of these random numbers, which separates them from others drawn from the same seed.
_TAG = 0x73706C69


class Numbering(NamedTuple):
    """Numbering of features and labels in a text of sparse samples, see psmpi.data.svmlight.

    first: number of the first feature, 0 or 1. labels: the labels of two classes, or the label of class 0, which those
    of other classes follow; () for values. features: number of features.
    """

    first: int
    labels: tuple[int, ...]
    features: int


@dataclass(frozen=True, eq=False)
class Split:
    """The training or the test samples of a data set.

    targets: read-only labels (n,) int64, or in a regression values (n, outputs) float64. Sequences with a target at
        each step have labels (n, steps), -1 at steps that do not count, or values (n, steps, outputs), NaN at such
        steps. Labels of texts are int8 or int16, as their tokens are; those of a minibatch are int64.
    shape: shape of a sample: (channels, height, width), (features,), or (features, steps) for a sequence.
    scale: factor on stored values: 1/255 for uint8 images, 1/16 for the digits, 1.0 for floats.
    source: source of the samples' rows.
    index: (n,) int64, increasing: the rows of `source` that are in this split; None: all.
    lengths: (n,) int32, the steps of each sequence, from 1 to those of `shape`; None: all have those of `shape`.
    order: (features,) int64, the position in a row of `source` of each value of a sample; None: the same order.
    vocabulary: number of tokens, if the data set knows it; else 0.
    characters: characters of a text, token k stands for the k-th; else "".
    names: names of the classes, class k has the k-th; () if labels are numbers.
    columns: names of a table's features, feature k has the k-th; () if they have none.
    numbering: numbering of features and labels in a text of sparse samples; else None.
    memory: most bytes of samples that a process keeps, see psmpi.data.bounded; -1: no bound.
    augmentation: augmentation of images when they are fetched; None: none.
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
        """Number of steps of the longest sequence; 0 if samples are not sequences."""
        return self.shape[1] if len(self.shape) == 2 else 0

    @property
    def tokens(self) -> bool:
        """Whether samples are sequences of tokens, integers that an embedding looks up."""
        return self.steps > 0 and self.scale == 1.0 and self.dtype.kind in "iu"

    @property
    def by_step(self) -> bool:
        """Whether each step of a sequence has a target."""
        return self.targets.ndim == (2 if self.task == "classes" else 3)

    @cached_property
    def counts(self) -> Rows:
        """Number of targets of each sample that count, (n,) int64: 1, or its steps with a target."""
        if not self.by_step:
            return np.ones(self.n, np.int64)
        counted = self.targets >= 0 if self.task == "classes" else ~np.isnan(self.targets[..., 0])
        numbers: Rows = np.count_nonzero(counted, axis=1)
        return numbers

    def count(self, ids: Rows) -> int:
        """Number of targets of the samples `ids` (b,) that count, at least 1: the divisor of a mean loss."""
        return max(1, int(self.counts[ids].sum())) if self.by_step else len(ids)

    @property
    def labels(self) -> Rows:
        """The labels (n,) or (n, steps); ValueError in a regression."""
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

        Returns a new C-contiguous array (k, prod(shape)) of the stored dtype, unscaled. The read needs memory for the
        result and a few chunks of a MiB. IndexError for rows outside 0..n-1, TypeError for rows that are not integers,
        ValueError for rows that are not a vector, UserError if the file is damaged, truncated or gone.
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
        """The samples `rows`, (k,) int64 in 0..n-1, as compressed rows; None if samples are not sparse."""
        return None if self.order is not None else self.source.taken(rows if self.index is None else self.index[rows])

    @cached_property
    def compressed(self) -> Compressed | None:
        """All samples as compressed rows, in the order of the split; None if samples are not sparse."""
        return self.taken(np.arange(self.n, dtype=np.int64))

    def pieces(self, rows: Rows) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Read the samples `rows`, strictly increasing in 0..n-1, in pieces, in one pass through the source.

        Yields (i, values): the samples rows[i : i + k] as `read` returns them, (k, prod(shape)), valid until the next
        piece. UserError as in `read`.
        """
        pieces = self.source.pieces(rows if self.index is None else self.index[rows], self.features)
        if self.order is None:
            yield from pieces
        else:
            yield from ((i, np.ascontiguousarray(values[:, self.order])) for i, values in pieces)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named data set: samples of `shape`, a training and a test split; `outputs`: number of classes or of values.

    held_out: whether the test samples were drawn from the samples of one array. own: training samples of a private data
    set that this rank can read; None: all. validation: validation samples, which no training step sees; None: none.
    unseen: the test samples, in a training that tests the validation samples; None: `test` has the test samples.
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
        """The data set of a training: if there are validation samples, they become `test`, and `test` `unseen`."""
        if self.validation is None:
            return self
        return replace(self, test=self.validation, unseen=self.test, validation=None, held_out=True)

    @property
    def tested(self) -> str:
        """Name of the samples that a training tests: "test" or "validation"."""
        return "test" if self.unseen is None else "validation"

    @property
    def task(self) -> str:
        """The task, see `Split.task`."""
        return self.train.task


def as_rows(rows: npt.ArrayLike, n: int) -> Rows:
    """Return `rows` as (k,) int64; IndexError unless in 0..n-1, TypeError unless integers, ValueError unless (k,)."""
    vector = np.asarray(rows)
    if vector.ndim != 1:
        raise ValueError(f"rows have to be a vector, not an array of shape {vector.shape}")
    if vector.size == 0:
        return np.empty(0, np.int64)
    if vector.dtype.kind not in "iu":
        raise TypeError(f"rows have to be integers, not {vector.dtype}")
    low, high = int(vector.min()), int(vector.max())
    if low < 0 or high >= n:
        raise IndexError(f"rows {low}..{high} asked for, but there are rows 0..{n - 1} only")
    return vector.astype(np.int64, copy=False)


def batch_targets(targets: npt.NDArray[Any], ids: npt.ArrayLike) -> npt.NDArray[Any]:
    """The `targets` of a split for a batch of samples `ids` (b,): labels (b,) int64, or values (outputs, b) float64.

    For sequences with a target at each step the shape is (steps, b) or (outputs, steps, b). Errors as in `as_rows`.
    """
    of_batch: npt.NDArray[Any] = targets[as_rows(ids, len(targets))].T
    return of_batch if of_batch.dtype.kind == "f" else of_batch.astype(np.int64, copy=False)


def frozen(targets: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A read-only copy of `targets`: labels become int64, values float64."""
    copy = targets.astype(np.float64 if targets.dtype.kind == "f" else np.int64)
    copy.flags.writeable = False
    return copy


def every_fifth(count: int) -> npt.NDArray[np.bool_]:
    """Mask (count,) of test samples that are every fifth row: index % 5 == 4."""
    chosen = np.zeros(count, np.bool_)
    chosen[4::5] = True
    return chosen


def random_fifth(targets: npt.NDArray[Any], seed: int) -> npt.NDArray[np.bool_]:
    """Mask (n,) of test samples: a random fifth of each class, or of all samples if the targets are values.

    targets: labels (n,) or values (n, outputs). About n / 5 samples are drawn, of a class of c samples c / 5 rounded
    down or up, at least one of 5 and more, and never all. The mask depends on the targets and the seed only. No sample
    is drawn if no class has two samples.
    """
    count = len(targets)
    sequence = np.random.SeedSequence([seed, _TAG])
    order = np.random.Generator(np.random.Philox(sequence)).permutation(count)
    if targets.ndim == 1:
        # Sort by class, in random order within each, and draw every fifth sample, so that classes share the rounding.
        # The only sample of a class is for training.
        order = order[np.argsort(targets[order], kind="stable")]
        ordered = targets[order]
        same = ordered[1:] == ordered[:-1]
        order = order[np.append(same, False) | np.append(False, same)]
    drawn = order[4::5] if len(order) > 4 else order[-1:]
    chosen = np.zeros(count, np.bool_)
    chosen[drawn] = True
    return chosen


def hold_out(held_out: npt.NDArray[np.bool_], whole: Split) -> tuple[Split, Split]:
    """Split samples into (train, test) by the mask `held_out` (n,) of test samples; sparse samples are copied."""
    train, test = (_part(whole, np.flatnonzero(chosen).astype(np.int64)) for chosen in (~held_out, held_out))
    return train, test


def _part(whole: Split, rows: Rows) -> Split:
    targets = frozen(whole.targets[rows])
    if isinstance(whole.source, CompressedRows):
        return replace(whole, targets=targets, source=whole.source.apart(rows))
    lengths = None if whole.lengths is None else whole.lengths[rows]
    return replace(whole, targets=targets, index=rows if whole.index is None else whole.index[rows], lengths=lengths)
