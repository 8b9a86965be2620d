"""Grids of ranks, and the deal of units over their axes: pure index arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from math import isqrt, prod

from psmpi.errors import UserError, counted
from psmpi.layout import even_edges

AXES = ("i", "j", "l")
# Names of grids, see `named_grid`.
NAMES = ("1d", "1d-sharded", "2d", "3d")


@dataclass(frozen=True)
class Grid:
    """Ranks on the axes i, j, l, of `sizes`; l varies fastest. Samples are dealt over i, units over j and l.

    products: how ranks make a layer's product: "gathered", from operands gathered along the axes; "panels", by SUMMA on
    a square grid; "whole", with every other activation whole on all ranks.
    """

    sizes: tuple[int, int, int]
    products: str = "gathered"

    @property
    def ranks(self) -> int:
        return prod(self.sizes)

    @property
    def text(self) -> str:
        """The grid in messages, such as 2 x 2 x 1."""
        return " x ".join(map(str, self.sizes))

    def size(self, axis: str) -> int:
        return self.sizes[AXES.index(axis)]

    def place(self, rank: int) -> dict[str, int]:
        """Return the rank's place on each axis."""
        _, j, l = self.sizes  # noqa: E741
        return {"i": rank // (j * l), "j": rank // l % j, "l": rank % l}

    def members(self, rank: int, *axes: str) -> list[int]:
        """Return the ranks that differ from this one on `axes` alone, in order, the first of `axes` slowest."""
        own, (_, j, l) = self.place(rank), self.sizes  # noqa: E741
        ranks = []
        for places in product(*(range(self.size(axis)) for axis in axes)):
            at = {**own, **dict(zip(axes, places, strict=True))}
            ranks.append((at["i"] * j + at["j"]) * l + at["l"])
        return ranks


@dataclass(frozen=True)
class Cut:
    """Units that are dealt over axes of a grid: `edges` of consecutive pieces, in the order of the places on `axes`.

    The first axis is the coarser one: the pieces along the second axis are consecutive, and together form a block.
    Without axes, each rank has all units.
    """

    grid: Grid
    axes: tuple[str, ...]
    edges: tuple[int, ...]

    @property
    def units(self) -> int:
        return self.edges[-1]

    @property
    def counts(self) -> list[int]:
        """The number of units of each piece."""
        return [b - a for a, b in pairwise(self.edges)]

    def _pieces(self, place: dict[str, int], axes: tuple[str, ...]) -> slice:
        """Return the pieces of all places that equal `place` on `axes`, the first of the cut's axes."""
        at, count = 0, prod(self.grid.size(axis) for axis in self.axes[len(axes) :])
        for axis in axes:
            at = at * self.grid.size(axis) + place[axis]
        return slice(at * count, (at + 1) * count)

    def piece(self, place: dict[str, int]) -> tuple[int, int]:
        """Return the units (first, stop) of a place."""
        at = self._pieces(place, self.axes)
        return self.edges[at.start], self.edges[at.stop]

    def block(self, place: dict[str, int]) -> tuple[int, int]:
        """Return the units (first, stop) of all places along the finer axis; with one axis, the place's units."""
        at = self._pieces(place, self.axes[:1])
        return self.edges[at.start], self.edges[at.stop]

    def fine(self, place: dict[str, int]) -> list[int]:
        """Return the numbers of units of the pieces of a place's block."""
        return self.counts[self._pieces(place, self.axes[:1])]

    def matches(self, other: Cut) -> bool:
        """Whether every rank has the same units of both cuts."""
        axes, other_axes = ([axis for axis in one.axes if self.grid.size(axis) > 1] for one in (self, other))
        return self.edges == other.edges and axes == other_axes

    def scaled(self, factor: int, divisor: int) -> Cut:
        """Return the cut with all edges times `factor / divisor`."""
        return Cut(self.grid, self.axes, tuple(edge * factor // divisor for edge in self.edges))


def cut(grid: Grid, axes: tuple[str, ...], units: int, grain: int, what: str, fix: str) -> Cut:
    """Return the cut of units in multiples of `grain`, dealt evenly over axes, larger pieces first.

    Raise UserError for too few units. what: start of its message, such as "dense2 has 10 units"; fix: its advice.
    """
    grains, pieces = units // grain, prod(grid.size(axis) for axis in axes)
    if grains < pieces:
        raise UserError(
            f"{what}, and a grid of {grid.text} ranks deals them to {pieces}: use {pieces} or more, or {fix}"
        )
    edges = [0]
    if len(axes) == 2:
        for a, b in pairwise(even_edges(grains, grid.size(axes[0]))):
            edges += [a + edge for edge in even_edges(b - a, grid.size(axes[1]))[1:]]
    else:
        edges = even_edges(grains, pieces)
    return Cut(grid, axes, tuple(edge * grain for edge in edges))


def named_grid(name: str, ranks: int) -> Grid:
    """Return the grid of a name; raise UserError for a number of ranks that the grid cannot have."""
    if name == "2d":
        root = isqrt(ranks)
        if root * root != ranks:
            raise UserError(
                f"--grid 2d needs a square number of ranks, and there are {ranks}: start {root * root} or "
                f"{(root + 1) ** 2}, or use --grid auto"
            )
        return Grid((root, root, 1), "panels")
    if name == "3d":
        root = round(ranks ** (1 / 3))
        if root**3 != ranks:
            below = root if root**3 < ranks else root - 1
            raise UserError(
                f"--grid 3d needs the cube of a number of ranks, and there are {ranks}: start {below**3} or "
                f"{(below + 1) ** 3}, or use --grid auto"
            )
        return Grid((root, root, root))
    return Grid((1, ranks, 1), "whole" if name == "1d" else "gathered")


def read_grid(text: str, ranks: int) -> Grid | None:
    """Return the grid of --grid, a name or the sizes of three axes; None for auto. Raise UserError for other text."""
    if text == "auto":
        return None
    if text in NAMES:
        return named_grid(text, ranks)
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and 0 < int(part) <= 1 << 20 for part in parts):
        raise UserError(
            f"--grid {text}: expected auto, {', '.join(NAMES)}, or the ranks along three axes, for instance 2,2,1"
        )
    sizes = int(parts[0]), int(parts[1]), int(parts[2])
    if prod(sizes) != ranks:
        raise UserError(
            f"--grid {text} is of {counted(prod(sizes), 'rank')}, and there are {ranks}: start {prod(sizes)}, or use "
            "--grid auto"
        )
    return Grid(sizes)


def all_grids(ranks: int) -> Iterator[Grid]:
    """Yield the grids of `ranks` ranks, those of the fewest axes first."""
    grids = [
        Grid((i, j, ranks // (i * j)))
        for i in range(1, ranks + 1)
        if ranks % i == 0
        for j in range(1, ranks // i + 1)
        if ranks // i % j == 0
    ]
    yield from sorted(grids, key=lambda grid: (sum(size > 1 for size in grid.sizes), grid.sizes))
