"""Mean and max pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.errors import UserError
from psmpi.nn.layers.base import Layer, Part, Site, Stage
from psmpi.nn.layers.table import Table


@dataclass(frozen=True)
class Pool(Layer):
    """Mean or max pooling over size x size windows with stride `size`; rows and columns of partial windows are dropped.

    kind: "mean" or "max".
    """

    kind: str
    size: int

    keeps_range = True
    moves_gradient = True

    @classmethod
    def read(cls, table: Table, label: str, shape: tuple[int, ...]) -> list[Layer]:
        c, h, w = table.image(shape)
        size = table.whole("size", 2)
        if min(h, w) < size:
            raise UserError(f"{table.where}: a window of {size} x {size} does not fit in {h} x {w}")
        return [cls(label, shape, (c, h // size, w // size), table.kind.split("_")[0], size)]

    @property
    def note(self) -> str:
        sides = ("rows", "columns")
        lost = [f"the last {n % self.size} of {n} {side}" for n, side in zip(self.in_shape[1:], sides, strict=True)
                if n % self.size]  # fmt: skip
        if not lost:
            return ""
        return f"windows of {self.size} x {self.size} do not cover {' and '.join(lost)}"

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        return int(bool(following and following[0].activation))

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        return {**super().workspace_numbers(stage, batch, wanted, packed), "pooled": stage.size * batch}

    def part(self, stage: Stage, site: Site) -> Part:
        return PoolPart(stage, site)


class PoolPart(Part):
    """Part of pooling, with the activation that follows it: x (c, h, w, b) -> y (c, h // size, w // size, b)."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        assert isinstance(self.layer, Pool)
        self.kind, self.window = self.layer.kind, self.layer.size

    def reserve_backward(self, batch: int, wanted: bool) -> None:
        self.space.take("pooled", self.size, batch)

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        pool = self.ops.mean_pool if self.kind == "mean" else self.ops.max_pool
        pool(x, self.window, y, self.activation)
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        if dx is None:
            return dy
        self.ops.activate_back(self.activation, y, dy)
        if self.kind == "mean":
            self.ops.mean_pool_back(dy, self.window, dx)
        else:
            self.ops.max_pool_back(x, self.space.take("pooled", *y.shape), dy, self.window, dx)
        return dx

    def export(self, graph: Any, value: str) -> str:
        sizes = [self.window] * 2
        kind = "AveragePool" if self.kind == "mean" else "MaxPool"
        return str(graph.node(kind, [value], self.layer.name, kernel_shape=sizes, strides=sizes))
