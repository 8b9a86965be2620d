"""The tensors of a file, and where their elements lie in the flat vector."""

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

# Elements of a tensor whose places are looked up at a time.
SLAB = 4 * CHUNK


@dataclass(frozen=True)
class Tensor:
    """A named tensor in a file, and where its elements lie in the flat vector, in the order of the tensor.

    A tensor of a part has only its units, (units, the shape of one); a whole one has its parameter's shape.
    """

    name: str
    shape: tuple[int, ...]
    stretches: tuple[Stretch, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def spans(self) -> tuple[tuple[int, ...], ...]:
        """Elements [first, last) and where these begin in the flat vector, an object for each run of them."""
        return tuple(zip(*(column.tolist() for column in spelled(self.stretches)), strict=True))

    @staticmethod
    def of(parameter: Parameter, pieces: Sequence[Stretch]) -> Tensor:
        """The tensor of some units of a parameter, `pieces` in the order of the units."""
        starts = accumulate((p.count * p.length for p in pieces), initial=0)
        stretches = tuple(replace(p, first=at) for at, p in zip(starts, pieces, strict=False))
        units = sum(p.count * p.length for p in pieces) // parameter.unit_size
        if units == parameter.units:
            return Tensor(parameter.name, parameter.shape, stretches)
        axes = [*accumulate(parameter.shape, lambda a, b: a * b)]
        rest = parameter.shape[axes.index(parameter.units) + 1 :]
        return Tensor(parameter.name, (units, *rest), stretches)

    @cached_property
    def _firsts(self) -> list[int]:
        return [stretch.first for stretch in self.stretches]

    def elements(self, first: int, last: int) -> list[Stretch]:
        """Where its elements [first, last) lie."""
        some = slice(max(0, bisect_right(self._firsts, first) - 1), bisect_left(self._firsts, last))
        return [part for stretch in self.stretches[some] for part in stretch.elements(first, last)]

    def meet(
        self, starts: np.ndarray, stops: np.ndarray, first: int = 0, last: int | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What sorted intervals of the flat vector have of elements [first, last) of it, in the tensor's order.

        First element, element behind the last, number of the interval, start in the flat vector: four arrays
        (meetings,) int64.
        """
        elements, ends, begins = spelled(self.elements(first, self.size if last is None else last))
        by_offset = np.argsort(begins, kind="stable")
        elements, begins, sizes = elements[by_offset], begins[by_offset], (ends - elements)[by_offset]
        span, interval, a, b = cross(begins, begins + sizes, starts, stops)
        found = elements[span] + a - begins[span]
        order = np.argsort(found, kind="stable")
        return found[order], (found + b - a)[order], interval[order], a[order]

    def slabs(self) -> Iterator[tuple[int, int]]:
        """Its elements [first, last) cut into slabs, whole chunks of a file each, whose runs are few."""
        rows = chunk_of(self.shape)[0]
        row = self.size // self.shape[0]
        step = max(1, SLAB // (rows * row)) * rows * row
        return ((first, min(first + step, self.size)) for first in range(0, self.size, step))


def held_runs(layout: Layout, part: Sequence[int] | None) -> Runs:
    """The runs of the flat vector in a file; what no class uses goes with class 0, so that all parts make the whole."""
    if part is None:
        return Runs.union([(0, layout.size)])
    return Runs.union(layout.part(part).intervals + (layout.dead.intervals if 0 in part else ()))


def make_tensors(layout: Layout, part: Sequence[int] | None = None) -> list[Tensor]:
    """The tensors of a file with the parameters of `layout`, or with the part of some classes."""
    held = held_runs(layout, part)
    found = []
    for parameter, pieces in zip(layout.parameters, layout.banded, strict=True):
        # A piece is held whole or not at all.
        some = [part for p in pieces for part in _held(p.stretch(parameter.unit_size), held)]
        if some:
            found.append(Tensor.of(parameter, some))
    return found


def _held(stretch: Stretch, held: Runs) -> list[Stretch]:
    """The parts of a stretch that are in the runs."""
    runs = held & Runs(((stretch.offset, stretch.stop),))
    return [part for start, stop in runs.intervals for part in stretch.within(start, stop)]
