"""psmpi's own convolutions on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.backend.gpu.grids import BLOCKS, blocks
from psmpi.backend.gpu.pointwise import ACTIVATIONS, DevicePointwise
from psmpi.backend.reference.convolution import Im2col, Stripes, seen_once

# Number of units, or channels, that a thread computes.
TILE = 4

# Largest number of terms that one block of 128 threads adds up.
LONGEST = 1 << 15


class DeviceConvolution:
    """Direct convolution with register blocks along the batch: see cuda/conv.cu. `prepare` packs the kernels."""

    def __init__(
        self,
        ops: DevicePointwise,
        stripes: Sequence[Stripes],
        in_shape: tuple[int, int, int],
        out_shape: tuple[int, int, int],
        kernel: int,
        stride: int,
        dtype: np.dtype,
        activation: str,
    ):
        self.ops, self.stripes, self.dtype, self.kernel = ops, stripes, np.dtype(dtype), kernel
        self.rest = (*in_shape[1:], *out_shape[1:], kernel, stride)
        self.inputs, self.positions = in_shape[1] * in_shape[2], out_shape[1] * out_shape[2]
        self.activation = ACTIVATIONS[activation]
        self.packed: list[tuple[Any, Any]] = []
        for s in stripes:
            by_unit = s.count * s.n_in * kernel**2 * blocks(s.n, TILE) * TILE
            by_channel = s.count * s.n * kernel**2 * blocks(s.n_in, TILE) * TILE
            self.packed.append((ops.empty(by_unit, self.dtype), ops.empty(by_channel, self.dtype)))
        self.covers = seen_once(stripes, in_shape[0])

    def reserve(self, batch: int) -> None:
        for s in self.stripes:
            self.ops.partial(self._splits(s, batch) * s.count * s.n * s.n_in * self.kernel**2, self.dtype)

    def arrays(self) -> list[Any]:
        return [array for pair in self.packed for array in pair]

    def prepare(self, kernels: Any) -> None:
        for s, (by_unit, by_channel) in zip(self.stripes, self.packed, strict=True):
            size = max(by_unit.size, by_channel.size)
            shape = (s.count, s.n, s.n_in, s.out, self.kernel)
            self.ops.spread("conv_pack", self.dtype, size, *shape, kernels, by_unit, by_channel)

    @staticmethod
    def _numbers(s: Stripes) -> tuple[int, ...]:
        return s.count, s.n, s.n_in, s.source, s.source_step, s.out

    def forward(self, x: Any, kernels: Any, bias: Any, y: Any) -> None:
        b = x.shape[-1]
        for s, (by_unit, _) in zip(self.stripes, self.packed, strict=True):
            grid = (blocks(self.positions * b, 128), blocks(s.n, TILE), s.count)
            self.ops.launch(
                "conv_forward", self.dtype, grid, (128,), *self._numbers(s), *self.rest, b, x, by_unit, bias, y,
                self.activation,
            )  # fmt: skip

    def backward(self, x: Any, dy: Any, kernels: Any, dkernels: Any, dx: Any) -> None:
        b, launch = x.shape[-1], self.ops.launch
        for s in self.stripes if dkernels is not None else ():
            splits, size = self._splits(s, b), s.count * s.n * s.n_in * self.kernel**2
            partial = self.ops.partial(splits * size, self.dtype)
            grid = (s.count * blocks(s.n, TILE), s.n_in * self.kernel, splits)
            launch(
                "conv_weight", self.dtype, grid, (128,), *self._numbers(s), *self.rest, b, x, dy, partial, splits,
            )  # fmt: skip
            into = dkernels[s.out : s.out + s.count * s.n]
            self.ops.spread("conv_weight_sum", self.dtype, size, size, splits, partial, into)
        if dx is None:
            return
        if not self.covers:
            dx.fill(0)
        for s, (_, by_channel) in zip(self.stripes, self.packed, strict=True):
            # Stripes whose channels overlap need one launch each, since each adds to dx.
            for k in range(1 if self.covers else s.count):
                count = s.count if self.covers else 1
                numbers = (count, s.n, s.n_in, s.source + k * s.source_step, s.source_step, s.out + k * s.n)
                weights = by_channel.reshape(s.count, -1)[k:]
                grid = (blocks(self.inputs * b, 128), blocks(s.n_in, TILE), count)
                launch(
                    "conv_input", self.dtype, grid, (128,), *numbers, *self.rest, b, dy, weights, dx,
                    int(not self.covers),
                )  # fmt: skip

    def samples(self, x: Any, dy: Any, dkernels: Any, dbias: Any) -> None:
        _samples(self.ops, self.stripes, self.rest, x, dy, dkernels, dbias)

    def _splits(self, s: Stripes, batch: int) -> int:
        """Number of parts of the sum over positions and samples in the gradient of the kernels.

        It depends only on the shapes, so that the sum keeps its order. The parts are short enough for float32 sums.
        """
        each = s.count * blocks(s.n, TILE) * s.n_in * self.kernel
        terms = self.positions * batch
        return max(blocks(terms, LONGEST), min(blocks(BLOCKS, each), blocks(terms, 1024)))


class DeviceWindows(Im2col):
    """Matrix products with windows, which run on tensor cores; `samples` uses the kernel of cuda/conv.cu."""

    def samples(self, x: Any, dy: Any, dkernels: Any, dbias: Any) -> None:
        rest = (*x.shape[1:3], *dy.shape[1:3], self.kernel, self.stride)
        _samples(self.ops, self.stripes, rest, x, dy, dkernels, dbias)


def _samples(
    ops: Any, stripes: Sequence[Stripes], rest: tuple[int, ...], x: Any, dy: Any, dkernels: Any, dbias: Any
) -> None:
    """Gradients of each sample, see `Convolution.samples`.

    rest: height and width of the input and of the output, kernel and stride.
    """
    b, kernel = x.shape[-1], rest[-2]
    for s in stripes:
        grid = (blocks(s.n_in * kernel**2 * b, 128), blocks(s.n, TILE), s.count)
        numbers = (s.count, s.n, s.n_in, s.source, s.source_step, s.out, *rest, b)
        ops.launch("conv_samples", x.dtype, grid, (128,), *numbers, x, dy, dkernels)
    ops.position_sums(dy, dbias)
