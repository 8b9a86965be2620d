"""Products of matrices, convolutions, recurrences, and kernels that are folded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend.reference.convolution import Convolution, Im2col, Stripes
from psmpi.backend.reference.pointwise import Pointwise
from psmpi.backend.reference.recurrence import Recurrence
from psmpi.backend.reference.sparse import SparseIndex, SparseProduct


class Products(Pointwise):
    """Convolutions end with an activation."""

    # A BLAS kernel may raise a flag for lanes that it throws away; what is not finite is found in results.
    @np.errstate(all="ignore")
    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        """out = a @ b over the last two axes, the others batched."""
        np.matmul(a, b, out=out)

    def look_up(self, table: np.ndarray, tokens: np.ndarray, out: np.ndarray) -> None:
        """out (units, n) = the columns of table (units, vocabulary) at the tokens (n,), whole numbers of its dtype."""
        out[...] = table[:, whole(tokens)]

    def add_up(self, tokens: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
        """The adjoint of `look_up`: out (units, vocabulary) = for each token the sum of its columns of values."""
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
        """A convolution of (channels, height, width) to (units, rows, columns) images, to be used again and again."""
        return Im2col(stripes, in_shape, out_shape, kernel, stride, dtype, activation, ops=self)

    def recurrence(self, kind: str, units: int, dtype: np.dtype) -> Recurrence:
        """A layer of recurrent cells, rnn (tanh), gru or lstm, to be used again and again."""
        return Recurrence(kind, units, dtype, self)

    def sparse_product(self, index: SparseIndex, dtype: np.dtype) -> SparseProduct:
        """A product with a sparse matrix, to be used again and again."""
        return SparseProduct(index)

    def im2col(self, x: np.ndarray, stride: int, first: int, cols: np.ndarray) -> None:
        """Windows of x (c, h, w, b) with the given stride, for the output rows from `first` on.

        cols: (c, k, k, rows, width, b); cols[:, i, j] are the inputs that kernel entry (i, j) meets.
        """
        k, rows, width = cols.shape[1], cols.shape[3], cols.shape[4]
        for i in range(k):
            top = first * stride + i
            for j in range(k):
                cols[:, i, j] = x[:, top : top + stride * rows : stride, j : j + stride * width : stride]

    def col2im(self, cols: np.ndarray, stride: int, first: int, dx: np.ndarray) -> None:
        """The adjoint of im2col: adds cols into dx."""
        k, rows, width = cols.shape[1], cols.shape[3], cols.shape[4]
        for i in range(k):
            top = first * stride + i
            for j in range(k):
                dx[:, top : top + stride * rows : stride, j : j + stride * width : stride] += cols[:, i, j]

    def fold(self, w: np.ndarray, pool: int, out: np.ndarray) -> None:
        """A kernel followed by pool x pool mean pooling as one kernel: w (..., k, k) -> out (..., k+pool-1, k+pool-1).

        The mean of `pool` x `pool` shifted correlations is the correlation with the kernel smoothed by a box.
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
        """The adjoint of fold."""
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
    """Tokens as int64."""
    numbers: np.ndarray = np.rint(tokens).astype(np.int64)
    return numbers


def add_columns(at: np.ndarray, values: np.ndarray, out: np.ndarray) -> None:
    """out[:, t] = the sum of the columns of values where at (n,) is t, for each t that is there."""
    order = at.argsort(kind="stable")
    columns, firsts = np.unique(at[order], return_index=True)
    out[:, columns] = np.add.reduceat(values[:, order], firsts, axis=1)
