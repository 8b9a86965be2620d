"""Learned position vectors, added at each step of a sequence (Gehring et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Parameter
from psmpi.nn.layers.base import OVER, Initial, Layer, Part, SampleSums, Site, Stage
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.unit_rows import UnitRows


@dataclass(frozen=True)
class Positions(Layer):
    """Position vectors: column t of a matrix (units, longest) is added at step t of sequences of <= `longest` steps."""

    longest: int

    exact: ClassVar[bool] = True
    place: ClassVar[str] = OVER
    whole_sequences: ClassVar[bool] = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        _, steps = table.sequence(shape)
        longest = table.whole("longest", steps)
        if longest < steps:
            raise UserError(
                f"{table.where}: longest = {longest}, but the sequences have {steps} steps: use longest = {steps}"
            )
        return [cls(label, shape, shape, longest)]

    def with_steps(self, steps: int) -> Layer:
        if steps > self.longest:
            raise UserError(
                f"{self.name} has positions for {self.longest} steps, but the sequences have {steps}: train it with "
                f"longest = {steps}, or on sequences of this length"
            )
        return super().with_steps(steps)

    def parameters(self) -> tuple[Parameter, ...]:
        units = self.out_shape[0]
        return (Parameter(f"{self.name}.weight", (units, self.longest), units),)

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        """Return draws of the same size as an embedding's."""
        return {f"{self.name}.weight": Initial("uniform", sqrt(3 / self.out_shape[0]))}

    def part(self, stage: Stage, site: Site) -> Part:
        return PositionsPart(stage, site)


class PositionsPart(Part):
    """Part of position vectors: x (units, steps, b) -> y of the same shape."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Positions)
        self.longest = self.layer.longest
        self.rows = UnitRows(stage, site)

    def views(self, vector: np.ndarray) -> Any:
        """Return the rows of each run of units, (..., units, longest)."""
        return self.rows.views(vector)

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        if y is None:
            y = x
        else:
            y[...] = x
        for (units, _), weights in zip(self.rows.runs, self.w, strict=True):
            self.ops.add_bias(y[units], weights[:, : y.shape[1]])
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        if into is None:
            return dy
        steps, sums = dy.shape[1], isinstance(into, SampleSums)
        for (units, _), out in zip(self.rows.runs, self.views(into.into) if sums else into, strict=True):
            # Steps beyond the sequences have no gradient.
            out[..., steps:] = 0
            if sums:
                self.ops.weighted_sums(dy[units], into.weights, out[..., :steps])
            else:
                self.ops.row_sums(dy[units], out[:, :steps])
        return dy

    def export(self, graph: Any, value: str) -> str:
        weights = np.concatenate([np.asarray(w)[:, : self.shape[1]] for w in self.w])
        return str(graph.node("Add", [value, graph.constant(f"{self.layer.name}.weight", weights)], self.layer.name))
