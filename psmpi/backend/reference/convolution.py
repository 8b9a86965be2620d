"""Convolutions as matrix products with windows (im2col), and the interface of a backend's convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Stripes:
    """`count` stripes of a convolution: n units each, connected to n_in consecutive input channels.

    Stripe k has the channels from source + k source_step on and the units from out + k n on.
    """

    count: int
    n: int
    n_in: int
    source: int
    source_step: int
    out: int

    @property
    def apart(self) -> list[Stripes]:
        """The stripes as single ones, with count 1."""
        places = [(self.source + k * self.source_step, self.out + k * self.n) for k in range(self.count)]
        return [Stripes(1, self.n, self.n_in, source, 0, out) for source, out in places]


def seen_once(stripes: Sequence[Stripes], channels: int) -> bool:
    """Whether exactly one stripe reads each input channel: input gradients then need neither sums nor zeros."""
    seen = np.zeros(channels, int)
    for s in stripes:
        for one in s.apart:
            seen[one.source :][: one.n_in] += 1
    return bool((seen == 1).all())


class Convolution(Protocol):
    """Correlations of x (channels, height, width, b) with kernels (units, n_in, kernel, kernel), and their adjoints."""

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""

    def prepare(self, kernels: np.ndarray) -> None:
        """Prepare for new values of the kernels, for example by packing them."""

    def forward(self, x: np.ndarray, kernels: np.ndarray, bias: np.ndarray, y: np.ndarray) -> None:
        """y (units, rows, columns, b) = activation(correlation of x with the kernels + bias (units,))."""

    def backward(
        self, x: np.ndarray, dy: np.ndarray, kernels: np.ndarray, dkernels: np.ndarray | None, dx: np.ndarray | None
    ) -> None:
        """Compute the gradients dkernels and dx, where they are not None.

        dy: (units, rows, columns, b), the gradient of the output before its activation.
        """

    def samples(self, x: np.ndarray, dy: np.ndarray, dkernels: np.ndarray, dbias: np.ndarray) -> None:
        """Compute the gradients of each sample: dkernels (units, n_in, kernel, kernel, b) and dbias (units, b)."""

    def arrays(self) -> list[np.ndarray]:
        """The buffers of the convolution, for the account of memory."""


class WindowOps(Protocol):
    """The operations that `Im2col` needs of a backend."""

    # Largest number of elements of windows at a time.
    chunk: int

    def empty(self, size: int, dtype: np.dtype) -> np.ndarray: ...

    def view(self, array: np.ndarray, start: int, shape: Sequence[int], steps: Sequence[int]) -> np.ndarray: ...

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None: ...

    def im2col(self, x: np.ndarray, stride: int, first: int, cols: np.ndarray) -> None: ...

    def col2im(self, cols: np.ndarray, stride: int, first: int, dx: np.ndarray) -> None: ...

    def finish(self, y: np.ndarray, bias: np.ndarray, kind: str) -> None: ...


class Im2col:
    """Convolution as matrix products with windows, for as many output rows at a time as `ops.chunk` allows."""

    def __init__(
        self,
        stripes: Sequence[Stripes],
        in_shape: tuple[int, int, int],
        out_shape: tuple[int, int, int],
        kernel: int,
        stride: int,
        dtype: np.dtype,
        activation: str = "identity",
        *,
        ops: WindowOps,
    ):
        self.ops, self.activation = ops, activation
        self.stripes, self.channels, self.kernel, self.stride = stripes, in_shape[0], kernel, stride
        (self.units, self.height, self.width), self.dtype = out_shape, dtype
        self.covers = seen_once(stripes, self.channels)
        # Groups of stripes with disjoint windows, whose gradients can be written before one col2im.
        self.together = [stripes] if self.covers else [[one] for s in stripes for one in s.apart]
        # Buffer for the share of later chunks in the gradient of the kernels.
        self.product = self.ops.empty(0, dtype)
        self.cols = self.dcols = self.ops.empty(0, dtype)

    def prepare(self, kernels: np.ndarray) -> None:
        """Do nothing: the products read the kernels without packing."""

    def reserve(self, batch: int) -> None:
        row = self.channels * self.kernel**2 * self.width * batch
        size = min(row * self.height, max(row, self.ops.chunk))
        self.cols, self.dcols = self.ops.empty(size, self.dtype), self.ops.empty(size, self.dtype)

    def arrays(self) -> list[np.ndarray]:
        return [self.cols, self.dcols, self.product]

    def _chunks(self, batch: int) -> list[tuple[int, int]]:
        """Ranges of output rows that are computed at a time.

        They depend only on the shapes and the minibatch, so that sums keep their order.
        """
        rows = max(1, min(self.height, self.ops.chunk // (self.channels * self.kernel**2 * self.width * batch)))
        return [(r, min(r + rows, self.height)) for r in range(0, self.height, rows)]

    def _columns(self, buffer: np.ndarray, rows: int, batch: int) -> np.ndarray:
        shape = (self.channels, self.kernel, self.kernel, rows, self.width, batch)
        return buffer[: prod(shape)].reshape(shape)

    def _source(self, s: Stripes, columns: np.ndarray) -> np.ndarray:
        """View of the windows of the stripes' input channels, (count, n_in kernel^2, positions)."""
        k2, positions = self.kernel**2, columns.size // (self.channels * self.kernel**2)
        step = k2 * positions
        shape = (s.count, s.n_in * k2, positions)
        return self.ops.view(columns, s.source * step, shape, (s.source_step * step, positions, 1))

    @staticmethod
    def _rows(s: Stripes, array: np.ndarray) -> np.ndarray:
        """View of the stripes' units in an array (units, ...), as (count, n, elements)."""
        return array[s.out : s.out + s.count * s.n].reshape(s.count, s.n, -1)

    def forward(self, x: np.ndarray, kernels: np.ndarray, bias: np.ndarray, y: np.ndarray) -> None:
        for r0, r1 in self._chunks(x.shape[-1]):
            cols = self._columns(self.cols, r1 - r0, x.shape[-1])
            self.ops.im2col(x, self.stride, r0, cols)
            out = y[:, r0:r1].reshape(self.units, -1)
            for s in self.stripes:
                self.ops.matmul(self._rows(s, kernels), self._source(s, cols), self._rows(s, out))
        self.ops.finish(y.reshape(1, self.units, -1), bias.reshape(1, -1), self.activation)

    def backward(
        self, x: np.ndarray, dy: np.ndarray, kernels: np.ndarray, dkernels: np.ndarray | None, dx: np.ndarray | None
    ) -> None:
        if dx is not None:
            dx.fill(0)
        for r0, r1 in self._chunks(x.shape[-1]):
            out = dy[:, r0:r1].reshape(self.units, -1)
            if dkernels is not None:
                self._add_product(x, out, r0, r1, dkernels)
            if dx is not None:
                dcols = self._columns(self.dcols, r1 - r0, x.shape[-1])
                for some in self.together:
                    if not self.covers:
                        dcols.fill(0)
                    for s in some:
                        weights = self._rows(s, kernels).transpose(0, 2, 1)
                        self.ops.matmul(weights, self._rows(s, out), self._source(s, dcols))
                    self.ops.col2im(dcols, self.stride, r0, dx)

    def _add_product(self, x: np.ndarray, out: np.ndarray, r0: int, r1: int, dkernels: np.ndarray) -> None:
        """Add the share of output rows [r0, r1) to dkernels; the first rows overwrite it. out: gradient of the rows."""
        cols = self._columns(self.cols, r1 - r0, x.shape[-1])
        self.ops.im2col(x, self.stride, r0, cols)
        into = dkernels
        if r0 > 0:
            if self.product.shape != dkernels.shape:
                self.product = self.ops.empty(dkernels.size, self.dtype).reshape(dkernels.shape)
            into = self.product
        for s in self.stripes:
            self.ops.matmul(self._rows(s, out), self._source(s, cols).transpose(0, 2, 1), self._rows(s, into))
        if r0 > 0:
            dkernels += self.product

    def samples(self, x: np.ndarray, dy: np.ndarray, dkernels: np.ndarray, dbias: np.ndarray) -> None:
        np.sum(dy, axis=(1, 2), dtype=np.float64, out=dbias)
        batch, one = x.shape[-1], np.empty(dkernels.shape[:-1], dkernels.dtype)
        for k in range(batch):
            # The gradient of a minibatch of one sample: slow, but plainly correct.
            single, out = (np.ascontiguousarray(a[..., k : k + 1]) for a in (x, dy))
            self.backward(single, out, one, one, None)
            dkernels[..., k] = one
