"""Matrix products by cuBLAS, convolutions and recurrences, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.backend.gpu.blas import Blas
from psmpi.backend.gpu.convolution import DeviceConvolution, DeviceWindows
from psmpi.backend.gpu.cudnn import ChosenConvolution, Cudnn, groups
from psmpi.backend.gpu.pointwise import DevicePointwise
from psmpi.backend.gpu.recurrence import DeviceRecurrence
from psmpi.backend.gpu.sparse import DeviceSparseProduct
from psmpi.backend.gpu.trial import ConvolutionShape
from psmpi.backend.reference.convolution import Convolution, Stripes
from psmpi.backend.reference.products import add_columns, whole
from psmpi.backend.reference.recurrence import Recurrence
from psmpi.backend.reference.sparse import SparseIndex, SparseProduct


class DeviceProducts(DevicePointwise):
    """Matrix products by `blas`, and convolutions by psmpi's kernels or, where it is chosen, by `cudnn`."""

    blas: Blas
    cudnn: Cudnn | None

    def look_up(self, table: Any, tokens: Any, out: Any) -> None:
        """Look up on the host, where the tokens come from; see the reference."""
        out[...] = self.put(np.ascontiguousarray(self.host(table)[:, whole(self.host(tokens))]))

    def add_up(self, tokens: Any, values: Any, out: Any) -> None:
        made = np.zeros(out.shape, out.dtype)
        add_columns(whole(self.host(tokens)), self.host(values), made)
        out[...] = self.put(made)

    def matmul(self, a: Any, b: Any, out: Any) -> None:
        if out.size == 0:
            return
        if out.ndim == 2:
            a, b, out = a[None], b[None], out[None]
        if out.ndim == 3:
            self.blas.product(a, b, out, self.compute)
            return
        # All matrices a[:, k] have the same factor b[k]: a stride of 0 repeats it.
        for k in range(out.shape[1]):
            same = self.cupy.lib.stride_tricks.as_strided(b[k], (len(out), *b.shape[1:]), (0, *b.strides[1:]))
            self.blas.product(a[:, k], same, out[:, k], self.compute)

    def convolution(
        self,
        stripes: Sequence[Stripes],
        in_shape: tuple[int, int, int],
        out_shape: tuple[int, int, int],
        kernel: int,
        stride: int,
        dtype: np.dtype,
        activation: str = "identity",
    ) -> Convolution:
        own: Convolution
        if self.compute != "float32" and dtype == np.float32:
            # Tensor cores compute matrix products only.
            own = DeviceWindows(stripes, in_shape, out_shape, kernel, stride, dtype, activation, ops=self)
        else:
            own = DeviceConvolution(self, stripes, in_shape, out_shape, kernel, stride, dtype, activation)
        count = groups(stripes, in_shape[0], out_shape[0])
        if self.cudnn is None or not count:
            return own
        shape = ConvolutionShape(in_shape, out_shape, count, kernel, stride, activation, np.dtype(dtype))
        return ChosenConvolution(own, self.cudnn, shape)

    def recurrence(self, kind: str, units: int, dtype: np.dtype) -> Recurrence:
        return DeviceRecurrence(kind, units, dtype, self)

    def sparse_product(self, index: SparseIndex, dtype: np.dtype) -> SparseProduct:
        return DeviceSparseProduct(index, dtype, self)

    def im2col(self, x: Any, stride: int, first: int, cols: Any) -> None:
        _, k, _, rows, width, b = cols.shape
        self.spread("im2col", x.dtype, cols.size, *x.shape[:3], b, k, stride, first, rows, width, x, cols)

    def col2im(self, cols: Any, stride: int, first: int, dx: Any) -> None:
        _, k, _, rows, width, b = cols.shape
        self.spread("col2im", dx.dtype, dx.size, *dx.shape[:3], b, k, stride, first, rows, width, cols, dx)

    def fold(self, w: Any, pool: int, out: Any) -> None:
        count, rows, n_in, k, _ = w.shape
        steps = (stride // w.itemsize for stride in w.strides[:2])
        self.spread("fold", w.dtype, out.size, count, rows, n_in, k, pool, w, *steps, out)

    def unfold(self, dfolded: Any, pool: int, out: Any) -> None:
        count, rows, n_in, k, _ = out.shape
        steps = (stride // out.itemsize for stride in out.strides[:2])
        self.spread("unfold", out.dtype, out.size, count, rows, n_in, k, pool, dfolded, out, *steps)
