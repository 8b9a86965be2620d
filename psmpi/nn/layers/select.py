"""Selection of some units of a subnetwork."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.nn.layers.base import Layer, Part, Site, Stage


@dataclass(frozen=True)
class Select(Layer):
    """Selection of the units that the next layer uses, where a flatten layer has passed on unused units as well.

    Only subnetworks have such a layer, networks do not.
    """

    keeps_range = True
    moves_gradient = True

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return wanted

    def part(self, stage: Stage, site: Site) -> Part:
        return SelectPart(stage, site)


class SelectPart(Part):
    """Part of a selection, which copies runs of units: x (inputs, ..., b) -> y (kept units, ..., b)."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        at = np.flatnonzero(stage.outputs[stage.inputs])
        starts = np.flatnonzero(np.diff(at, prepend=-2) != 1).tolist()
        # Runs of consecutive units: slice of the inputs, and slice of the outputs.
        self.runs = [(slice(int(at[a]), int(at[b - 1]) + 1), slice(a, b)) for a, b in pairwise([*starts, len(at)])]
        self.at = at

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        for source, target in self.runs:
            y[target] = x[source]
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        if dx is None:
            return dy
        dx.fill(0)
        for source, target in self.runs:
            dx[source] = dy[target]
        return dx

    def export(self, graph: Any, value: str) -> str:
        at = graph.constant(f"{self.layer.name}.at", self.at)
        return str(graph.node("Gather", [value, at], self.layer.name, axis=1))
