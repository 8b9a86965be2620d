"""Flatten layer: images to features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from psmpi.nn.layers.base import VIEW, Layer, Part, Site, Stage
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses, grouped


@dataclass(frozen=True)
class Flatten(Layer):
    """Flatten layer in channel-major order: feature f belongs to channel f // (height x width)."""

    place = VIEW
    keeps_range = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        return [cls(label, shape, (prod(shape),))]

    def sources(self, uses: Uses) -> Uses:
        return grouped(uses, prod(self.in_shape[1:]))

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        # All features of a present channel are present, used or not.
        return np.repeat(inputs, prod(self.in_shape[1:]))

    def restrict(self, units: int, in_shape: tuple[int, ...]) -> Layer:
        return replace(self, in_shape=in_shape, out_shape=(prod(in_shape),))

    def part(self, stage: Stage, site: Site) -> Part:
        return FlattenPart(stage, site)


class FlattenPart(Part):
    """Part of a flatten layer; the output is a view of the input."""

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        return x.reshape(*self.shape, x.shape[-1]), None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        return dy.reshape(x.shape)

    def export(self, graph: Any, value: str) -> str:
        return str(graph.node("Flatten", [value], self.layer.name, axis=1))
