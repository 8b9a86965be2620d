"""Group normalization (Wu and He 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Parameter
from psmpi.nn.layers.base import Initial, Layer, Part, SampleSums, Site, Stage
from psmpi.nn.layers.batch_norm import EPS, affine_runs, export_affine
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses, grouped, stretched


@dataclass(frozen=True)
class GroupNorm(Layer):
    """Group normalization: the values of each group of units in each sample, normalized to mean 0 and variance 1.

    Each unit is then scaled and shifted. A sample's outputs do not depend on the other samples. groups: number of
    groups of equal size.
    """

    groups: int

    exact = True
    keeps = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        table.no_sequence(shape)
        groups = table.whole("groups")
        if shape[0] % groups:
            raise UserError(f"{table.where}: {shape[0]} units do not divide into {groups} groups")
        return [cls(label, shape, shape, groups)]

    def parameters(self) -> tuple[Parameter, ...]:
        units = self.out_shape[0]
        return tuple(Parameter(f"{self.name}.{name}", (units,), units) for name in ("weight", "bias"))

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        return {f"{self.name}.weight": Initial("constant", 1.0)}

    def sources(self, uses: Uses) -> Uses:
        size = self.in_shape[0] // self.groups
        return stretched(grouped(uses, size), size)

    def users(self, uses: Uses) -> list[tuple[Parameter, Uses]]:
        # A subnetwork has whole groups, with the scales and shifts of all their units.
        return [(parameter, self.sources(uses)) for parameter in self.parameters()]

    def restrict(self, units: int, in_shape: tuple[int, ...]) -> Layer:
        if units != self.out_shape[0]:
            raise UserError(f"the units of {self.name} are normalized in groups and cannot be dealt out one by one")
        return super().restrict(units, in_shape)

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        return int(bool(following and following[0].activation))

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        return (self.present_groups(stage) + (0 if writable else stage.size)) * batch

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        groups = self.present_groups(stage) * batch
        large = dict.fromkeys(("rows", "normal rows"), stage.size * batch)
        return {**large, "ones": groups, "sums": 2 * groups, "zeros": int(stage.outputs.sum())}

    def present_groups(self, stage: Stage) -> int:
        """Return the number of groups that a subnetwork has."""
        return int(stage.outputs.sum()) * self.groups // self.out_shape[0]

    def part(self, stage: Stage, site: Site) -> Part:
        return GroupNormPart(stage, site)


class GroupNormPart(Part):
    """Part of group normalization: x -> y = activation(gamma (x - mean) / sqrt(variance + EPS) + beta).

    x, y: (units, ..., b); mean and variance are of each group and sample.
    """

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, GroupNorm)
        self.units = int(stage.outputs.sum())
        self.groups = self.layer.present_groups(stage)
        self.runs = affine_runs(self.layer, site.layout, site.part, stage.outputs)

    def views(self, vector: np.ndarray) -> Any:
        """Return scales and shifts of each run of units, (..., units of the run) each."""
        counts = [units.stop - units.start for units, _, _ in self.runs]
        return [
            (vector[..., gamma : gamma + n], vector[..., beta : beta + n])
            for (_, gamma, beta), n in zip(self.runs, counts, strict=True)
        ]

    def room(self, batch: int, writable: bool) -> Any:
        """Return arrays for 1 / sqrt(variance + EPS) (groups batch,), and for the normalized values unless in x."""
        own = self.ops.empty(0 if writable else self.size * batch, self.dtype)
        return self.ops.empty(self.groups * batch, self.dtype), own

    def reserve(self, batch: int) -> None:
        self.space.take("rows", self.size, batch)

    def reserve_backward(self, batch: int, wanted: bool) -> None:
        self.space.take("normal rows", self.size, batch)
        self.space.take("zeros", self.units)
        self.space.take("ones", self.groups, batch)
        self.space.take("sums", 2, self.groups, batch)

    def _rows(self, name: str, values: np.ndarray, batch: int) -> np.ndarray:
        """Return a copy of values (units, ..., b) with a row for each group and sample, (groups b, group size)."""
        rows = self.space.take(name, self.groups * batch, values.size // (self.groups * batch))
        rows.reshape(self.groups, batch, -1)[...] = values.reshape(self.groups, -1, batch).transpose(0, 2, 1)
        return rows

    def _put_back(self, rows: np.ndarray, out: np.ndarray, batch: int) -> None:
        """Copy rows of `_rows` back to out (units, ..., b)."""
        out.reshape(self.groups, -1, batch)[...] = rows.reshape(self.groups, batch, -1).transpose(0, 2, 1)

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        factors, own = room
        batch = x.shape[-1]
        scale = factors[: self.groups * batch]
        normal = (own[: x.size] if own.size else x).reshape(self.units, -1)
        rows = self._rows("rows", x, batch)
        self.ops.normalize(rows, EPS, rows, scale)
        self._put_back(rows, normal, batch)
        out = y.reshape(self.units, -1)
        for (units, *_), (gamma, beta) in zip(self.runs, self.w, strict=True):
            self.ops.affine(normal[units], gamma, beta, self.activation, out[units])
        return y, (scale, normal)

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        (scale, normal), batch = kept, x.shape[-1]
        self.ops.activate_back(self.activation, y.reshape(-1), dy.reshape(-1))
        d = dy.reshape(self.units, -1)
        products = self.space.take("rows", *d.shape)
        products[...] = d
        self.ops.multiply(products.reshape(-1), normal.reshape(-1))
        if isinstance(into, SampleSums):
            self._add_up(products, d, into)
        elif into is not None:
            for (units, *_), pair in zip(self.runs, into, strict=True):
                for values, out in zip((products, d), pair, strict=True):
                    self.ops.row_sums(values[units][None], out[None])
        zeros = self.space.take("zeros", self.units)
        zeros.fill(0)
        for (units, *_), (gamma, _) in zip(self.runs, self.w, strict=True):
            self.ops.affine(d[units], gamma, zeros[units], "identity", d[units])
        rows, across = self._rows("rows", d, batch), self._rows("normal rows", normal, batch)
        ones, sums = self.space.take("ones", len(rows)), self.space.take("sums", 2, len(rows))
        ones.fill(1)
        self.ops.normalize_back(across, scale, ones, rows, rows, "identity", sums[0], sums[1])
        self._put_back(rows, d, batch)
        return dy

    def _add_up(self, products: np.ndarray, d: np.ndarray, sums: SampleSums) -> None:
        """Write the weighted sums of the samples' gradients of scales and shifts."""
        batch = sums.weights.shape[1]
        positions = d.size // (self.units * batch)
        ones = self.space.take("ones", self.units, 1, positions)
        ones.fill(1)
        samples = self.space.take("samples", self.units, 1, batch)
        for k, values in enumerate((products, d)):
            self.ops.matmul(ones, values.reshape(self.units, positions, batch), samples)
            for (units, *_), pair in zip(self.runs, self.views(sums.into), strict=True):
                run_samples = samples[units].reshape(1, -1, batch)
                self.ops.weighted_sums(run_samples, sums.weights, pair[k][:, None])

    def export(self, graph: Any, value: str) -> str:
        name = self.layer.name
        shape = graph.node("Shape", [value], f"{name}.shape")
        groups = graph.constant(f"{name}.groups", np.array([0, self.groups, -1]))
        flat = graph.node("Reshape", [value, groups], f"{name}.flat")
        mean = graph.node("ReduceMean", [flat], f"{name}.mean", axes=[2])
        apart = graph.node("Sub", [flat, mean], f"{name}.apart")
        square = graph.node("Mul", [apart, apart], f"{name}.square")
        variance = graph.node("ReduceMean", [square], f"{name}.variance", axes=[2])
        total = graph.node("Add", [variance, graph.constant(f"{name}.eps", np.array(EPS, np.float32))], f"{name}.sum")
        normal = graph.node("Div", [apart, graph.node("Sqrt", [total], f"{name}.deviation")], f"{name}.normal")
        return export_affine(graph, self, graph.node("Reshape", [normal, shape], f"{name}.image"))
