"""Recurrent cells on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.backend.reference.recurrence import Recurrence

# Numbers of the kinds of cells in the kernels.
KINDS = {"rnn": 0, "gru": 1, "lstm": 2}


class DeviceRecurrence(Recurrence):
    """`Recurrence` by a matrix product and a kernel of cuda/recurrence.cu for each step.

    The buffers are the products and their gradients.
    """

    ops: Any

    def __init__(self, kind: str, units: int, dtype: np.dtype, ops: Any):
        super().__init__(kind, units, dtype, ops)
        # Buffers of products by their number of rows.
        self.products: dict[int, Any] = {}
        self.du: Any = ops.empty(0, self.dtype)

    def arrays(self) -> list[Any]:
        return [*self.products.values(), self.du]

    def _product(self, weights: Any, values: Any) -> Any:
        rows, b = len(weights), values.shape[1]
        if rows not in self.products or self.products[rows].size < rows * b:
            self.products[rows] = self.ops.empty(rows * b, self.dtype)
        out = self.products[rows][: rows * b].reshape(rows, b)
        self.ops.matmul(weights, values, out)
        return out

    def _step(self, t: int, a: Any, bias: Any, product: Any, before: Any, h: Any, more: Any, lengths: Any) -> None:
        units, steps, b = h.shape
        arrays = (a, _given(bias), product, before, h, _given(more), _given(lengths))
        self.ops.spread("cell_step", self.dtype, units * b, KINDS[self.kind], units, steps, b, t, *arrays)

    def _step_back(self, t: int, a: Any, before: Any, h: Any, more: Any, dh: Any, carry: Any, lengths: Any) -> Any:
        (units, steps, b), rows = h.shape, len(a)
        if self.du.size < rows * b:
            self.du = self.ops.empty(rows * b, self.dtype)
        du = self.du[: rows * b].reshape(rows, b)
        arrays = (a, before, h, _given(more), dh, carry, _given(lengths), du)
        self.ops.spread("cell_step_back", self.dtype, units * b, KINDS[self.kind], units, steps, b, t, *arrays)
        return du


def _given(array: Any) -> Any:
    """The argument of a kernel for an optional array: 0 if it is None or empty."""
    return 0 if array is None or array.size == 0 else array
