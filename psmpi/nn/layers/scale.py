"""Multiplication by a constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.nn.layers.base import OVER, Layer, Part, Site, Stage


@dataclass(frozen=True)
class Scale(Layer):
    """Multiplication of all values by `factor`, which compensates for missing inputs of a subnetwork's layer."""

    factor: float

    place = OVER

    def part(self, stage: Stage, site: Site) -> Part:
        return ScalePart(stage, site)


class ScalePart(Part):
    """Part of a multiplication by a constant, in place if the input may be overwritten."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Scale)
        self.factor = self.layer.factor

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        if y is None:
            y = x
        else:
            y[...] = x
        self.ops.scale(y.reshape(-1), self.factor)
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        self.ops.scale(dy.reshape(-1), self.factor)
        return dy

    def export(self, graph: Any, value: str) -> str:
        factor = graph.constant(f"{self.layer.name}.factor", np.array(self.factor, np.float32))
        return str(graph.node("Mul", [value, factor], self.layer.name))
