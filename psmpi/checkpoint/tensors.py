"""The tensors of a file, and where their elements lie in the flat vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import numpy as np

from psmpi.layout import Layout, Parameter, Piece, Runs, cross


@dataclass(frozen=True)
class Tensor:
    """A named tensor in a file: `spans` say which elements of it, [first, last), lie where in the flat vector.

    A tensor of a part has only its units, (units, the shape of one); a whole one has its parameter's shape.
    """

    name: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int, int], ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @staticmethod
    def of(parameter: Parameter, pieces: Sequence[Piece]) -> Tensor:
        """The tensor of some units of a parameter, `pieces` in the order of the units."""
        sizes = [(p.last - p.first) * parameter.unit_size for p in pieces]
        starts = accumulate(sizes, initial=0)
        spans = tuple((at, at + n, p.offset) for at, n, p in zip(starts, sizes, pieces, strict=False))
        units = sum(p.last - p.first for p in pieces)
        if units == parameter.units:
            return Tensor(parameter.name, parameter.shape, spans)
        axes = [*accumulate(parameter.shape, lambda a, b: a * b)]
        rest = parameter.shape[axes.index(parameter.units) + 1 :]
        return Tensor(parameter.name, (units, *rest), spans)

    @cached_property
    def _by_offset(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First element, start and stop in the flat vector of each span, in the order of the flat vector."""
        first, last, offset = np.array(self.spans, np.int64).T
        order = np.argsort(offset)
        return first[order], offset[order], (offset + last - first)[order]

    def meet(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The elements [first, last) that sorted intervals of the flat vector have of it, in the tensor's order.

        first, last, number of the interval, start in the flat vector: four arrays (meetings,) int64.
        """
        elements, begins, ends = self._by_offset
        span, interval, a, b = cross(begins, ends, starts, stops)
        first = elements[span] + a - begins[span]
        order = np.argsort(first)
        return first[order], (first + b - a)[order], interval[order], a[order]


def held_runs(layout: Layout, part: Sequence[int] | None) -> Runs:
    """The runs of the flat vector in a file; what no class uses goes with class 0, so that all parts make the whole."""
    if part is None:
        return Runs.union([(0, layout.size)])
    return Runs.union(layout.part(part).intervals + (layout.dead.intervals if 0 in part else ()))


def make_tensors(layout: Layout, part: Sequence[int] | None = None) -> list[Tensor]:
    """The tensors of a file with the parameters of `layout`, or with the part of some classes."""
    held = held_runs(layout, part)
    found = []
    for parameter, pieces in zip(layout.parameters, layout.by_parameter, strict=True):
        offsets = np.array([p.offset for p in pieces], np.int64)
        # A piece is held whole or not at all.
        k = held.stops.searchsorted(offsets, side="right")
        inside = np.append(held.starts, layout.size)[k] <= offsets
        some = [piece for piece, there in zip(pieces, inside, strict=True) if there]
        if some:
            found.append(Tensor.of(parameter, some))
    return found
