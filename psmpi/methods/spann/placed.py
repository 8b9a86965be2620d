"""One layer on ranks: the units that each has, those that it needs of the layer before, and its own layer of these."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np

from psmpi.layout import Box, even_edges
from psmpi.nn.layers import Layer
from psmpi.nn.layers.activation import Activation
from psmpi.nn.layers.dense import Dense
from psmpi.nn.layers.slab import Slab
from psmpi.nn.layers.sparse import Sparse

Units = np.ndarray


@dataclass(frozen=True, eq=False)
class Placed:
    """One layer on `size` ranks. before, behind: (units,) int32, the rank that has each unit that goes in, and out.

    Units that no score depends on are of no rank, -1. before is None where the samples go in: each rank reads what it
    needs of these. behind is None where every rank has all of what comes out.
    """

    layer: Layer
    size: int
    before: np.ndarray | None
    behind: np.ndarray | None

    def own(self, rank: int) -> Units:
        """The units that a rank makes, increasing."""
        if self.behind is None:
            return np.arange(prod(self.layer.out_shape))
        return np.flatnonzero(self.behind == rank)

    def had(self, rank: int) -> Units:
        """The units of those that go in which a rank has; none of samples."""
        return np.flatnonzero(self.before == rank) if self.before is not None else np.empty(0, np.int64)

    def needs(self, rank: int) -> Units:
        """The units that go in which a rank uses, increasing."""
        return self.had(rank)

    @cached_property
    def needed(self) -> list[Units]:
        """`needs` of each rank."""
        return [self.needs(rank) for rank in range(self.size)]

    @cached_property
    def moves(self) -> bool:
        """Whether some rank uses units in other than those that it has."""
        if self.before is None:
            return False
        return any(not np.array_equal(units, self.had(rank)) for rank, units in enumerate(self.needed))

    def volume(self) -> int:
        """Numbers a sample that go to other ranks: of each unit one to each of these."""
        return sum(self.exchanged(rank)[0] for rank in range(self.size))

    def exchanged(self, rank: int) -> tuple[int, int]:
        """Numbers a sample that come to a rank, and that go from it."""
        if self.before is None:
            return 0, 0
        others = (units for user, units in enumerate(self.needed) if user != rank)
        out = sum(int((self.before[units] == rank).sum()) for units in others)
        return int((self.before[self.needed[rank]] != rank).sum()), out

    def local(self, rank: int) -> Layer:
        """The layer of a rank's units."""
        units = (len(self.own(rank)),)
        if isinstance(self.layer, Activation):
            return replace(self.layer, in_shape=units, out_shape=units)
        return self.layer.restrict(units[0], units)

    def boxes(self, rank: int) -> list[Box]:
        """A rank's part of the layer's parameters."""
        return [Box(p.name, (run,)) for p in self.layer.parameters() for run in _runs(self.own(rank))]


@dataclass(frozen=True, eq=False)
class PlacedSamples(Placed):
    """A layer that takes each value of a sample by itself: ranks compute those that the first other layer uses."""

    user: Placed

    def own(self, rank: int) -> Units:
        return self.user.needed[rank]

    needs = own


class PlacedSlab(Placed):
    """A layer of slabs: a rank has whole domains."""

    layer: Slab

    def domains(self, rank: int) -> range:
        """The domains of a rank."""
        edges = even_edges(self.layer.inputs.count, self.size)
        return range(edges[rank], edges[rank + 1])

    def needs(self, rank: int) -> Units:
        return self.layer.of(self.domains(rank)).needs

    def local(self, rank: int) -> Layer:
        return self.layer.of(self.domains(rank))

    def boxes(self, rank: int) -> list[Box]:
        domains = self.domains(rank)
        return [Box(p.name, ((domains.start, domains.stop),)) for p in self.layer.parameters()]


class PlacedRows(Placed):
    """A dense layer of which a rank has some rows, and uses all units that go in: a mixing layer."""

    layer: Dense

    def needs(self, rank: int) -> Units:
        return np.arange(self.layer.in_shape[0])

    def local(self, rank: int) -> Layer:
        return replace(self.layer, out_shape=(len(self.own(rank)),))


class PlacedSparse(Placed):
    """A sparse layer: a rank has rows of it, and uses the units that these see."""

    layer: Sparse

    def needs(self, rank: int) -> Units:
        pattern = self.layer.pattern
        return np.unique(pattern.columns[np.repeat(self._mine(rank), pattern.fan_in)]).astype(np.int64)

    def _mine(self, rank: int) -> np.ndarray:
        """(units,) bool: whether a rank makes them."""
        mine = np.zeros(self.layer.units, bool)
        mine[self.own(rank)] = True
        return mine

    def local(self, rank: int) -> Layer:
        seen = np.zeros(self.layer.pattern.inputs, bool)
        seen[self.needed[rank]] = True
        pattern, _ = self.layer.pattern.restricted(self._mine(rank), seen)
        return replace(self.layer, in_shape=(pattern.inputs,), out_shape=(pattern.rows,), pattern=pattern)

    def boxes(self, rank: int) -> list[Box]:
        starts, rows = self.layer.pattern.starts, _runs(self.own(rank))
        weight, *bias = self.layer.parameters()
        entries = [(int(starts[a]), int(starts[b])) for a, b in rows]
        found = [Box(weight.name, (run,)) for run in entries if run[0] < run[1]]
        return found + [Box(one.name, (run,)) for one in bias for run in rows]


class PlacedColumns(Placed):
    """A dense layer of which a rank has the columns of its units, and adds up what others make of theirs."""

    layer: Dense

    def bias(self, rank: int) -> bool:
        """Whether a rank adds the biases: one does."""
        return self.layer.bias and rank == 0

    def local(self, rank: int) -> Layer:
        return replace(self.layer, in_shape=(len(self.had(rank)),), bias=self.bias(rank))

    def boxes(self, rank: int) -> list[Box]:
        name, rows = self.layer.name, (0, self.layer.units)
        found = [Box(f"{name}.weight", (rows, run)) for run in _runs(self.had(rank))]
        return [*found, Box(f"{name}.bias", (rows,))] if self.bias(rank) else found


def _runs(units: Units) -> list[tuple[int, int]]:
    """Increasing units as runs (first, behind the last)."""
    cuts = np.flatnonzero(np.diff(units, prepend=-2) != 1)
    firsts, lasts = units[cuts], units[np.append(cuts[1:], len(units)) - 1] if len(units) else units
    return [(int(a), int(b) + 1) for a, b in zip(firsts, lasts, strict=True)]
