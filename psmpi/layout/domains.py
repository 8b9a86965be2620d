"""Domains of a field of neurons: the neurons of each tile, and the neurons of its halo."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np


@dataclass(frozen=True)
class Domains:
    """A field (channels, height, width) of neurons that a grid (rows, columns) cuts into equal tiles, channels uncut.

    Neurons are numbered in C order of the field, domains row by row. A line of neurons is a field (1, 1, width).
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
        """Number of neurons of a domain."""
        return self.field[0] * prod(self.tile)

    def margins(self, halo: int) -> tuple[int, int]:
        """Return the halo rows and halo columns on each side of a tile: 0 on an axis that the grid does not cut."""
        return halo * (self.grid[0] > 1), halo * (self.grid[1] > 1)

    def window_size(self, halo: int) -> int:
        """Return the number of places of a window, including places beyond the field's edges."""
        (height, width), (down, right) = self.tile, self.margins(halo)
        return self.field[0] * (height + 2 * down) * (width + 2 * right)

    def cells(self, domain: int) -> np.ndarray:
        """Return the neurons of a domain, (size,) int64, increasing."""
        return self.window(domain, 0)

    def window(self, domain: int, halo: int) -> np.ndarray:
        """Return the neurons of a domain and of the `halo` rows and columns around it, (window_size,) int64.

        The order is channel, row, column. Places beyond the edges of the field hold -1.
        """
        channels, height, width = self.field
        row, column = divmod(domain, self.grid[1])
        down, right = self.margins(halo)
        rows = np.arange(row * self.tile[0] - down, (row + 1) * self.tile[0] + down)
        columns = np.arange(column * self.tile[1] - right, (column + 1) * self.tile[1] + right)
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        plane = np.where(inside, rows[:, None] * width + columns, -1)
        shifts = np.arange(channels)[:, None, None] * (height * width)
        neurons: np.ndarray = np.where(inside, plane + shifts, -1).reshape(-1).astype(np.int64)
        return neurons
