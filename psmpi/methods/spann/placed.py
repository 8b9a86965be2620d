"""One layer on ranks: the units that each rank computes, the input units that it needs, and its local layer."""

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
    """One layer on `size` ranks.

    in_owners, out_owners: (units,) int32, the rank of each input and of each output unit, -1 for units that no score
    depends on. in_owners is None if the inputs are samples, of which each rank reads what it needs; out_owners is None
    if every rank has all outputs.
    """

    layer: Layer
    size: int
    in_owners: np.ndarray | None
    out_owners: np.ndarray | None

    def output_units(self, rank: int) -> Units:
        """Return the output units that a rank computes, increasing."""
        if self.out_owners is None:
            return np.arange(prod(self.layer.out_shape))
        return np.flatnonzero(self.out_owners == rank)

    def input_units(self, rank: int) -> Units:
        """Return the input units that a rank has, increasing; none if the inputs are samples."""
        return np.flatnonzero(self.in_owners == rank) if self.in_owners is not None else np.empty(0, np.int64)

    def needs(self, rank: int) -> Units:
        """Return the input units that a rank uses, increasing."""
        return self.input_units(rank)

    @cached_property
    def needed(self) -> list[Units]:
        """`needs` of each rank."""
        return [self.needs(rank) for rank in range(self.size)]

    @cached_property
    def moves(self) -> bool:
        """Whether some rank uses other input units than those that it has."""
        if self.in_owners is None:
            return False
        return any(not np.array_equal(units, self.input_units(rank)) for rank, units in enumerate(self.needed))

    def volume(self) -> int:
        """Return the numbers a sample that ranks send: each unit once to every other rank that uses it."""
        return sum(self.exchanged(rank)[0] for rank in range(self.size))

    def exchanged(self, rank: int) -> tuple[int, int]:
        """Return the numbers a sample that a rank receives, and those that it sends."""
        if self.in_owners is None:
            return 0, 0
        others = (units for user, units in enumerate(self.needed) if user != rank)
        sent = sum(int((self.in_owners[units] == rank).sum()) for units in others)
        return int((self.in_owners[self.needed[rank]] != rank).sum()), sent

    def local(self, rank: int) -> Layer:
        """Return the layer of a rank's units."""
        units = (len(self.output_units(rank)),)
        if isinstance(self.layer, Activation):
            return replace(self.layer, in_shape=units, out_shape=units)
        return self.layer.restrict(units[0], units)

    def boxes(self, rank: int) -> list[Box]:
        """Return a rank's boxes of the layer's parameters."""
        return [Box(p.name, (run,)) for p in self.layer.parameters() for run in _runs(self.output_units(rank))]


@dataclass(frozen=True, eq=False)
class PlacedSamples(Placed):
    """A pointwise layer on samples: a rank computes the values that it needs of `user`, the first other layer."""

    user: Placed

    def output_units(self, rank: int) -> Units:
        return self.user.needed[rank]

    needs = output_units


class PlacedSlab(Placed):
    """A layer of slabs: a rank has whole domains."""

    layer: Slab

    def domains(self, rank: int) -> range:
        """Return the domains of a rank."""
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
    """A dense layer of which a rank has some rows, and uses all input units: a mixing layer."""

    layer: Dense

    def needs(self, rank: int) -> Units:
        return np.arange(self.layer.in_shape[0])

    def local(self, rank: int) -> Layer:
        return replace(self.layer, out_shape=(len(self.output_units(rank)),))


class PlacedSparse(Placed):
    """A sparse layer of which a rank has some rows, and uses the input units that these rows read."""

    layer: Sparse

    def needs(self, rank: int) -> Units:
        pattern = self.layer.pattern
        return np.unique(pattern.columns[np.repeat(self._rows(rank), pattern.fan_in)]).astype(np.int64)

    def _rows(self, rank: int) -> np.ndarray:
        """Return (units,) bool: the rows that a rank has."""
        rows = np.zeros(self.layer.units, bool)
        rows[self.output_units(rank)] = True
        return rows

    def local(self, rank: int) -> Layer:
        seen = np.zeros(self.layer.pattern.inputs, bool)
        seen[self.needed[rank]] = True
        pattern, _ = self.layer.pattern.restricted(self._rows(rank), seen)
        return replace(self.layer, in_shape=(pattern.inputs,), out_shape=(pattern.rows,), pattern=pattern)

    def boxes(self, rank: int) -> list[Box]:
        starts, rows = self.layer.pattern.starts, _runs(self.output_units(rank))
        weight, *bias = self.layer.parameters()
        entries = [(int(starts[a]), int(starts[b])) for a, b in rows]
        weights = [Box(weight.name, (run,)) for run in entries if run[0] < run[1]]
        return weights + [Box(one.name, (run,)) for one in bias for run in rows]


class PlacedColumns(Placed):
    """A dense layer of which a rank has the columns of its input units; outputs are sums over ranks."""

    layer: Dense

    def bias(self, rank: int) -> bool:
        """Whether a rank adds the biases; rank 0 does."""
        return self.layer.bias and rank == 0

    def local(self, rank: int) -> Layer:
        return replace(self.layer, in_shape=(len(self.input_units(rank)),), bias=self.bias(rank))

    def boxes(self, rank: int) -> list[Box]:
        name, rows = self.layer.name, (0, self.layer.units)
        weights = [Box(f"{name}.weight", (rows, run)) for run in _runs(self.input_units(rank))]
        return [*weights, Box(f"{name}.bias", (rows,))] if self.bias(rank) else weights


def _runs(units: Units) -> list[tuple[int, int]]:
    """Return increasing units as runs (first, stop)."""
    cuts = np.flatnonzero(np.diff(units, prepend=-2) != 1)
    firsts, lasts = units[cuts], units[np.append(cuts[1:], len(units)) - 1] if len(units) else units
    return [(int(a), int(b) + 1) for a, b in zip(firsts, lasts, strict=True)]
