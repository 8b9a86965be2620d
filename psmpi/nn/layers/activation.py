"""Elementwise activations: sigmoid, tanh, relu, identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.nn.layers.base import OVER, Layer, Part, Site, Stage
from psmpi.nn.layers.table import Table

ACTIVATIONS = ("sigmoid", "tanh", "relu", "identity")
ONNX = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu"}


@dataclass(frozen=True)
class Activation(Layer):
    """Elementwise activation `kind`; most layers absorb an activation that follows them."""

    kind: str

    place = OVER

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        return [cls(label, shape, shape, table.kind)]

    @property
    def activation(self) -> str:
        return self.kind

    def part(self, stage: Stage, site: Site) -> Part:
        return ActivationPart(stage, site)


class ActivationPart(Part):
    """Activation that no other layer has absorbed: x -> y of the same shape."""

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        if y is None:
            y = x
        else:
            y[...] = x
        self.ops.activate(self.activation, y)
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        self.ops.activate_back(self.activation, y, dy)
        return dy

    def export(self, graph: Any, value: str) -> str:
        return export_activation(graph, value, self.activation, self.layer.name)


def export_activation(graph: Any, value: str, kind: str, label: str) -> str:
    """Add an activation to an ONNX graph; return the name of its output."""
    return str(graph.node(ONNX[kind], [value], f"{label}.{kind}"))
