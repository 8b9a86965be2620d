"""Matrix products, look-ups, convolutions, recurrences, windows, and folding of pooling into kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend.reference.convolution import Convolution, Im2col, Stripes
from psmpi.backend.reference.pointwise import Pointwise
from psmpi.backend.reference.recurrence import Recurrence
from psmpi.backend.reference.sparse import SparseIndex, SparseProduct


class Products(Pointwise):
    """Matrix products, and the factories of convolutions, recurrences and sparse products."""

    # BLAS kernels may raise floating point flags for unused vector lanes; psmpi checks results instead.
    @np.errstate(all="ignore")
    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        """out = a @ b over the last two axes; leading axes are batched."""
        np.matmul(a, b, out=out)

    def look_up(self, table: np.ndarray, tokens: np.ndarray, out: np.ndarray) -> None:
        """out (units, n) = the columns of table (units, vocabulary) at tokens (n,), integers in the dtype of table."""
        out[...] = table[:, whole(tokens)]

    def add_up(self, tokens: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
        """The adjoint of `look_up`: column t of out (units, vocabulary) = the sum of values' columns with token t."""
        out.fill(0)
        add_columns(whole(tokens), values, out)

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
        """Return a reusable convolution from images (channels, height, width) to (units, rows, columns).

        activation: identity, sigmoid, tanh or relu, applied by `forward`.
        """
        return Im2col(stripes, in_shape, out_shape, kernel, stride, dtype, activation, ops=self)

    def recurrence(self, kind: str, units: int, dtype: np.dtype) -> Recurrence:
        """Return a reusable layer of recurrent cells. kind: rnn (tanh), gru or lstm."""
        return Recurrence(kind, units, dtype, self)

    def sparse_product(self, index: SparseIndex, dtype: np.dtype) -> SparseProduct:
        """Return a reusable product with a sparse matrix of the pattern `index`."""
        return SparseProduct(index)

    def im2col(self, x: np.ndarray, stride: int, first: int, cols: np.ndarray) -> None:
        """Copy the windows of x (c, h, w, b) for the output rows from `first` on.

        cols: (c, k, k, rows, width, b); cols[:, i, j] are the inputs that kernel entry (i, j) multiplies.
        """
        k, rows, width = cols.shape[1], cols.shape[3], cols.shape[4]
        for i in range(k):
            top = first * stride + i
            for j in range(k):
                cols[:, i, j] = x[:, top : top + stride * rows : stride, j : j + stride * width : stride]

    def col2im(self, cols: np.ndarray, stride: int, first: int, dx: np.ndarray) -> None:
        """The adjoint of `im2col`: add cols (c, k, k, rows, width, b) to dx (c, h, w, b)."""
        k, rows, width = cols.shape[1], cols.shape[3], cols.shape[4]
        for i in range(k):
            top = first * stride + i
            for j in range(k):
                dx[:, top : top + stride * rows : stride, j : j + stride * width : stride] += cols[:, i, j]

    def fold(self, w: np.ndarray, pool: int, out: np.ndarray) -> None:
        """Fold pool x pool mean pooling into kernels: w (..., k, k) -> out (..., k+pool-1, k+pool-1).

        The mean of pool x pool shifted correlations with w equals one correlation with w convolved with a box.
        """
        k = w.shape[-1]
        if pool == 1:
            out[...] = w
            return
        out.fill(0)
        for i in range(pool):
            for j in range(pool):
                out[..., i : i + k, j : j + k] += w
        out *= 1 / pool**2

    def unfold(self, dfolded: np.ndarray, pool: int, out: np.ndarray) -> None:
        """The adjoint of `fold`: out (..., k, k) from dfolded (..., k+pool-1, k+pool-1)."""
        k = out.shape[-1]
        if pool == 1:
            out[...] = dfolded
            return
        out.fill(0)
        for i in range(pool):
            for j in range(pool):
                out += dfolded[..., i : i + k, j : j + k]
        out *= 1 / pool**2


def whole(tokens: np.ndarray) -> np.ndarray:
    """Tokens of a floating point dtype as int64."""
    numbers: np.ndarray = np.rint(tokens).astype(np.int64)
    return numbers


def add_columns(at: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """out[:, t] = the sum of the columns of values where at (n,) is t; other columns of out keep their values."""
    order = at.argsort(kind="stable")
    columns, firsts = np.unique(at[order], return_index=True)
    out[:, columns] = np.add.reduceat(values[:, order], firsts, axis=1)
