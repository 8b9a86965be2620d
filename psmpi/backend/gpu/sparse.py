"""Products with sparse matrices on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from psmpi.backend.gpu.grids import BLOCKS
from psmpi.backend.reference.sparse import SparseIndex, SparseProduct

# Threads of a block that computes a sum, and number of blocks that share the entries of a column.
THREADS, SHARES = 32, 8


class DeviceSparseProduct(SparseProduct):
    """Sparse products by the kernels of cuda/sparse.cu. The buffers are the index on the device."""

    def __init__(self, index: SparseIndex, dtype: Any, ops: Any):
        super().__init__(index)
        self.dtype, self.ops = dtype, ops
        names = ("starts", "columns", "places", "back_starts", "back_rows", "back_places")
        self.device_index = replace(index, **{name: ops.put(getattr(index, name)) for name in names})
        if index.biases is not None:
            self.device_index = replace(self.device_index, biases=ops.put(index.biases))

    def arrays(self) -> list[Any]:
        return self.device_index.arrays

    def forward(self, w: Any, x: Any, y: Any) -> None:
        one = self.device_index
        biases = 0 if one.biases is None else one.biases
        index = one.starts, one.columns, one.places, biases
        self.ops.spread("sparse_forward", self.dtype, y.size, *y.shape, *index, w, x, y)

    def backward(self, w: Any, x: Any, dy: Any, dx: Any | None, g: Any | None) -> None:
        one = self.device_index
        index = one.back_starts, one.back_rows, one.back_places
        if dx is not None:
            self.ops.spread("sparse_inputs", self.dtype, dx.size, *dx.shape, *index, w, dy, dx)
        if g is not None:
            grid = min(one.inputs, 16 * BLOCKS), SHARES
            self.ops.launch("sparse_weights", self.dtype, grid, (THREADS,), *x.shape, *index, x, dy, g)
            if one.biases is not None:
                rows = min(one.rows, 16 * BLOCKS)
                self.ops.launch("sparse_biases", self.dtype, (rows,), (THREADS,), *dy.shape, one.biases, dy, g)
