"""Fields of neurons cut into domains, as a grid cuts a plane: the neurons of each, and those that a halo adds."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np


@dataclass(frozen=True)
class Domains:
    """A field (channels, height, width) of neurons, each of whose planes a grid (rows, columns) cuts into equal tiles.

    Neurons are numbered as the field lies in memory, domains row by row. A line of neurons is a field (1, 1, width).
    """

    field: tuple[int, int, int]
    grid: tuple[int, int]

    @property
    def count(self) -> int:
        return prod(self.grid)

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width of a domain's tile."""
        return self.field[1] // self.grid[0], self.field[2] // self.grid[1]

    @property
    def size(self) -> int:
        """Neurons of a domain."""
        return self.field[0] * prod(self.tile)

    def margins(self, halo: int) -> tuple[int, int]:
        """How far windows go beyond a tile, in height and in width: not at all where one domain has the whole axis."""
        return halo * (self.grid[0] > 1), halo * (self.grid[1] > 1)

    def window_size(self, halo: int) -> int:
        """Neurons of a window, those beyond the field's edges counted."""
        (height, width), (down, right) = self.tile, self.margins(halo)
        return self.field[0] * (height + 2 * down) * (width + 2 * right)

    def cells(self, domain: int) -> np.ndarray:
        """The neurons of a domain, (size,) int64, increasing."""
        return self.window(domain, 0)

    def window(self, domain: int, halo: int) -> np.ndarray:
        """The neurons of a domain and of the `halo` rows and columns around it, (window_size,) int64.

        In the order channel, row, column; -1 beyond the edges of the field.
        """
        channels, height, width = self.field
        row, column = divmod(domain, self.grid[1])
        down, right = self.margins(halo)
        rows = np.arange(row * self.tile[0] - down, (row + 1) * self.tile[0] + down)
        columns = np.arange(column * self.tile[1] - right, (column + 1) * self.tile[1] + right)
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        plane = np.where(inside, rows[:, None] * width + columns, -1)
        shifts = np.arange(channels)[:, None, None] * (height * width)
        found: np.ndarray = np.where(inside, plane + shifts, -1).reshape(-1).astype(np.int64)
        return found
