"""Which units of each layer each rank has, and which of the layer before it needs; made without MPI and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Box, Classes, Layout, Ownership, Runs, even_edges
from psmpi.nn.layers import Layer
from psmpi.nn.layers.activation import Activation
from psmpi.nn.layers.chain import uses_of
from psmpi.nn.layers.dense import Dense
from psmpi.nn.layers.flatten import Flatten
from psmpi.nn.layers.layer_norm import LayerNorm
from psmpi.nn.layers.slab import Slab
from psmpi.nn.layers.sparse import Sparse
from psmpi.nn.layers.uses import Uses, used
from psmpi.nn.network import Network
from psmpi.registry import WHOLE

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
        """What a rank has of the layer's parameters."""
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


@dataclass(frozen=True, eq=False)
class Plan:
    """A network on ranks; steps: its layers, those that flatten left out, as units are numbered as they lie."""

    network: Network
    size: int
    steps: list[Placed] = field(default_factory=list)

    @property
    def inputs(self) -> list[Units]:
        """The features of samples that each rank uses."""
        return self.steps[0].needed

    @property
    def scores(self) -> list[int] | None:
        """The scores that each rank has, one after the other; None: each has all."""
        behind = self.steps[-1].behind
        return None if behind is None else np.bincount(behind, minlength=self.size).tolist()

    def volume(self) -> int:
        """Numbers a sample that layers send to other ranks in a forward pass, and back in a backward pass."""
        return sum(step.volume() for step in self.steps)

    def boxes(self, rank: int) -> list[Box]:
        """What a rank computes with: each element of the flat vector is on one rank, or no score depends on it."""
        return [box for step in self.steps for box in step.boxes(rank)]

    def ownership(self, layout: Layout) -> Ownership:
        """The elements of the flat vector that each rank has; the first one has, at the end, those of no use."""
        first, *others = Ownership.of_boxes(layout, map(self.boxes, range(self.size)))
        return Ownership((Runs.union([*first.intervals, *layout.dead.intervals]), *others))


def make_plan(
    network: Network, size: int, distributed: bool, owners_of: Mapping[str, np.ndarray] | None = None
) -> Plan:
    """The plan of a network; distributed: the scores are dealt to ranks, else each rank has the sums of all.

    owners_of: the rank of each unit of some sparse layers, by their names; of others neighbours are together. UserError
    for layers that cannot be cut, and for too few domains or units.
    """
    steps: list[Placed] = []
    owners: np.ndarray | None = None
    uses = zip(network.layers, uses_of(network.layers, network.score_uses()), strict=True)
    layers = [(layer, users) for layer, users in uses if not isinstance(layer, Flatten)]
    last = max(k for k, (layer, _) in enumerate(layers) if layer.linear)
    shared = shared_layers(network)
    # Those before the first layer with weights, of which the samples are.
    waiting: list[Layer] = []
    for k, (layer, users) in enumerate(layers):
        label = f"{network.named(layer.name)} of --model {network.name}"
        kind: type[Placed] = Placed
        behind = owners
        if k == last and not isinstance(layer, Dense):
            raise UserError(
                f"{label} makes the scores, and --method spann cuts a dense layer there: add one behind it, "
                f'{{type = "dense", units = {network.classes}}}, or use --method {WHOLE}'
            )
        if isinstance(layer, Slab):
            kind = PlacedSlab
            count = layer.inputs.count
            if count < size:
                raise UserError(
                    f"{label} has {count} domains for {size} ranks: use --domains {size} or more, or {count} ranks"
                )
            behind = np.empty(prod(layer.out_shape), np.int32)
            edges = even_edges(count, size)
            for rank in range(size):
                for domain in range(edges[rank], edges[rank + 1]):
                    behind[layer.outputs.cells(domain)] = rank
        elif isinstance(layer, Dense) and layer.groups == 1 and len(layer.in_shape) == 1:
            kind = PlacedRows
            if k == last and not distributed:
                if owners is None:
                    raise UserError(
                        f"{label} is the only layer with weights, and --method spann cuts those before the scores: "
                        f"use --model slabs, or --method {WHOLE}"
                    )
                kind, behind = PlacedColumns, None
            elif layer.units < size:
                advice = "use --scores reduced" if k == last else "use fewer ranks"
                raise UserError(f"{label} has {layer.units} units for {size} ranks: {advice}")
            else:
                behind = _contiguous(_alive(network, layer, users), size)
        elif isinstance(layer, Sparse):
            kind, alive = PlacedSparse, _alive(network, layer, users)
            if alive.sum() < size:
                raise UserError(f"{label} has {alive.sum()} units for {size} ranks: use fewer ranks")
            behind = _contiguous(alive, size)
            if owners_of is not None and layer.name in owners_of:
                own = np.array(owners_of[layer.name][alive], np.int32)
                if layer.name in shared:
                    give_each(own, size)
                behind[alive] = own
        elif not (isinstance(layer, LayerNorm) or type(layer).sources is Layer.sources) or layer.inner:
            raise UserError(
                f"{label} is none of the layers that --method spann cuts (slab, sparse, dense, activations, "
                f"normalizations of single units): use --model slabs, or --method {WHOLE}"
            )
        elif layer.parameters() and (owners is None or len(layer.in_shape) > 1):
            advice = (
                "use --scores distributed"
                if k > last
                else "put it behind a layer of slabs on a line, a sparse or a dense one"
            )
            raise UserError(f"{label} has weights that no rank would have for itself: {advice}")
        elif k < last and owners is None:
            waiting.append(layer)
            continue
        steps.append(kind(layer, size, owners, behind))
        if waiting:
            steps[:0] = [PlacedSamples(one, size, None, None, steps[0]) for one in waiting]
            waiting = []
        owners = behind
    return Plan(network, size, steps)


def chains(network: Network) -> list[list[Sparse]]:
    """Sparse layers that follow each other, without that of the scores: what a partitioner cuts together."""
    found: list[list[Sparse]] = [[]]
    linear = [layer for layer in network.layers if layer.linear]
    for layer in linear[:-1]:
        if isinstance(layer, Sparse):
            found[-1].append(layer)
        elif found[-1]:
            found.append([])
    return [chain for chain in found if chain]


def shared_layers(network: Network) -> set[str]:
    """The names of layers of which each rank needs a unit: before sums over all ranks, of scores or of their units."""
    names: set[str] = set()
    linear = ""
    last = [layer for layer in network.layers if layer.linear][-1]
    for layer in network.layers:
        if layer is last or layer.couples_units:
            names.add(linear)
        if layer.linear:
            linear = layer.name
    return names


def give_each(owners: np.ndarray, size: int) -> None:
    """Let each of `size` ranks have one of some units (units,) int32 at least: the last ones of who has most."""
    counts = np.bincount(owners, minlength=size)
    for rank in np.flatnonzero(counts == 0):
        most = int(counts.argmax())
        owners[np.flatnonzero(owners == most)[-1]] = rank
        counts[most] -= 1
        counts[rank] = 1


def _alive(network: Network, layer: Layer, uses: Uses) -> np.ndarray:
    """(units,) bool: the units that some score depends on."""
    return used(uses, Classes.of(range(network.classes)), layer.out_shape[0])


def _contiguous(alive: np.ndarray, size: int) -> np.ndarray:
    """The rank of each of some units, which are dealt evenly in their order; -1 where they are not alive."""
    found = np.full(len(alive), -1, np.int32)
    found[alive] = np.repeat(np.arange(size, dtype=np.int32), np.diff(even_edges(int(alive.sum()), size)))
    return found
