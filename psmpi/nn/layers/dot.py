"""Scalar product of the two steps of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from psmpi.errors import UserError
from psmpi.nn.layers.base import Layer, Part, Site, Stage
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses, grouped, stretched


@dataclass(frozen=True)
class Dot(Layer):
    """Sum over units of the product of the two steps: (units, 2) -> (1,).

    If the steps are the vectors of a row and a column, the output is an entry of a matrix of rank `units` (matrix
    completion).
    """

    moves_gradient: ClassVar[bool] = True
    whole_sequences: ClassVar[bool] = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        if len(shape) != 2 or shape[1] != 2:
            raise UserError(
                f"{table.where}: dot multiplies the two steps of sequences (units, 2), but its input has shape {shape}"
            )
        return [cls(label, shape, (1,))]

    def with_steps(self, steps: int) -> Layer:
        if steps != 2:
            raise UserError(f"{self.name} multiplies two steps, but the sequences have {steps}")
        return self

    def sources(self, uses: Uses) -> Uses:
        return stretched(grouped(uses, 1), self.in_shape[0])

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return wanted

    @property
    def macs(self) -> int:
        return self.in_shape[0]

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        return 2 * self.in_shape[0] * (batch + 1)

    def part(self, stage: Stage, site: Site) -> Part:
        return DotPart(stage, site)


class DotPart(Part):
    """Part of a scalar product: x (units, 2, b) -> y (1, b)."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        self.units = self.layer.in_shape[0]
        self.scratch = self.ops.empty(0, self.dtype)
        # A product with the first computes sums over units, a product with the second their transpose.
        self.ones = [self.ops.put(np.ones(shape, self.dtype)) for shape in ((1, 1, self.units), (1, self.units, 1))]

    def reserve(self, batch: int) -> None:
        if self.scratch.size < 2 * self.units * batch:
            self.scratch = self.ops.empty(2 * self.units * batch, self.dtype)

    def arrays(self) -> list[np.ndarray]:
        return [self.scratch, *self.ones]

    def _pair(self, batch: int) -> list[np.ndarray]:
        """Return two scratch arrays (units, batch)."""
        n = self.units * batch
        return [self.scratch[at : at + n].reshape(self.units, batch) for at in (0, n)]

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        first, second = self._pair(x.shape[-1])
        first[...], second[...] = x[:, 0], x[:, 1]
        self.ops.multiply(first.reshape(-1), second.reshape(-1))
        self.ops.matmul(self.ones[0], first.reshape(1, *first.shape), y.reshape(1, *y.shape))
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        if dx is None:
            return dy
        factor, step = self._pair(x.shape[-1])
        self.ops.matmul(self.ones[1], dy.reshape(1, *dy.shape), factor.reshape(1, *factor.shape))
        for k in range(2):
            step[...] = x[:, 1 - k]
            self.ops.multiply(step.reshape(-1), factor.reshape(-1))
            dx[:, k] = step
        return dx

    def export(self, graph: Any, value: str) -> str:
        name = self.layer.name
        steps = [
            graph.node("Gather", [value, graph.constant(f"{name}.at{k}", np.array(k))], f"{name}.step{k}", axis=2)
            for k in range(2)
        ]
        product = graph.node("Mul", steps, f"{name}.product")
        total = graph.node(
            "ReduceSum", [product, graph.constant(f"{name}.axis", np.array([1]))], f"{name}.sum", keepdims=1
        )
        return str(graph.node("Reshape", [total, graph.constant(f"{name}.shape", np.array([-1, 1]))], name))
