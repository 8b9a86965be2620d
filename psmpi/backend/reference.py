"""The NumPy operations, written to be obviously right.

Activations keep the minibatch last: an image array is (channels, height, width, batch), a feature array (features,
batch). So a class's channels, features and scores are contiguous rows, flattening is a reshape, and every copy below
runs along the batch. All arrays of one call share one dtype, float32 or float64.
"""

from __future__ import annotations

import numpy as np


class NumpyOps:
    name = "numpy"

    def empty(self, size: int, dtype: np.dtype) -> np.ndarray:
        return np.empty(size, dtype)

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        """out = a @ b over the last two axes, the others batched."""
        np.matmul(a, b, out=out)

    def add_bias(self, y: np.ndarray, bias: np.ndarray) -> None:
        """y (count, n, anything) += bias (count, n), in place."""
        y += bias[:, :, None]

    def row_sums(self, y: np.ndarray, out: np.ndarray) -> None:
        """out (...,) = y (..., n) summed over its last axis."""
        np.sum(y, axis=-1, out=out)

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

    def _windows(self, x: np.ndarray, size: int, like: np.ndarray) -> list[np.ndarray]:
        h, w = like.shape[1] * size, like.shape[2] * size
        return [x[:, i:h:size, j:w:size] for i in range(size) for j in range(size)]

    def mean_pool(self, x: np.ndarray, size: int, y: np.ndarray) -> None:
        """y (c, h // size, w // size, b) = mean of x (c, h, w, b) over size x size windows."""
        first, *others = self._windows(x, size, y)
        y[...] = first
        for window in others:
            y += window
        y *= 1 / size**2

    def mean_pool_back(self, dy: np.ndarray, size: int, dx: np.ndarray) -> None:
        dx.fill(0)
        for window in self._windows(dx, size, dy):
            np.multiply(dy, 1 / size**2, out=window)

    def max_pool(self, x: np.ndarray, size: int, y: np.ndarray) -> None:
        first, *others = self._windows(x, size, y)
        y[...] = first
        for window in others:
            np.maximum(y, window, out=y)

    def max_pool_back(self, x: np.ndarray, y: np.ndarray, dy: np.ndarray, size: int, dx: np.ndarray) -> None:
        """The gradient goes to a window's first largest entry. y is scratch: an activation may have changed it."""
        self.max_pool(x, size, y)
        dx.fill(0)
        for window, into in zip(self._windows(x, size, y), self._windows(dx, size, y), strict=True):
            hit = window == y
            np.copyto(into, dy, where=hit)
            # A later entry of the same window may tie with this one: NaN equals nothing, so it cannot win again.
            np.copyto(y, np.nan, where=hit)

    def activate(self, kind: str, y: np.ndarray) -> None:
        """y = activation(y), in place."""
        if kind == "sigmoid":
            # exp would overflow for very negative inputs; tanh does not.
            y *= 0.5
            np.tanh(y, out=y)
            y *= 0.5
            y += 0.5
        elif kind == "tanh":
            np.tanh(y, out=y)
        elif kind == "relu":
            np.maximum(y, 0, out=y)

    def activate_back(self, kind: str, y: np.ndarray, dy: np.ndarray) -> None:
        """dy *= activation'(x), in place, from the activation's output y, which is overwritten."""
        if kind == "sigmoid":
            dy *= y
            np.subtract(1, y, out=y)
            dy *= y
        elif kind == "tanh":
            y *= y
            np.subtract(1, y, out=y)
            dy *= y
        elif kind == "relu":
            np.sign(y, out=y)
            dy *= y
