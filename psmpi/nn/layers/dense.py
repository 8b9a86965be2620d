"""Dense layers, also block-diagonal ones (`separable_dense`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Each
from psmpi.nn.layers.base import Layer, Part, SampleSums, Site, Stage
from psmpi.nn.layers.linear import Linear, LinearPart
from psmpi.nn.layers.table import Table


@dataclass(frozen=True)
class Dense(Linear):
    """Dense layer y = W x + b, applied to sequences at each step.

    With groups > 1, W is block-diagonal and inputs beyond groups x group_inputs are ignored (Raynaud et al.).
    """

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        if len(shape) != 2:
            table.flat(shape)
        units = table.whole("units")
        groups = table.whole("groups") if table.kind == "separable_dense" else 1
        if units % groups or shape[0] < groups:
            raise UserError(f"{table.where}: {shape[0]} inputs and {units} units cannot be cut into {groups} groups")
        return [cls(label, shape, (units, *shape[1:]), groups, bias=table.flag("bias"))]

    @property
    def note(self) -> str:
        inputs, used = self.in_shape[0], self.groups * self.group_inputs
        if used == inputs:
            return ""
        return (
            f"the last {inputs - used} of {inputs} inputs {'is' if inputs == used + 1 else 'are'} not used, because "
            f"each of {self.groups} groups takes {self.group_inputs}; "
            f"{inputs + self.groups - inputs % self.groups} inputs would all be used"
        )

    def weight_shape(self) -> tuple[int, ...]:
        size = (self.units, self.group_inputs)
        return size if self.groups == 1 else (self.groups, self.units // self.groups, self.group_inputs)

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        numbers = super().workspace_numbers(stage, batch, wanted, packed)
        size = self.units // self.groups
        used = int(stage.outputs.reshape(self.groups, size).any(axis=1).sum())
        stripes, thin = 0, True
        for first, last, users in stage.users:
            # Each single class has a run of units, and a run has a stripe in each group that it overlaps.
            share = (last - first) // users.count if isinstance(users, Each) else last - first
            starts = np.arange(first, last, share)
            starts = starts[stage.outputs[starts]]
            stripes += int((-(-(starts + share) // size) - starts // size).sum())
            thin = thin and (len(starts) == 0 or min(share, size) == 1)
        # If no stripe or several stripes of units use an input, one product cannot write the input's gradient.
        once = stripes == used or (used == 1 and thin)
        if once and used * self.group_inputs == stage.inputs.sum():
            return numbers
        return {**numbers, "product": self.group_inputs * prod(self.in_shape[1:]) * batch}

    def part(self, stage: Stage, site: Site) -> Part:
        return DensePart(stage, site)


class DensePart(LinearPart):
    """Part of a dense layer: x (inputs, b) -> y (units, b); sequences (inputs, steps, b) -> (units, steps, b)."""

    def reserve(self, batch: int) -> None:
        if not self.covers:
            self.space.take("product", max(s.n_in for s in self.segments), prod(self.shape[1:]) * batch)

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        x, rows = _rows(x), _rows(y)
        for s, (w, b) in zip(self.segments, self.w, strict=True):
            out = self.target(s, rows)
            self.ops.matmul(w, self.source(s, x), out)
            self.ops.finish(out, b, self.activation)
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        below = self._backward(_rows(x), _rows(y), _rows(dy), None if dx is None else _rows(dx), into, x.shape[-1])
        return dy if dx is None else below.reshape(dx.shape)

    def _backward(
        self, x: np.ndarray, y: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, into: Any, batch: int
    ) -> np.ndarray:
        for k, s in enumerate(self.segments):
            out, across = self.target(s, dy), self.source(s, x).transpose(0, 2, 1)
            if into is None or isinstance(into, SampleSums):
                self.ops.finish_back(self.target(s, y), out, self.activation, None)
            else:
                gw, gb = into[k]
                self.ops.finish_back(self.target(s, y), out, self.activation, gb)
                self.ops.matmul(out, across, gw)
            if isinstance(into, SampleSums):
                gw, gb = self.rows(into.into)[k]
                weights = into.weights
                if x.shape[1] > batch:
                    weights = np.tile(weights, x.shape[1] // batch)
                if self.bias:
                    self.ops.weighted_sums(out, weights, gb)
                scaled = self.space.take("scaled", len(weights), *out.shape)
                self.ops.scale_samples(out, weights, scaled)
                self.ops.matmul(scaled, across, gw)
        if dx is None:
            return dy
        if self.covers:
            (s,), ((w, _),) = self.segments, self.w
            self.ops.matmul(w.transpose(0, 2, 1), self.target(s, dy), self.source(s, dx))
            return dx
        dx.fill(0)
        for s, (w, _) in zip(self.segments, self.w, strict=True):
            product = self.space.take("product", s.n_in, dx.shape[1])
            sources, out = self.source(s, dx), self.target(s, dy)
            for k in range(s.count):
                self.ops.matmul(w[k].T, out[k], product)
                source = sources[k]
                source += product
        return dx

    def export(self, graph: Any, value: str) -> str:
        name = self.layer.name
        steps = self.shape[1:]
        shape = graph.constant(f"{name}.image", np.array([0, 0, -1, 1] if steps else [0, -1, 1, 1]))
        image = graph.node("Reshape", [value, shape], f"{name}.in")
        joined = self.export_as_convolutions(graph, image, 1)
        flat = graph.constant(f"{name}.flat", np.array([0, 0, -1] if steps else [0, -1]))
        return str(graph.node("Reshape", [joined, flat], name))


def _rows(values: np.ndarray) -> np.ndarray:
    """Return values as (units, steps b): each step of a sequence is treated as a sample."""
    return values if values.ndim == 2 else values.reshape(values.shape[0], -1)
