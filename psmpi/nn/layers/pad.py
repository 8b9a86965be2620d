"""Zero padding of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.nn.layers.base import Layer, Part, Site, Stage


@dataclass(frozen=True)
class Pad(Layer):
    """Zero padding by `size` rows and columns on each side of an image, as the setting `pad` of a convolution asks."""

    size: int

    keeps_range = True
    leads = True
    moves_gradient = True

    def part(self, stage: Stage, site: Site) -> Part:
        return PadPart(stage, site)


class PadPart(Part):
    """Part of zero padding: x (channels, h, w, b) -> y (channels, h + 2 size, w + 2 size, b)."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Pad)
        self.margin = self.layer.size
        inside = slice(self.margin, -self.margin)
        self.inside = (slice(None), inside, inside)

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        y.fill(0)
        y[self.inside] = x
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        if dx is None:
            return dy
        dx[...] = dy[self.inside]
        return dx

    def export(self, graph: Any, value: str) -> str:
        margins = graph.constant(f"{self.layer.name}.margins", np.array([0, 0, 1, 1] * 2) * self.margin)
        return str(graph.node("Pad", [value, margins], self.layer.name))
