"""U_e of many elements at once: rows of their variables out of a vector, and back with addition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend import NumpyOps


class Restriction:
    """U_e of many elements: an element's variables are runs of a vector, one after the other in its row.

    runs: for each element its (start, stop) in the vector. Rows are of `size`; behind elements that are smaller nothing
    is written. sizes: (elements,) int64; starts: (elements + 1,) int64, each element's first row of the table of
    `down`. Vectors and rows are arrays of `ops`.
    """

    def __init__(self, runs: Sequence[Sequence[tuple[int, int]]], size: int, ops: NumpyOps):
        self.sizes = np.array([sum(b - a for a, b in mine) for mine in runs], np.int64)
        self.size, self.ops = size, ops
        # Room for one row of each element, twice, by dtype.
        self.scratch: dict[np.dtype, tuple[np.ndarray, np.ndarray]] = {}
        self.starts = np.cumsum([0, *(len(mine) for mine in runs)])
        table = []
        for e, mine in enumerate(runs):
            at = e * self.size
            for start, stop in mine:
                table.append((start, at, stop - start))
                at += stop - start
        self.down = ops.run_copies(np.array(table, np.int64).reshape(-1, 3))
        self.up = ops.run_copies(self.down.table[:, [1, 0, 2]])

    def restrict(self, vector: np.ndarray, out: np.ndarray) -> None:
        """out (elements, size) = U_e vector for every element."""
        self.down.copy(vector, out)

    def accumulate(self, values: np.ndarray, out: np.ndarray) -> None:
        """out (vector) = sum_e U_e^T values_e, values (elements, size)."""
        out.fill(0)
        self.up.add(values, out)

    def rows(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Two scratch arrays (elements, size); what `restrict` does not fill of the first stays 0."""
        if dtype not in self.scratch:
            count = len(self.sizes)
            first, second = (self.ops.zeros(count * self.size, dtype).reshape(count, self.size) for _ in range(2))
            self.scratch[dtype] = first, second
        return self.scratch[dtype]

    @property
    def nbytes(self) -> int:
        own = self.sizes.nbytes + self.starts.nbytes + self.down.nbytes + self.up.nbytes
        return int(own + sum(array.nbytes for pair in self.scratch.values() for array in pair))
