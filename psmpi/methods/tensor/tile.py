"""A dense layer of which a rank of a grid has some inputs, some outputs and a tile of the weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar

import numpy as np

from psmpi.layout import Parameter
from psmpi.methods.tensor.plan import Tile
from psmpi.methods.tensor.products import Products
from psmpi.nn.layers.base import Layer, Part, Site, Stage, place
from psmpi.nn.layers.uses import Uses, grouped, stretched


@dataclass(frozen=True)
class TileLayer(Layer):
    """A rank's share of a dense layer. in_shape, out_shape: of the rank's units; tile: (rows, columns) of its weight.

    cut: the whole layer on the grid; saves: whether gathered inputs are kept; products: with the other ranks, None in a
    network that only describes a rank.
    """

    tile: tuple[int, int]
    cut: Tile
    rank: int
    saves: bool
    products: Products | None = field(default=None, compare=False, repr=False)

    linear: ClassVar[bool] = True
    moves_gradient: ClassVar[bool] = True

    def parameters(self) -> tuple[Parameter, ...]:
        rows, units = self.tile[0], self.out_shape[0]
        weight = [Parameter(f"{self.name}.weight", self.tile, rows)] if rows else []
        return (*weight, *([Parameter(f"{self.name}.bias", (units,), units)] if self.cut.layer.bias else []))

    def sources(self, uses: Uses) -> Uses:
        return stretched(grouped(uses, self.out_shape[0]), self.in_shape[0])

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return wanted

    def absorbs(self, following: Sequence[Layer], fold: bool) -> int:
        return int(bool(following and following[0].activation))

    @property
    def macs(self) -> int:
        rows, inputs = self.cut.product(self.cut.grid.place(self.rank))
        return rows * inputs * self.steps

    def room(self, batch: int) -> int:
        """Return the numbers that a pass keeps besides inputs and outputs."""
        return self.cut.room(self.cut.grid.place(self.rank), self.saves) * self.steps * batch

    def workspace(self, batch: int, wanted: bool) -> dict[str, int]:
        """Return the numbers of each temporary array of the products."""
        return self.cut.workspace(self.cut.grid.place(self.rank), self.steps * batch, wanted, self.saves)

    def buffer_numbers(self, stage: Stage, batch: int, writable: bool, packed: bool) -> int:
        return self.room(batch)

    def workspace_numbers(self, stage: Stage, batch: int, wanted: bool, packed: bool) -> dict[str, int]:
        return {**super().workspace_numbers(stage, batch, wanted, packed), **self.workspace(batch, wanted)}

    @property
    def steps(self) -> int:
        """The columns of a sample."""
        return prod(self.in_shape[1:])

    def part(self, stage: Stage, site: Site) -> Part:
        return TilePart(stage, site)


class TilePart(Part):
    """x (own inputs, ..., b) -> y (own outputs, ..., b), with the activation that follows."""

    def __init__(self, stage: Stage, site: Site):
        super().__init__(stage, site)
        layer = self.layer
        assert isinstance(layer, TileLayer) and layer.products is not None
        self.tiled, self.products, self.tile, self.units = layer, layer.products, layer.tile, layer.out_shape[0]
        # Numbers a sample that the products keep of a pass.
        self.keeps = layer.room(1)
        bias = layer.cut.layer.bias
        self.at = place(site, f"{layer.name}.weight") if self.tile[0] else 0
        self.bias = place(site, f"{layer.name}.bias") if bias else -1
        # Zeros in place of the biases of a layer without, and an array for their gradient.
        self.no_bias, self.no_gradient = (self.ops.zeros(0 if bias else self.units, site.dtype) for _ in range(2))

    def arrays(self) -> list[np.ndarray]:
        return [self.no_bias, self.no_gradient]

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> None:
        self.w = self._views(w, self.no_bias)
        self.products.bind(self.w[0])
        self.g = None if g is None else self._views(g, self.no_gradient)

    def _views(self, vector: np.ndarray, biases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tile (rows, columns) and the biases (1, own outputs) in a local vector."""
        tile = vector[self.at : self.at + self.tile[0] * self.tile[1]].reshape(self.tile)
        return tile, (vector[self.bias : self.bias + self.units] if self.bias >= 0 else biases)[None]

    def room(self, batch: int, writable: bool) -> Any:
        """Make the array that the products keep of a pass."""
        return self.ops.empty(self.keeps * batch, self.dtype)

    def reserve(self, batch: int) -> None:
        for name, numbers in self.tiled.workspace(batch, False).items():
            self.space.take(name, numbers)

    def reserve_backward(self, batch: int, wanted: bool) -> None:
        for name, numbers in self.tiled.workspace(batch, wanted).items():
            self.space.take(name, numbers)

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert y is not None
        rows, out = x.reshape(len(x), -1), y.reshape(len(y), -1)
        kept = room[: self.keeps * x.shape[-1]].reshape(self.keeps // self.tiled.steps, rows.shape[1])
        self.products.forward(rows, out, kept)
        self.ops.finish(out[None], self.w[1], self.activation)
        return y, kept

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        rows, gradient = x.reshape(len(x), -1), dy.reshape(len(dy), -1)
        tile, biases = (None, None) if into is None else into
        self.ops.finish_back(y.reshape(gradient.shape)[None], gradient[None], self.activation, biases)
        self.products.backward(rows, gradient, None if dx is None else dx.reshape(len(dx), -1), tile, kept)
        return dy if dx is None else dx
