"""Gaussian error linear units (Hendrycks and Gimpel 2016)."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from psmpi.nn.layers.base import Layer, Part, Site, Stage
from psmpi.nn.layers.table import Table


@dataclass(frozen=True)
class Gelu(Layer):
    """Elementwise x Phi(x) with Phi(x) = (1 + erf(x / sqrt(2))) / 2: exact, not the approximation by tanh.

    No other layer absorbs a gelu, because its derivative is a function of its input.
    """

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        return [cls(label, shape, shape)]

    def part(self, stage: Stage, site: Site) -> Part:
        return GeluPart(stage, site)


class GeluPart(Part):
    """Part of a gelu: x -> y of the same shape; x is not changed."""

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        self.ops.gelu(x, y)
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        self.ops.gelu_back(x, dy)
        return dy

    def export(self, graph: Any, value: str) -> str:
        name = self.layer.name
        half, root, one = (
            graph.constant(f"{name}.{constant}", np.array(number, np.float32))
            for constant, number in (("half", 0.5), ("root", 1 / sqrt(2)), ("one", 1.0))
        )
        error = graph.node("Erf", [graph.node("Mul", [value, root], f"{name}.scaled")], f"{name}.erf")
        twice = graph.node("Add", [error, one], f"{name}.twice")
        return str(graph.node("Mul", [graph.node("Mul", [value, half], f"{name}.halves"), twice], name))
