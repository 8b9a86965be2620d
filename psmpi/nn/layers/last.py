"""Selection of the last step of sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from psmpi.nn.layers.base import Layer, Part, Site, Stage
from psmpi.nn.layers.table import Table


@dataclass(frozen=True)
class Last(Layer):
    """Last step of a sequence: (features, steps) -> (features,), for example the last state of a recurrent layer.

    In chunks of sequences the output is the last column: recurrent layers repeat their last state after a sequence's
    end.
    """

    keeps_range: ClassVar[bool] = True
    moves_gradient: ClassVar[bool] = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        features, _ = table.sequence(shape)
        return [cls(label, shape, (features,))]

    def part(self, stage: Stage, site: Site) -> Part:
        return LastPart(stage, site)


class LastPart(Part):
    """Part of `Last`: x (features, steps, b) -> y (features, b)."""

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        lengths = None
        # Lengths apply to whole sequences only: a chunk may have none of a sequence's steps.
        if self.space.span.begins and self.space.span.ends:
            lengths = self.space.span.lengths
        if lengths is None:
            y[...] = x[:, -1]
        else:
            self.ops.last_steps(x, lengths, y)
        return y, lengths

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        if dx is None:
            return dy
        if kept is None:
            dx.fill(0)
            dx[:, -1] = dy
        else:
            self.ops.last_steps_back(dy, kept, dx)
        return dx

    def export(self, graph: Any, value: str) -> str:
        name = self.layer.name
        axis = graph.constant(f"{name}.axis", np.array([2]))
        if not graph.lengths:
            at = graph.constant(f"{name}.at", np.array(-1))
            return str(graph.node("Gather", [value, at], name, axis=2))
        # ONNX recurrent layers return zeros after a sequence's end, so the last step is picked by its number.
        one, off = graph.constant(f"{name}.one", np.array(1, np.int32)), np.array([0, 1], np.float32)
        at = graph.node("Sub", [graph.lengths, one], f"{name}.at")
        depth = graph.constant(f"{name}.steps", np.array(self.layer.in_shape[1], np.int32))
        marks = graph.node("OneHot", [at, depth, graph.constant(f"{name}.marks", off)], f"{name}.mark", axis=-1)
        row = graph.node("Unsqueeze", [marks, graph.constant(f"{name}.row", np.array([1]))], f"{name}.marked")
        seen = graph.node("Mul", [value, row], f"{name}.seen")
        return str(graph.node("ReduceSum", [seen, axis], name, keepdims=0))
