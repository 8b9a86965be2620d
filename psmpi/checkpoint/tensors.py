"""Tensors of a checkpoint, and the places of their elements in the flat vector."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import prod

import numpy as np

from psmpi.checkpoint.format import CHUNK, chunk_of
from psmpi.layout import Layout, Parameter, Runs, Stretch, cross, spelled

# Elements of a tensor whose places are computed at a time.
SLAB = 4 * CHUNK


@dataclass(frozen=True)
class Tensor:
    """A named tensor in a file. stretches: places of its elements in the flat vector, in the order of the tensor.

    A tensor of a part has only the part's units, (units, *shape of a unit); a whole one has its parameter's shape.
    """

    name: str
    shape: tuple[int, ...]
    stretches: tuple[Stretch, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def spans(self) -> tuple[tuple[int, ...], ...]:
        """(first, last, offset) of each run: elements [first, last) begin at `offset` of the flat vector."""
        return tuple(zip(*(column.tolist() for column in spelled(self.stretches)), strict=True))

    @staticmethod
    def of(parameter: Parameter, pieces: Sequence[Stretch]) -> Tensor:
        """The tensor of some or all units of a parameter; pieces: their stretches, in the order of the units."""
        starts = accumulate((p.count * p.length for p in pieces), initial=0)
        stretches = tuple(replace(p, first=at) for at, p in zip(starts, pieces, strict=False))
        units = sum(p.count * p.length for p in pieces) // parameter.unit_size
        if units == parameter.units:
            return Tensor(parameter.name, parameter.shape, stretches)
        axes = [*accumulate(parameter.shape, lambda a, b: a * b)]
        unit_shape = parameter.shape[axes.index(parameter.units) + 1 :]
        return Tensor(parameter.name, (units, *unit_shape), stretches)

    @cached_property
    def _firsts(self) -> list[int]:
        return [stretch.first for stretch in self.stretches]

    def elements(self, first: int, last: int) -> list[Stretch]:
        """Stretches of the tensor's elements [first, last)."""
        some = slice(max(0, bisect_right(self._firsts, first) - 1), bisect_left(self._firsts, last))
        return [part for stretch in self.stretches[some] for part in stretch.elements(first, last)]

    def meet(
        self, starts: np.ndarray, stops: np.ndarray, first: int = 0, last: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Intersect elements [first, last) of the tensor with sorted intervals of the flat vector, [starts, stops).

        Returns four arrays (runs,) int64, in the order of the tensor: first element, stop element, number k of the
        interval, and start in the flat vector of each common run.
        """
        elements, ends, begins = spelled(self.elements(first, self.size if last is None else last))
        by_offset = np.argsort(begins, kind="stable")
        elements, begins, sizes = elements[by_offset], begins[by_offset], (ends - elements)[by_offset]
        span, interval, a, b = cross(begins, begins + sizes, starts, stops)
        firsts = elements[span] + a - begins[span]
        order = np.argsort(firsts, kind="stable")
        return firsts[order], (firsts + b - a)[order], interval[order], a[order]

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Slabs [first, last) of the tensor's elements, each of whole chunks of the file and about SLAB elements."""
        rows = chunk_of(self.shape)[0]
        row = self.size // self.shape[0]
        step = max(1, SLAB // (rows * row)) * rows * row
        return ((first, min(first + step, self.size)) for first in range(0, self.size, step))


def held_runs(layout: Layout, part: Sequence[int] | None) -> Runs:
    """Runs of the flat vector in a file. part: classes whose part the file holds; None: all.

    Elements that no class uses belong to the part of class 0, so that all parts together make the whole.
    """
    if part is None:
        return Runs.union([(0, layout.size)])
    return Runs.union(layout.part(part).intervals + (layout.dead.intervals if 0 in part else ()))


def make_tensors(layout: Layout, part: Sequence[int] | None = None) -> list[Tensor]:
    """Tensors of a file with the parameters of `layout`. part: classes whose part the file holds; None: all."""
    in_file = held_runs(layout, part)
    tensors = []
    for parameter, pieces in zip(layout.parameters, layout.banded, strict=True):
        # A unit is in the file whole or not at all.
        some = [part for p in pieces for part in _within(p.stretch(parameter.unit_size), in_file)]
        if some:
            tensors.append(Tensor.of(parameter, some))
    return tensors


def _within(stretch: Stretch, runs: Runs) -> list[Stretch]:
    """Parts of a stretch that are inside the runs."""
    common = runs & Runs(((stretch.offset, stretch.stop),))
    return [part for start, stop in common.intervals for part in stretch.within(start, stop)]
