"""Copies of runs and rows, mirrors in host memory, and minibatches of samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class RunCopies:
    """A reusable copy, or addition, of runs of one vector into another.

    table: (runs, 3) int64, source, target and length of each run. Targets may overlap: `add` then adds every run.
    """

    def __init__(self, table: np.ndarray):
        self.table = np.ascontiguousarray(table, np.int64)
        ends = np.cumsum(self.table[:, 2])
        inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - self.table[:, 2], self.table[:, 2])
        self.source = np.repeat(self.table[:, 0], self.table[:, 2]) + inside
        self.target = np.repeat(self.table[:, 1], self.table[:, 2]) + inside

    def copy(self, values: np.ndarray, out: np.ndarray) -> None:
        """Copy the runs of `values` to `out`; both contiguous, of any shape and one dtype."""
        out.reshape(-1)[self.target] = values.reshape(-1)[self.source]

    def add(self, values: np.ndarray, out: np.ndarray) -> None:
        """Add the runs of `values` to `out`."""
        np.add.at(out.reshape(-1), self.target, values.reshape(-1)[self.source])

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in vars(self).values() if isinstance(a, np.ndarray))


class RowCopies:
    """A reusable copy, or addition, of rows of arrays (rows, b), for any b.

    source, target: (k,) row numbers. Source rows may repeat; target rows may repeat in `add`.
    """

    def __init__(self, source: np.ndarray, target: np.ndarray):
        source, target = (np.asarray(rows, np.int64) for rows in (source, target))
        # Whether no target row repeats.
        self.distinct_targets = len(np.unique(target)) == len(target)
        self.source, self.target = _side_by_side(source), _side_by_side(target)

    def copy(self, values: np.ndarray, out: np.ndarray) -> None:
        """out[target[k]] = values[source[k]] for each k."""
        out[self.target] = values[self.source]

    def add(self, values: np.ndarray, out: np.ndarray) -> None:
        """out[target[k]] += values[source[k]] for each k."""
        if self.distinct_targets:
            out[self.target] += values[self.source]
        elif isinstance(self.target, np.ndarray):
            np.add.at(out, self.target, values[self.source])

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in (self.source, self.target) if isinstance(rows, np.ndarray))


def _side_by_side(rows: np.ndarray) -> np.ndarray | slice:
    """Row numbers as a slice if they are consecutive."""
    if len(rows) and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


class RowRuns(RowCopies):
    """`RowCopies` by a backend's copies of runs. make: the backend's `run_copies`."""

    def __init__(self, source: np.ndarray, target: np.ndarray, make: Callable[[np.ndarray], RunCopies]):
        source, target = (np.asarray(rows, np.int64) for rows in (source, target))
        breaks = np.flatnonzero((np.diff(source, prepend=-2) != 1) | (np.diff(target, prepend=-2) != 1))
        self.runs = np.stack([source[breaks], target[breaks], np.diff(breaks, append=len(source))], axis=1)
        self.make = make
        self.by_width: dict[int, RunCopies] = {}

    def copy(self, values: np.ndarray, out: np.ndarray) -> None:
        self._of(out).copy(values, out)

    def add(self, values: np.ndarray, out: np.ndarray) -> None:
        self._of(out).add(values, out)

    def _of(self, out: np.ndarray) -> RunCopies:
        width = out.shape[-1]
        if width not in self.by_width:
            self.by_width[width] = self.make(self.runs * width)
        return self.by_width[width]

    @property
    def nbytes(self) -> int:
        return int(self.runs.nbytes) + sum(made.nbytes for made in self.by_width.values())


class Mirror:
    """An array of a backend and its image `host` in host memory; for arrays in host memory the two are the same.

    `host` has the shape and dtype of the array and a fixed address. `fetch` starts a copy of the array to `host` and
    `wait` waits for its end. `push` starts a copy of `host` to the array, before any later operation on the array;
    after `settle` the caller may write to `host` again.
    """

    def __init__(self, array: np.ndarray):
        self.array = self.host = array

    def fetch(self, at: slice = slice(None)) -> None:
        """Start a copy of the array, or of the slice `at` of a vector, to `host`."""

    def wait(self) -> None:
        """Wait until the fetched values are in `host`."""

    def push(self, at: slice = slice(None)) -> None:
        """Start a copy of `host`, or of the slice `at` of a vector, to the array. `host` stays fixed until `settle`."""

    def settle(self) -> None:
        """Wait until the copy of `host` is complete."""


class CompressedSamples:
    """Sparse samples as compressed rows, from which dense minibatches are made.

    starts: (n + 1,) int64; columns: (entries,) int32; values: (entries,). Sample r has the entries starts[r] to
    starts[r + 1] - 1.
    """

    def __init__(self, starts: np.ndarray, columns: np.ndarray, values: np.ndarray, features: int):
        self.starts, self.columns, self.values, self.features = starts, columns, values, features

    @property
    def nbytes(self) -> int:
        return int(self.starts.nbytes + self.columns.nbytes + self.values.nbytes)

    def fetch(self, at: np.ndarray, out: np.ndarray) -> None:
        """out (features, b) = the samples at positions `at` (b,) int64, zero where they have no entry."""
        out.fill(0)
        for column, row in enumerate(at):
            entries = slice(self.starts[row], self.starts[row + 1])
            out[self.columns[entries], column] = self.values[entries]


class Samples:
    """Samples (n, features), from which minibatches are taken and multiplied by a scale."""

    def __init__(self, values: np.ndarray, scale: float):
        self.values, self.scale = values, scale
        self.scratch = np.empty((0, values.shape[1]), values.dtype)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scratch.nbytes

    def fetch(self, at: np.ndarray, out: np.ndarray) -> None:
        """out (features, b) = the scaled samples at positions `at` (b,) int64, whose range is not checked."""
        if len(at) > len(self.scratch):
            self.scratch = np.empty((len(at), self.values.shape[1]), self.values.dtype)
        taken = self.scratch[: len(at)]
        # With mode "raise" NumPy would buffer the output.
        np.take(self.values, at, axis=0, out=taken, mode="clip")
        np.multiply(taken.T, out.dtype.type(self.scale), out=out, dtype=out.dtype, casting="same_kind")
