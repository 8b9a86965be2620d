"""Restriction U_e of many elements at once: a vector's variables to rows, and back with addition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend import NumpyOps


class Restriction:
    """U_e of many elements: the variables of an element are runs of a vector, one after the other in the element's row.

    runs: the (start, stop) of each element in the vector. size: length of a row; the rest of the row of a smaller
    element is not written. sizes: (elements,) int64, number of variables; starts: (elements + 1,) int64, each element's
    first row in `down.table`. Vectors and rows are arrays of `ops`.
    """

    def __init__(self, runs: Sequence[Sequence[tuple[int, int]]], size: int, ops: NumpyOps):
        self.sizes = np.array([sum(b - a for a, b in element_runs) for element_runs in runs], np.int64)
        self.size, self.ops = size, ops
        # Two arrays (elements, size) by dtype.
        self.scratch: dict[np.dtype, tuple[np.ndarray, np.ndarray]] = {}
        self.starts = np.cumsum([0, *(len(element_runs) for element_runs in runs)])
        table = []
        for e, element_runs in enumerate(runs):
            at = e * self.size
            for start, stop in element_runs:
                table.append((start, at, stop - start))
                at += stop - start
        self.down = ops.run_copies(np.array(table, np.int64).reshape(-1, 3))
        self.up = ops.run_copies(self.down.table[:, [1, 0, 2]])

    def restrict(self, vector: np.ndarray, out: np.ndarray) -> None:
        """Compute out_e = U_e vector for every element; out: (elements, size)."""
        self.down.copy(vector, out)

    def accumulate(self, values: np.ndarray, out: np.ndarray) -> None:
        """Compute the vector out = sum_e U_e^T values_e; values: (elements, size)."""
        out.fill(0)
        self.up.add(values, out)

    def rows(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Return two scratch arrays (elements, size); elements of the first that `restrict` does not write stay 0."""
        if dtype not in self.scratch:
            count = len(self.sizes)
            first, second = (self.ops.zeros(count * self.size, dtype).reshape(count, self.size) for _ in range(2))
            self.scratch[dtype] = first, second
        return self.scratch[dtype]

    @property
    def nbytes(self) -> int:
        own = self.sizes.nbytes + self.starts.nbytes + self.down.nbytes + self.up.nbytes
        return int(own + sum(array.nbytes for pair in self.scratch.values() for array in pair))
