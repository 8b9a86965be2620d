"""Layer normalization (Ba, Kiros and Hinton 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Parameter
from psmpi.nn.layers.base import Initial, Layer, Part, SampleSums, Site, Stage, place
from psmpi.nn.layers.batch_norm import EPS
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses, grouped, stretched


@dataclass(frozen=True)
class LayerNorm(Layer):
    """Layer normalization: the units of each sample, and each step, normalized to mean 0 and variance 1.

    Each unit is then scaled and shifted. over: number of units of the layer in the whole network, over which means are
    taken. If the layer is restricted to fewer units, other ranks have the remaining ones.
    """

    over: int

    keeps: ClassVar[bool] = True
    couples_units: ClassVar[bool] = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        if len(shape) > 2:
            raise UserError(
                f"{table.where}: layer_norm takes features or sequences, but its input has shape {shape}: for images "
                'use type = "group_norm", groups = 1'
            )
        return [cls(label, shape, shape, shape[0])]

    @property
    def unit_sums(self) -> tuple[int, ...]:
        return (1, 1, 2) if self.over != self.out_shape[0] else ()

    def parameters(self) -> tuple[Parameter, ...]:
        units = self.out_shape[0]
        return tuple(Parameter(f"{self.name}.{name}", (units,), units) for name in ("weight", "bias"))

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        return {f"{self.name}.weight": Initial("constant", 1.0)}

    def sources(self, uses: Uses) -> Uses:
        units = self.out_shape[0]
        return stretched(grouped(uses, units), units)

    def users(self, uses: Uses) -> list[tuple[Parameter, Uses]]:
        # A subnetwork has all units or none, with their scales and shifts.
        return [(parameter, self.sources(uses)) for parameter in self.parameters()]

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.full(self.out_shape[0], wanted.any())

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        return (prod(self.out_shape[1:]) + (0 if writable else stage.size)) * batch

    def part(self, stage: Stage, site: Site) -> Part:
        return LayerNormPart(stage, site)


class LayerNormPart(Part):
    """Part of layer normalization: x -> y = gamma (x - mean) / sqrt(variance + EPS) + beta.

    x, y: (units, ..., b); mean and variance are of each step of each sample.
    """

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, LayerNorm)
        self.units, self.over = self.layer.out_shape[0], self.layer.over
        self.across = site.across if self.over != self.units else None
        if self.across is None and self.over != self.units:
            raise ValueError(
                f"{self.layer.name} has {self.units} of {self.over} units, but its site has no sums over the others"
            )
        self.places = [place(site, parameter.name) for parameter in self.layer.parameters()]

    def views(self, vector: np.ndarray) -> Any:
        """Return scales and shifts, (..., units) each."""
        return tuple(vector[..., at : at + self.units] for at in self.places)

    def room(self, batch: int, writable: bool) -> Any:
        """Return arrays for 1 / sqrt(variance + EPS) of each step, and for the normalized values unless in x."""
        own = self.ops.empty(0 if writable else self.size * batch, self.dtype)
        return self.ops.empty(self.size // self.units * batch, self.dtype), own

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        (factors, own), (gamma, beta) = room, self.w
        values, out = x.reshape(self.units, -1), y.reshape(self.units, -1)
        scale = factors[: values.shape[1]]
        normal = (own[: x.size] if own.size else x).reshape(values.shape)
        if self.across is None:
            self.ops.layer_norm(values, EPS, gamma, beta, normal, scale, out)
        else:
            self._normalize(values, normal, scale, self.across)
            self.ops.affine(normal, gamma, beta, "identity", out)
        return y, (scale, normal)

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        (scale, normal), d = kept, dy.reshape(self.units, -1)
        if isinstance(into, SampleSums):
            self._add_up(normal, d, into)
            into = None
        if self.across is None:
            self.ops.layer_norm_back(normal, scale, self.w[0], d, *(into or (None, None)))
        else:
            self._back(normal, scale, d, into, self.across)
        return dy

    def _add_up(self, normal: np.ndarray, d: np.ndarray, sums: SampleSums) -> None:
        """Write the weighted sums of the samples' gradients of scales and shifts."""
        batch = sums.weights.shape[1]
        positions = d.shape[1] // batch
        products, ones = self.space.take("products", *d.shape), self.space.take("ones", self.units, 1, positions)
        samples = self.space.take("samples", self.units, 1, batch)
        products[...] = d
        self.ops.multiply(products.reshape(-1), normal.reshape(-1))
        ones.fill(1)
        for values, out in zip((products, d), self.views(sums.into), strict=True):
            self.ops.matmul(ones, values.reshape(self.units, positions, batch), samples)
            self.ops.weighted_sums(samples.reshape(1, self.units, batch), sums.weights, out[:, None])

    # The methods below use sums over other ranks, which are computed on the host.

    def _normalize(self, x: np.ndarray, normal: np.ndarray, scale: np.ndarray, across: Callable[..., object]) -> None:
        """Normalize as `ops.layer_norm`, without scales and shifts, by mean and variance over all ranks' units."""
        sums = np.asarray(self.ops.host(x).sum(axis=0, dtype=np.float64))
        across(sums)
        normal[...] = x
        normal -= self._put(sums / self.over)
        squares = np.einsum("ij,ij->j", *[self.ops.host(normal)] * 2, dtype=np.float64)
        across(squares)
        factors = self._put(1 / np.sqrt(squares / self.over + EPS))
        scale[...] = factors
        self._scale(normal, factors)

    def _back(
        self, normal: np.ndarray, scale: np.ndarray, d: np.ndarray, into: Any, across: Callable[..., object]
    ) -> None:
        """Compute `ops.layer_norm_back` with sums over all ranks' units."""
        products = self.space.take("products", *d.shape)
        products[...] = d
        self.ops.multiply(products.reshape(-1), normal.reshape(-1))
        if into is not None:
            for values, out in zip((products, d), into, strict=True):
                self.ops.row_sums(values[None], out[None])
        zeros = self.space.take("zeros", self.units)
        zeros.fill(0)
        for values in (products, d):
            self.ops.affine(values, self.w[0], zeros, "identity", values)
        sums = np.stack([self.ops.host(values).sum(axis=0, dtype=np.float64) for values in (d, products)])
        across(sums.reshape(-1))
        mean, along = (self._put(values) for values in sums / self.over)
        products[...] = normal
        self._scale(products, along)
        d -= products
        d -= mean
        self._scale(d, scale)

    def _scale(self, values: np.ndarray, factors: np.ndarray) -> None:
        """Multiply values (units, n) by factors (n,), in place."""
        self.ops.scale_samples(values[None], factors[None], values[None, None])

    def _put(self, values: np.ndarray) -> np.ndarray:
        return self.ops.put(values.astype(self.dtype))

    def export(self, graph: Any, value: str) -> str:
        name, shape = self.layer.name, (-1, *(1,) * (len(self.shape) - 1))
        apart = graph.node("Sub", [value, graph.node("ReduceMean", [value], f"{name}.mean", axes=[1])], f"{name}.apart")
        square = graph.node("Mul", [apart, apart], f"{name}.square")
        variance = graph.node("ReduceMean", [square], f"{name}.variance", axes=[1])
        total = graph.node("Add", [variance, graph.constant(f"{name}.eps", np.array(EPS, np.float32))], f"{name}.sum")
        normal = graph.node("Div", [apart, graph.node("Sqrt", [total], f"{name}.deviation")], f"{name}.normal")
        gamma, beta = (
            graph.constant(f"{name}.{kind}", np.asarray(values).reshape(shape))
            for kind, values in zip(("gamma", "beta"), self.w, strict=True)
        )
        return str(graph.node("Add", [graph.node("Mul", [normal, gamma], f"{name}.scaled"), beta], name))
