"""Convolutions, also in groups (`separable_conv`), with a following mean pooling folded into their kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.backend.reference import CHUNK
from psmpi.errors import UserError
from psmpi.nn.layers.base import Layer, Part, SampleSums, Site, Stage
from psmpi.nn.layers.linear import Linear, LinearPart
from psmpi.nn.layers.pad import Pad
from psmpi.nn.layers.pool import Pool
from psmpi.nn.layers.segments import Segment, same_source
from psmpi.nn.layers.table import Table


@dataclass(frozen=True)
class Conv(Linear):
    """Valid cross-correlation with stride 1, kernel x kernel, and bias; with groups > 1 a separable convolution."""

    kernel: int

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        pad, before = table.take("pad", 0), []
        if not isinstance(pad, int) or isinstance(pad, bool) or pad < 0:
            raise UserError(f"{table.where}: pad = {pad!r}; expected a whole number")
        if pad and len(shape) == 3:
            padded = (shape[0], shape[1] + 2 * pad, shape[2] + 2 * pad)
            before.append(Pad(f"{label}.pad", shape, padded, pad))
            shape = padded
        c, h, w = table.image(shape)
        units, kernel = table.whole("channels"), table.whole("kernel")
        groups = table.whole("groups") if table.kind == "separable_conv" else 1
        if min(h, w) < kernel:
            raise UserError(f"{table.where}: a kernel of {kernel} x {kernel} does not fit in {h} x {w}")
        if units % groups or c % groups:
            raise UserError(f"{table.where}: {c} input and {units} output channels do not divide into {groups} groups")
        out = (units, h - kernel + 1, w - kernel + 1)
        return [*before, cls(label, shape, out, groups, kernel, bias=table.flag("bias"))]

    @property
    def unit_size(self) -> int:
        return self.group_inputs * self.kernel**2

    @property
    def fans(self) -> tuple[int, int]:
        return self.unit_size, self.units // self.groups * self.kernel**2

    def weight_shape(self) -> tuple[int, ...]:
        return (self.units, self.group_inputs, self.kernel, self.kernel)

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        pools = fold and bool(following) and isinstance(following[0], Pool) and following[0].kind == "mean"
        return int(pools) + super().absorbs(following[int(pools) :], fold)

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        # Kernels (wider with folded mean pooling), their gradients and biases; then packed kernels, or two arrays of
        # windows for at least one row of outputs.
        pool, units = folded_pool(stage), int(stage.outputs.sum())
        wide = (self.kernel + pool - 1) ** 2
        kernels = units * self.group_inputs * wide
        numbers = 2 * kernels + units
        if packed:
            return numbers + kernels // self.groups
        row = int(stage.inputs.sum()) * wide * stage.shape[2] * batch
        windows, most = row * stage.shape[1], max(row, CHUNK)
        # If windows are computed in several pieces, each piece's gradient of the kernels takes another array.
        return numbers + 2 * min(windows, most) + kernels * (windows > most)

    def part(self, stage: Stage, site: Site) -> Part:
        return ConvPart(stage, site)


def folded_pool(stage: Stage) -> int:
    """Return the width of the mean pooling that a convolution has absorbed, or 1 if it has none."""
    return next((layer.size for layer in stage.absorbed if isinstance(layer, Pool)), 1)


class ConvPart(LinearPart):
    """Part of a convolution with `pool` x `pool` mean pooling: x (channels, h, w, b) -> y (units, rows, width, b).

    Convolution and pooling are one convolution with a (k + pool - 1)-wide kernel and stride `pool`. For a 5 x 5 kernel
    and 2 x 2 pooling, this takes 36 multiplications per output instead of 100.
    """

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Conv)
        self.k, self.pool = self.layer.kernel, folded_pool(stage)
        self.wide = self.k + self.pool - 1
        shape = (self.units, self.group_inputs, self.wide, self.wide)
        size = self.units * self.group_inputs * self.wide**2
        self.folded = self.ops.empty(size, self.dtype).reshape(shape)
        self.dfolded = self.ops.empty(size, self.dtype).reshape(shape)
        self.packed_bias = self.ops.empty(self.units, self.dtype)
        # The kernels are copied, so segments with the same inputs join even if they are apart in the flat vector.
        (_, height, width), (_, rows, columns) = self.layer.in_shape, self.layer.out_shape
        self.plan = self.ops.convolution(
            same_source(self.segments),
            (self.inputs, height, width),
            (self.units, rows // self.pool, columns // self.pool),
            self.wide,
            self.pool,
            self.dtype,
            self.activation,
        )

    def reserve(self, batch: int) -> None:
        self.plan.reserve(batch)

    def arrays(self) -> list[np.ndarray]:
        return [self.folded, self.dfolded, self.packed_bias, *self.plan.arrays()]

    def _images(self, s: Segment, rows: np.ndarray, k: int) -> np.ndarray:
        return rows.reshape(s.count, s.n, self.group_inputs, k, k)

    def prepare(self) -> None:
        for s, (w, b) in zip(self.segments, self.w, strict=True):
            units = slice(s.out, s.out + s.count * s.n)
            self.ops.fold(self._images(s, w, self.k), self.pool, self._images(s, self.folded[units], self.wide))
            self.packed_bias[units].reshape(b.shape)[...] = b
        self.plan.prepare(self.folded)

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        self.prepare()
        self.plan.forward(x, self.folded, self.packed_bias, y)
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        flat_y, flat_dy = y.reshape(self.units, -1), dy.reshape(self.units, -1)
        written = into is not None and not isinstance(into, SampleSums)
        for k, s in enumerate(self.segments):
            dbias = into[k][1] if written else None
            self.ops.finish_back(self.target(s, flat_y), self.target(s, flat_dy), self.activation, dbias)
        self.plan.backward(x, dy, self.folded, self.dfolded if written else None, dx)
        if isinstance(into, SampleSums):
            self._backward_sums(x, dy, into)
        elif written:
            for s, (gw, _) in zip(self.segments, into, strict=True):
                dfolded = self._images(s, self.dfolded[s.out : s.out + s.count * s.n], self.wide)
                self.ops.unfold(dfolded, self.pool, self._images(s, gw, self.k))
        return dy if dx is None else dx

    def _backward_sums(self, x: np.ndarray, dy: np.ndarray, sums: SampleSums) -> None:
        many, batch = sums.weights.shape
        apart = self.space.take("apart", *self.folded.shape, batch)
        dbias = self.space.take("dbias", self.units, batch)
        self.plan.samples(x, dy, apart, dbias)
        for s, (gw, gb) in zip(self.segments, self.rows(sums.into), strict=True):
            if self.bias:
                self.ops.weighted_sums(self.target(s, dbias), sums.weights, gb)
            # Unfolding is linear, so it comes after the sums over samples, of which there are fewer.
            folded = self.space.take("folded", many, s.n, *self.folded.shape[1:])
            for k in range(s.count):
                first = s.out + k * s.n
                samples = apart[first : first + s.n].reshape(-1, batch).T
                self.ops.matmul(sums.weights, samples, folded.reshape(many, -1))
                into = gw[:, k].reshape(many, s.n, self.group_inputs, self.k, self.k)
                self.ops.unfold(folded, self.pool, into)

    def export(self, graph: Any, value: str) -> str:
        return self.export_as_convolutions(graph, value, self.k)
