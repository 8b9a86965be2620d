"""Normalization of features to unit length, the input of cosine layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.nn.layers.base import Layer, Part, Site, Stage
from psmpi.nn.layers.uses import Uses, grouped, stretched

# Added to squared lengths, so that zero vectors stay zero and have finite gradients.
EPS = 1e-12


@dataclass(frozen=True)
class UnitLength(Layer):
    """Features of each sample divided by their length: x / sqrt(|x|^2 + EPS); every `cosine` layer follows one."""

    exact = True
    keeps = True
    leads = True

    def sources(self, uses: Uses) -> Uses:
        features = self.in_shape[0]
        return stretched(grouped(uses, features), features)

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        return batch

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        return {**dict.fromkeys(("rows", "normal rows"), stage.size * batch), "zeros": batch}

    def part(self, stage: Stage, site: Site) -> Part:
        return UnitLengthPart(stage, site)


class UnitLengthPart(Part):
    """Part of a normalization to unit length: x (features, b) -> y (features, b)."""

    def room(self, batch: int, writable: bool) -> Any:
        """Return an array for 1 / sqrt(|x|^2 + EPS), (batch,)."""
        return self.ops.empty(batch, self.dtype)

    def reserve(self, batch: int) -> None:
        self.space.take("rows", self.size, batch)
        self.space.take("zeros", batch)

    def reserve_backward(self, batch: int, wanted: bool) -> None:
        self.space.take("normal rows", self.size, batch)

    def _rows(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return a copy of values (features, b) with a row for each sample, (b, features)."""
        rows = self.space.take(name, values.shape[1], values.shape[0])
        rows[...] = values.T
        return rows

    def _put_back(self, rows: np.ndarray, factors: np.ndarray, out: np.ndarray) -> None:
        """Write rows (b, features), each times its factor (b,), to out (features, b)."""
        zeros = self.space.take("zeros", len(rows))
        zeros.fill(0)
        self.ops.affine(rows, factors, zeros, "identity", rows)
        out[...] = rows.T

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        rows, factors = self._rows("rows", x), room[: x.shape[1]]
        self.ops.row_factors(rows[None], EPS, 1.0, factors[None])
        self._put_back(rows, factors, y)
        return y, factors

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        rows, normal = self._rows("rows", dy), self._rows("normal rows", x)
        self.ops.project_rows(normal[None], kept[None], 1.0, rows[None, None])
        self._put_back(rows, kept, dy)
        return dy

    def export(self, graph: Any, value: str) -> str:
        name = self.layer.name
        square = graph.node("Mul", [value, value], f"{name}.square")
        mean = graph.node("ReduceMean", [square], f"{name}.mean", axes=[1])
        # ReduceMean instead of ReduceSum: later ONNX versions pass the axes of ReduceSum in another way.
        size = np.float32(self.size)
        eps = graph.constant(f"{name}.eps", np.array(EPS / size, np.float32))
        length = graph.node("Sqrt", [graph.node("Add", [mean, eps], f"{name}.sum")], f"{name}.deviation")
        unit = graph.node("Div", [value, length], f"{name}.apart")
        return str(graph.node("Div", [unit, graph.constant(f"{name}.root", np.sqrt(size))], name))
