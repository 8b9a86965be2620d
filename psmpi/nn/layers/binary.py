"""Binary layer: scores of two classes from one number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from psmpi.errors import UserError
from psmpi.nn.layers.base import Layer, Part, Site, Stage
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses, grouped


@dataclass(frozen=True)
class Binary(Layer):
    """Scores (1 - x) / 2 and (1 + x) / 2 of two classes, whose difference is x: (1, ...) -> (2, ...).

    One number x scores two classes, as in logistic regression and support vector machines. With t = -1 for class 0 and
    t = 1 for class 1, the loss `logistic` becomes log(1 + exp(-kappa t x)), `hinge` becomes max(0, 1 - kappa t x), and
    `squared` becomes (1 - t x)^2 / 2 (derived). The sign of x decides which score is larger.
    """

    moves_gradient: ClassVar[bool] = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        if shape[0] != 1 or len(shape) > 2:
            raise UserError(
                f"{table.where}: binary makes scores of two classes from one number, but its input has shape {shape}: "
                'put {type = "dense", units = 1} before it'
            )
        return [cls(label, shape, (2, *shape[1:]))]

    def sources(self, uses: Uses) -> Uses:
        return grouped(uses, 2)

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return wanted

    def part(self, stage: Stage, site: Site) -> Part:
        return BinaryPart(stage, site)


class BinaryPart(Part):
    """Part of `Binary` with k = 1 or 2 of the scores: x (1, ..., b) -> y (k, ..., b)."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        self.signs = [(-1.0, 1.0)[k] for k in np.flatnonzero(stage.outputs)]
        self.factors, self.half = (self.ops.put(np.array(a, self.dtype)) for a in ([-0.5, 0.5], [0.5]))

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        for sign, row in zip(self.signs, y, strict=True):
            factor = self.factors[:1] if sign < 0 else self.factors[1:]
            self.ops.affine(x.reshape(1, -1), factor, self.half, "identity", row.reshape(1, -1))
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        if dx is None:
            return dy
        terms = [(0.5 * sign, row.reshape(-1)) for sign, row in zip(self.signs, dy, strict=True)]
        self.ops.combine(dx.reshape(-1), *terms)
        return dx

    def export(self, graph: Any, value: str) -> str:
        name, axes = self.layer.name, (1,) * (len(self.shape) - 1)
        factors = np.array(self.signs, np.float32).reshape(-1, *axes) / 2
        scaled = graph.node("Mul", [value, graph.constant(f"{name}.factors", factors)], f"{name}.scaled")
        return str(graph.node("Add", [scaled, graph.constant(f"{name}.half", np.array(0.5, np.float32))], name))
