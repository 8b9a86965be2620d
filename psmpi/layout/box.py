"""Boxes: ranges on the axes of one parameter, and the runs of elements that they cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from psmpi.layout.split import even_edges


@dataclass(frozen=True)
class Box:
    """A range [first, last) on each axis of one parameter: rows, columns, a tile or a slab.

    ranges: one for each leading axis; trailing axes without a range are whole. A box of whole rows is a *run*.
    """

    parameter: str
    ranges: tuple[tuple[int, int], ...] = ()

    def of(self, shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Return the range on every axis of `shape`; raise ValueError if the box is not inside `shape`."""
        if len(self.ranges) > len(shape):
            raise ValueError(f"{self.parameter}: a box of {len(self.ranges)} axes, but the parameter has {len(shape)}")
        for axis, ((first, last), length) in enumerate(zip(self.ranges, shape, strict=False)):
            if not 0 <= first <= last <= length:
                raise ValueError(
                    f"{self.parameter}: [{first}, {last}) on axis {axis}, which has {length} elements: give "
                    f"0 <= first <= last <= {length}"
                )
        return (*self.ranges, *((0, length) for length in shape[len(self.ranges) :]))


def tile(parameter: str, shape: Sequence[int], grid: Sequence[int], place: Sequence[int]) -> Box:
    """Return the box at `place` of a grid that cuts the leading axes of `shape` evenly, longer pieces first.

    The grid (ranks,) cuts rows, the grid (1, ranks) cuts columns. Grid axes beyond the axes of `shape` cut nothing:
    all places along them have the same box.
    """
    edges = [even_edges(length, pieces) for length, pieces in zip(shape, grid, strict=False)]
    return Box(parameter, tuple((cuts[k], cuts[k + 1]) for cuts, k in zip(edges, place, strict=False)))


def box_runs(shape: Sequence[int], ranges: Sequence[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Return the runs of a box in a flattened tensor of `shape`: their first elements (runs,) int64 and their length.

    All runs have the same length and are in the order of the elements.
    """
    # Axes after the last cut axis are whole, so a run continues across them.
    cut = max((k for k, (n, r) in enumerate(zip(shape, ranges, strict=True)) if r != (0, n)), default=0)
    strides = [prod(shape[k + 1 :]) for k in range(len(shape))]
    starts = np.zeros(1, np.int64)
    for k in range(cut):
        starts = (starts[:, None] + np.arange(*ranges[k], dtype=np.int64) * strides[k]).reshape(-1)
    first, last = ranges[cut]
    length = (last - first) * strides[cut]
    return (starts + first * strides[cut], length) if length and len(starts) else (np.empty(0, np.int64), 0)
