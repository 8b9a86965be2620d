"""Products with sparse matrices in C."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from psmpi.backend.compiled.library import function, pointers
from psmpi.backend.compiled.team import Team
from psmpi.backend.reference.sparse import SparseIndex, SparseProduct

# Number of multiplications for each thread, below which fewer threads are used.
WORK = 500_000


class CompiledSparseProduct(SparseProduct):
    """Sparse products by rows (forward) and by columns (backward), in blocks of samples: see c/sparse.h.

    Threads share the rows or the columns; results do not depend on the number of threads.
    """

    def __init__(self, index: SparseIndex, dtype: np.dtype, instructions: int, team: Team):
        super().__init__(index)
        self.dtype, self.team = np.dtype(dtype), team
        self._forward = function("sparse_forward", self.dtype, "nnnppppppp", instructions)
        self._backward = function("sparse_backward", self.dtype, "nnnpppppppp", instructions)
        self._biases = function("sparse_biases", self.dtype, "nnppp", instructions)
        wide, narrow = np.dtype(np.int64), np.dtype(np.int32)
        self._biased = None if index.biases is None else pointers(wide, index.biases)[0]
        (columns,), back = pointers(narrow, index.columns), pointers(narrow, index.back_rows, index.back_places)
        starts, places, back_starts = pointers(wide, index.starts, index.places, index.back_starts)
        self._rows, self._columns = (starts, columns, places, self._biased), (back_starts, *back)

    def forward(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        self._check(x, y)
        arrays = *self._rows, *pointers(self.dtype, w, x, y)
        self._share(self._forward, self.index.starts, x.shape[1], arrays)

    def backward(
        self, w: np.ndarray, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, g: np.ndarray | None
    ) -> None:
        self._check(x, dy)
        wanted = tuple(None if one is None else pointers(self.dtype, one)[0] for one in (dx, g))
        if dx is not None:
            self._check(dx, dy)
        if g is not None and self._biased is not None:
            self._biases(*dy.shape, self._biased, *pointers(self.dtype, dy, g))
        if wanted != (None, None):
            arrays = *self._columns, *pointers(self.dtype, w, x, dy), *wanted
            self._share(self._backward, self.index.back_starts, x.shape[1], arrays)

    def _share(self, call: Callable[..., None], starts: np.ndarray, batch: int, arrays: tuple[int | None, ...]) -> None:
        """Call a kernel on as many threads as the work is worth, each with about the same number of entries."""
        rows, entries = len(starts) - 1, int(starts[-1])
        members = min(self.team.size, max(1, entries * batch // WORK), rows)
        if members == 1:
            call(0, rows, batch, *arrays)
            return
        inner = np.searchsorted(starts, [entries * k // members for k in range(1, members)]).tolist()
        edges = [0, *inner, rows]
        self.team.run(lambda k: call(edges[k], edges[k + 1], batch, *arrays), members)

    def _check(self, x: np.ndarray, y: np.ndarray) -> None:
        if x.shape[0] != self.index.inputs or y.shape != (self.index.rows, x.shape[1]):
            raise ValueError(
                f"a sparse matrix ({self.index.rows}, {self.index.inputs}) cannot be multiplied with x {x.shape} into "
                f"y {y.shape}"
            )
