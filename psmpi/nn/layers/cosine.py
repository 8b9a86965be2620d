"""Cosine layers: scaled cosines of the angles between the features and rows of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.nn.layers.base import Layer, Part, SampleSums, Site, Stage
from psmpi.nn.layers.dense import Dense, DensePart
from psmpi.nn.layers.segments import Segment
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.unit_length import EPS, UnitLength


@dataclass(frozen=True)
class Cosine(Dense):
    """Cosine layer y_j = scale <w_j, x> / sqrt(|w_j|^2 + EPS) for inputs x of unit length, without biases.

    Source: Wang et al. 2017, "NormFace". The gradient of a row w_j is orthogonal to w_j.
    """

    scale: float

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        table.flat(shape)
        units, scale = table.whole("units"), table.above_0("scale")
        unit = UnitLength(f"{label}.unit", shape, shape)
        return [unit, cls(label, shape, (units,), 1, scale, bias=False)]

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        return 0

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        return 2 * int(stage.outputs.sum())

    def part(self, stage: Stage, site: Site) -> Part:
        return CosinePart(stage, site)


class CosinePart(DensePart):
    """Part of a cosine layer: x (inputs, b) -> y (units, b).

    factors: (units,) scale / sqrt(|w_j|^2 + EPS) of the last forward pass.
    """

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Cosine)
        self.scale = self.layer.scale
        self.factors, self.zeros = self.ops.zeros(self.units, self.dtype), self.ops.zeros(self.units, self.dtype)

    def arrays(self) -> list[np.ndarray]:
        return [self.factors, self.zeros]

    def _of(self, s: Segment) -> np.ndarray:
        """Return the factors of a segment's units, (count, n)."""
        return self.factors[s.out : s.out + s.count * s.n].reshape(s.count, s.n)

    def prepare(self) -> None:
        for s, (w, _) in zip(self.segments, self.w, strict=True):
            self.ops.row_factors(w, EPS, self.scale, self._of(s))

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        y, kept = super().forward(x, y, room)
        self.prepare()
        self.ops.affine(y, self.factors, self.zeros, "identity", y)
        return y, kept

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        self.ops.affine(dy, self.factors, self.zeros, "identity", dy)
        dx = super().backward(x, y, kept, dy, dx, into)
        if into is not None:
            views = self.rows(into.into) if isinstance(into, SampleSums) else into
            for s, (w, _), (gw, _) in zip(self.segments, self.w, views, strict=True):
                self.ops.project_rows(w, self._of(s), self.scale, gw if isinstance(into, SampleSums) else gw[None])
        return dx

    def exported(self, s: Segment, weights: np.ndarray) -> np.ndarray:
        self.prepare()
        unit: np.ndarray = weights * self._of(s)[..., None]
        return unit
