"""Samples in memory, and scaled minibatches of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.backend import CompressedSamples, NumpyOps, Samples
from psmpi.data.batch import Batch
from psmpi.data.bounded import BoundedSamples
from psmpi.data.compressed import Compressed
from psmpi.data.split import MAX_TOKENS, Split, as_rows, batch_targets
from psmpi.errors import UserError


class Resident:
    """Samples `rows` of a split, kept in their stored dtype; `fetch` scales them to `dtype`.

    rows: (k,) integers, strictly increasing, in 0..split.n-1. dtype: float32 or float64. ops: backend that keeps the
    samples. features: (m,) integers, strictly increasing, the values of each sample to keep and fetch; None: all.

    Sparse samples stay compressed rows with values of `dtype`, and `fetch` makes them dense; `compressed` has them, and
    is None for dense samples. With a bound on the split's `memory`, only the first samples are kept, and `fetch` reads
    the others from their file. `largest`: the largest token, -1 if samples are not tokens.

    ValueError for rows that do not increase and for another dtype, IndexError for rows out of range, UserError for
    samples that cannot be read or are not finite in `dtype`.
    """

    def __init__(
        self,
        split: Split,
        rows: npt.ArrayLike,
        dtype: npt.DTypeLike,
        ops: NumpyOps | None = None,
        features: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._dtype = np.dtype(dtype)
        if self._dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise ValueError(f"the dtype has to be float32 or float64, not {self._dtype}")
        self._rows = as_rows(rows, split.n).copy()
        if np.any(self._rows[1:] <= self._rows[:-1]):
            raise ValueError("the rows of a Resident have to increase strictly")
        self._targets, self._lengths = split.targets, split.lengths
        self._features = split.features if features is None else len(features)
        self.tokens = split.tokens
        # The largest token, if samples are tokens: see psmpi.data.sequences.
        self.largest = -1
        self._ops = ops = ops or NumpyOps()
        self._augmentation, self._room = split.augmentation, ops.empty(0, self._dtype)
        if features is not None and split.augmentation is not None:
            raise ValueError("parts of images cannot be augmented")
        stored = split.taken(self._rows)
        self.compressed: Compressed | None = None
        self._samples: Samples | CompressedSamples | BoundedSamples
        if stored is not None:
            if features is not None:
                stored = stored.some(features)
            self.compressed = kept = stored.astype(self._dtype)
            self._check_entries(split, stored, kept)
            self._samples = ops.compressed_samples(kept.starts, kept.columns, kept.values, kept.features)
            return
        row = split.dtype.itemsize * self._features
        if 0 <= split.memory < row * len(self._rows):
            self._samples = self._bounded(split, features, split.memory // row, ops)
            return
        values = split.read(self._rows) if features is None else _some(split, self._rows, features)
        if split.lengths is not None:
            # Values after a sequence's end may be arbitrary in the file: set them to zero.
            steps = values.reshape(len(values), *split.shape)
            beyond = np.arange(split.steps) >= split.lengths[self._rows][:, None]
            np.copyto(steps, 0, where=beyond[:, None])
        if values.dtype.kind == "f":
            self._check_finite(split, values)
        if split.tokens:
            self.largest = self._largest_token(split, values)
            values = values.astype(self._dtype)
        self._samples = ops.samples(values, split.scale)

    def _bounded(
        self, split: Split, features: npt.NDArray[np.int64] | None, count: int, ops: NumpyOps
    ) -> BoundedSamples:
        """Keep the first `count` samples in memory; the others are read from their file when fetched."""

        def read(at: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
            rows = self._rows[at]
            values = split.read(rows) if features is None else _some(split, rows, features)
            if values.dtype.kind == "f":
                self._check_finite(split, values, at)
            return values

        return BoundedSamples(read(np.arange(count)), read, split.scale, ops)

    def _check_finite(self, split: Split, values: npt.NDArray[Any], at: npt.NDArray[np.int64] | None = None) -> None:
        """Raise UserError for a value that is not finite, or becomes infinite in the dtype of `fetch`.

        at: positions of these samples among the resident ones; None: all.
        """
        at = np.arange(len(values)) if at is None else at
        # The sum of a row with a value that is not finite is not finite either; only such rows need a closer look.
        with np.errstate(over="ignore", invalid="ignore"):
            suspects = np.flatnonzero(~np.isfinite(values.sum(axis=1)))
        for row in map(int, suspects):
            if not np.isfinite(values[row]).all():
                raise self._not_finite(split, int(at[row]))
        most = float(np.finfo(self._dtype).max)
        if values.dtype.itemsize > self._dtype.itemsize and max(values.max(initial=0), -values.min(initial=0)) > most:
            raise self._too_large(split, int(at[np.flatnonzero((np.abs(values) > most).any(axis=1))[0]]))

    def _check_entries(self, split: Split, stored: Compressed, kept: Compressed) -> None:
        """Raise UserError as `_check_finite`, for compressed rows `stored` in the file and `kept` in the dtype."""
        wrong = np.flatnonzero(~np.isfinite(kept.values))
        if len(wrong):
            row = kept.row_of(int(wrong[0]))
            raise (self._too_large if np.isfinite(stored.values[wrong[0]]) else self._not_finite)(split, row)

    def _not_finite(self, split: Split, row: int) -> UserError:
        return UserError(
            f"{self._name(split, row)} has values that are not finite numbers; correct or remove such samples"
        )

    def _too_large(self, split: Split, row: int) -> UserError:
        return UserError(
            f"{self._name(split, row)} has values beyond {np.finfo(self._dtype).max:.2g}, infinite in {self._dtype}; "
            "scale the samples, or train with --dtype float64"
        )

    def _largest_token(self, split: Split, values: npt.NDArray[Any]) -> int:
        """The largest token; UserError for a token that is negative, too large, or not exact in the dtype."""
        most = min(MAX_TOKENS, 1 << np.finfo(self._dtype).nmant)
        wrong = np.flatnonzero(((values < 0) | (values >= most)).any(axis=1))
        if len(wrong):
            row = int(wrong[0])
            bad = values[row][(values[row] < 0) | (values[row] >= most)][0]
            raise UserError(
                f"{self._name(split, row)} has the token {bad}; expected 0 to {most - 1}: number the tokens from 0"
            )
        return int(values.max(initial=-1))

    def _name(self, split: Split, row: int) -> str:
        number = self._rows[row] if split.index is None else split.index[self._rows[row]]
        return split.source.place(int(number))

    @property
    def nbytes(self) -> int:
        """Bytes of samples, their ids and scratch memory, without the targets, which belong to the split."""
        return int(self._samples.nbytes + self._rows.nbytes + self._room.nbytes)

    def fetch(self, ids: npt.ArrayLike, out: npt.NDArray[Any]) -> None:
        """Fill `out` with the scaled and augmented samples `ids`, (b,) integers in any order, repetitions allowed.

        out: (features, b), C-contiguous, of the dtype given to the constructor. ValueError for another `out` and for
        ids that are not resident.
        """
        at = self._positions(ids)
        count, features = len(at), self._features
        if out.shape != (features, count) or out.dtype != self._dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out has to be C-contiguous {self._dtype} {(features, count)}, "
                f"not {'' if out.flags.c_contiguous else 'strided '}{out.dtype} {out.shape}"
            )
        if self._augmentation is None or not count:
            self._samples.fetch(at, out)
            return
        if self._room.size < out.size:
            self._room = self._ops.empty(out.size, self._dtype)
        plain = self._room[: out.size].reshape(out.shape)
        self._samples.fetch(at, plain)
        self._augmentation.apply(self._rows[at], self._ops, plain, out)

    def rows(self, ids: npt.ArrayLike) -> Compressed:
        """The sparse samples `ids` (b,) as compressed rows, in this order; ValueError if dense or not resident."""
        if self.compressed is None:
            raise ValueError("these samples are dense and have no compressed rows")
        return self.compressed.take(self._positions(ids))

    def batch(self, ids: npt.NDArray[np.int64], room: npt.NDArray[Any]) -> Batch:
        """A batch of the samples `ids` (b,) with inputs and targets; the inputs fill the beginning of vector `room`."""
        inputs = room[: self._features * len(ids)].reshape(self._features, len(ids))
        self.fetch(ids, inputs)
        return Batch(ids, inputs, self.targets(ids), self.lengths(ids))

    def lengths(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32] | None:
        """The steps of the sequences `ids`, (b,) int32; None if all have the same."""
        return None if self._lengths is None else self._lengths[ids]

    def targets(self, ids: npt.ArrayLike) -> npt.NDArray[Any]:
        """The targets of the samples `ids`, resident or not: labels (b,) int64, or values (outputs, b) float64.

        For sequences with a target at each step the shape is (steps, b) or (outputs, steps, b). IndexError unless ids
        are in 0..split.n-1.
        """
        return batch_targets(self._targets, ids)

    def _positions(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        vector = np.asarray(ids)
        if vector.ndim != 1 or (vector.size and vector.dtype.kind not in "iu"):
            raise ValueError(f"ids have to be a vector of integers, not {vector.dtype} of shape {vector.shape}")
        wanted = vector.astype(np.int64, copy=False)
        at = np.searchsorted(self._rows, wanted)
        if wanted.size:
            is_resident = np.zeros(len(wanted), bool)
            inside = at < len(self._rows)
            is_resident[inside] = self._rows[at[inside]] == wanted[inside]
            if not is_resident.all():
                raise ValueError(
                    f"{np.count_nonzero(~is_resident)} ids are not resident, the first being {wanted[~is_resident][0]}"
                )
        return at


def _some(split: Split, rows: npt.NDArray[np.int64], features: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Read the values `features` of the samples `rows` in one pass: (rows, features)."""
    selected = np.empty((len(rows), len(features)), split.dtype)
    for i, values in split.pieces(rows):
        selected[i : i + len(values)] = values[:, features]
    return selected
