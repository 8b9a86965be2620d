"""Moves of values: runs of vectors, images in host memory, samples."""

from __future__ import annotations

import numpy as np


class RunCopies:
    """Runs of one vector that are copied into another, or added, again and again.

    table: (runs, 3) int64, from, to and length of each; the runs of one target may overlap, and then count one by one.
    """

    def __init__(self, table: np.ndarray):
        self.table = np.ascontiguousarray(table, np.int64)
        ends = np.cumsum(self.table[:, 2])
        inside = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - self.table[:, 2], self.table[:, 2])
        self.source = np.repeat(self.table[:, 0], self.table[:, 2]) + inside
        self.target = np.repeat(self.table[:, 1], self.table[:, 2]) + inside

    def copy(self, values: np.ndarray, out: np.ndarray) -> None:
        """out[to ...] = values[from ...]; both contiguous, of any shape, and one dtype."""
        out.reshape(-1)[self.target] = values.reshape(-1)[self.source]

    def add(self, values: np.ndarray, out: np.ndarray) -> None:
        """out[to ...] += values[from ...]."""
        np.add.at(out.reshape(-1), self.target, values.reshape(-1)[self.source])

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in vars(self).values() if isinstance(a, np.ndarray))


class Mirror:
    """An array of a backend and its image in host memory, which here are one.

    `host` has the shape and dtype of the array, and keeps its address. `fetch` begins to bring it up to date, `wait`
    ends when it is; `push` sends it to the array, for the operations that follow; `settle` ends when it may be written.
    """

    def __init__(self, array: np.ndarray):
        self.array = self.host = array

    def fetch(self, at: slice = slice(None)) -> None:
        """Begin to copy the array, or this piece of a vector, to `host`."""

    def wait(self) -> None:
        """Wait until what was fetched is there."""

    def push(self, at: slice = slice(None)) -> None:
        """Copy `host`, or this piece of a vector, to the array; it is not to be written before `settle`."""

    def settle(self) -> None:
        """Wait until `host` has been copied."""


class CompressedSamples:
    """Sparse samples, compressed rows, of which dense minibatches are made.

    starts: (n + 1,) int64; columns: (entries,) int32; values: (entries,), those of sample r from starts[r] to
    starts[r + 1].
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
    """Samples (n, features) of which minibatches are taken, multiplied by a scale."""

    def __init__(self, values: np.ndarray, scale: float):
        self.values, self.scale = values, scale
        self.scratch = np.empty((0, values.shape[1]), values.dtype)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scratch.nbytes

    def fetch(self, at: np.ndarray, out: np.ndarray) -> None:
        """out (features, b) = the scaled samples at positions `at` (b,) int64, which are not checked."""
        if len(at) > len(self.scratch):
            self.scratch = np.empty((len(at), self.values.shape[1]), self.values.dtype)
        taken = self.scratch[: len(at)]
        # Any mode but "raise" saves numpy a buffer for the result.
        np.take(self.values, at, axis=0, out=taken, mode="clip")
        np.multiply(taken.T, out.dtype.type(self.scale), out=out, dtype=out.dtype, casting="same_kind")
