"""Embeddings: a vector for each token."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Parameter
from psmpi.nn.layers.base import Initial, Layer, Part, SampleSums, Site, Stage, place
from psmpi.nn.layers.table import Table
from psmpi.nn.layers.uses import Uses, grouped, stretched


@dataclass(frozen=True)
class Embedding(Layer):
    """Embedding: column t of a matrix (units, vocabulary) for each token t of a sequence (1, steps).

    Tokens are whole numbers 0 <= t < vocabulary.
    """

    vocabulary: int

    linear: ClassVar[bool] = True
    moves_gradient: ClassVar[bool] = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        features, steps = table.sequence(shape)
        if features != 1:
            raise UserError(
                f"{table.where}: embedding needs tokens, (1, steps), but its input has shape {shape}: let it be the "
                "first layer, and save the tokens as integers (samples, steps)"
            )
        return [cls(label, shape, (table.whole("units"), steps), table.whole("vocabulary"))]

    def parameters(self) -> tuple[Parameter, ...]:
        units = self.out_shape[0]
        return (Parameter(f"{self.name}.weight", (units, self.vocabulary), units),)

    def initial(self, kind: str, gain: float) -> dict[str, Initial]:
        """Return draws that give each vector a length of about 1, for any vocabulary: each output sums one term."""
        return {f"{self.name}.weight": Initial("uniform", sqrt(3 / self.out_shape[0]))}

    def sources(self, uses: Uses) -> Uses:
        return grouped(uses, self.out_shape[0])

    def users(self, uses: Uses) -> list[tuple[Parameter, Uses]]:
        units = self.out_shape[0]
        return [(parameter, stretched(grouped(uses, units), units)) for parameter in self.parameters()]

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.full(self.out_shape[0], wanted.any())

    def restrict(self, units: int, in_shape: tuple[int, ...]) -> Layer:
        if units != self.out_shape[0]:
            raise UserError(f"the units of {self.name} form one vector and cannot be dealt out one by one")
        return super().restrict(units, in_shape)

    def part(self, stage: Stage, site: Site) -> Part:
        return EmbeddingPart(stage, site)


class EmbeddingPart(Part):
    """Part of an embedding: x (1, steps, b) -> y (units, steps, b)."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Embedding)
        (parameter,) = self.layer.parameters()
        self.table, self.place = parameter.shape, place(site, parameter.name)

    def views(self, vector: np.ndarray) -> Any:
        """Return the view of the matrix (units, vocabulary)."""
        return vector[self.place : self.place + self.table[0] * self.table[1]].reshape(self.table)

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        self.ops.look_up(self.w, x.reshape(-1), y.reshape(len(y), -1))
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        tokens, flat = x.reshape(-1), dy.reshape(len(dy), -1)
        if isinstance(into, SampleSums):
            for weights, row in zip(into.weights, into.into, strict=True):
                self.ops.add_up(tokens, (dy * weights).reshape(flat.shape), self.views(row))
        elif into is not None:
            self.ops.add_up(tokens, flat, into)
        if dx is None:
            return dy
        # Tokens are discrete, so their gradient is 0.
        dx.fill(0)
        return dx

    def export(self, graph: Any, value: str) -> str:
        name = self.layer.name
        table = graph.constant(f"{name}.weight", np.ascontiguousarray(np.asarray(self.w).T))
        tokens = graph.node("Squeeze", [value, graph.constant(f"{name}.axis", np.array([1]))], f"{name}.tokens")
        vectors = graph.node("Gather", [table, tokens], f"{name}.found", axis=0)
        return str(graph.node("Transpose", [vectors], name, perm=[0, 2, 1]))
