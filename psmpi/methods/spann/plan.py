"""A network on ranks: the units of each layer that each rank has; made without MPI and arrays of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Box, Classes, Layout, Ownership, Runs, even_edges
from psmpi.methods.spann.placed import Placed, PlacedColumns, PlacedRows, PlacedSamples, PlacedSlab, PlacedSparse, Units
from psmpi.nn.layers import Layer
from psmpi.nn.layers.chain import uses_of
from psmpi.nn.layers.dense import Dense
from psmpi.nn.layers.flatten import Flatten
from psmpi.nn.layers.layer_norm import LayerNorm
from psmpi.nn.layers.slab import Slab
from psmpi.nn.layers.sparse import Sparse
from psmpi.nn.layers.uses import Uses, used
from psmpi.nn.network import Network
from psmpi.registry import WHOLE


@dataclass(frozen=True, eq=False)
class Plan:
    """A network on ranks. steps: its layers without those that flatten, as units are numbered in memory order."""

    network: Network
    size: int
    steps: list[Placed] = field(default_factory=list)

    @property
    def inputs(self) -> list[Units]:
        """The features of samples that each rank reads."""
        return self.steps[0].needed

    @property
    def scores(self) -> list[int] | None:
        """The number of scores of each rank, in the order of ranks; None: each rank has all scores."""
        owners = self.steps[-1].out_owners
        return None if owners is None else np.bincount(owners, minlength=self.size).tolist()

    def volume(self) -> int:
        """Return the numbers a sample that ranks send in a forward pass, and as many in a backward pass."""
        return sum(step.volume() for step in self.steps)

    def boxes(self, rank: int) -> list[Box]:
        """Return the boxes that a rank computes with: a parameter is on one rank, or no score depends on it."""
        return [box for step in self.steps for box in step.boxes(rank)]

    def ownership(self, layout: Layout) -> Ownership:
        """Return the runs of each rank; rank 0 also has, at the end, the weights that no score depends on."""
        first, *others = Ownership.of_boxes(layout, map(self.boxes, range(self.size)))
        return Ownership((Runs.union([*first.intervals, *layout.dead.intervals]), *others))


def make_plan(
    network: Network, size: int, distributed: bool, owners_of: Mapping[str, np.ndarray] | None = None
) -> Plan:
    """Return the plan of a network. distributed: the scores are dealt to ranks; else each rank has all scores.

    owners_of: (units,) int32, the rank of each unit of some sparse layers, by name; other layers are cut into runs of
    neighbours. Raise UserError for layers that cannot be cut, and for too few domains or units.
    """
    steps: list[Placed] = []
    owners: np.ndarray | None = None
    uses = zip(network.layers, uses_of(network.layers, network.score_uses()), strict=True)
    layers = [(layer, users) for layer, users in uses if not isinstance(layer, Flatten)]
    last = max(k for k, (layer, _) in enumerate(layers) if layer.linear)
    shared = shared_layers(network)
    # Pointwise layers on samples, before the first other layer.
    waiting: list[Layer] = []
    for k, (layer, users) in enumerate(layers):
        label = f"{network.named(layer.name)} of --model {network.name}"
        kind: type[Placed] = Placed
        out_owners = owners
        if k == last and not isinstance(layer, Dense):
            raise UserError(
                f"{label} makes the scores, which --method spann needs a dense layer for: add one after it, "
                f'{{type = "dense", units = {network.classes}}}, or use --method {WHOLE}'
            )
        if isinstance(layer, Slab):
            kind, out_owners = PlacedSlab, _by_domains(layer, size, label)
        elif isinstance(layer, Sparse):
            alive = _alive(network, layer, users)
            kind, out_owners = PlacedSparse, _contiguous(alive, size, label, "use fewer ranks")
            if owners_of is not None and layer.name in owners_of:
                own = np.array(owners_of[layer.name][alive], np.int32)
                if layer.name in shared:
                    give_each(own, size)
                out_owners[alive] = own
        elif isinstance(layer, Dense) and layer.groups == 1 and len(layer.in_shape) == 1:
            if k == last and owners is None:
                raise UserError(
                    f"{label} is the only layer with weights, and --method spann cuts those before the scores: "
                    f"use --model slabs, or --method {WHOLE}"
                )
            if k == last and not distributed:
                kind, out_owners = PlacedColumns, None
            else:
                advice = "use --scores reduced" if k == last else "use fewer ranks"
                kind, out_owners = PlacedRows, _contiguous(_alive(network, layer, users), size, label, advice)
        else:
            _check_single(layer, owners, label, k > last)
            if k < last and owners is None:
                waiting.append(layer)
                continue
        steps.append(kind(layer, size, owners, out_owners))
        if waiting:
            steps[:0] = [PlacedSamples(one, size, None, None, steps[0]) for one in waiting]
            waiting = []
        owners = out_owners
    return Plan(network, size, steps)


def chains(network: Network) -> list[list[Sparse]]:
    """Return the runs of consecutive sparse layers before the scores; a partitioner cuts each run as a whole."""
    runs: list[list[Sparse]] = [[]]
    linear = [layer for layer in network.layers if layer.linear]
    for layer in linear[:-1]:
        if isinstance(layer, Sparse):
            runs[-1].append(layer)
        elif runs[-1]:
            runs.append([])
    return [chain for chain in runs if chain]


def shared_layers(network: Network) -> set[str]:
    """Return the names of layers of which each rank needs a unit: those before sums over all ranks."""
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
    """Give each of `size` ranks at least one unit, in place: ranks without units take the last unit of the fullest.

    owners: (units,) int32, the rank of each unit.
    """
    counts = np.bincount(owners, minlength=size)
    for rank in np.flatnonzero(counts == 0):
        most = int(counts.argmax())
        owners[np.flatnonzero(owners == most)[-1]] = rank
        counts[most] -= 1
        counts[rank] = 1


def _check_single(layer: Layer, owners: np.ndarray | None, label: str, of_scores: bool) -> None:
    """Raise UserError for a layer that couples units, or whose weights belong to no single rank."""
    if not (isinstance(layer, LayerNorm) or type(layer).sources is Layer.sources) or layer.inner:
        raise UserError(
            f"{label} is a layer that --method spann does not cut; it cuts slab, sparse and dense layers, activations, "
            f"normalizations of single units and layer_norm: use --model slabs, or --method {WHOLE}"
        )
    if layer.parameters() and (owners is None or len(layer.in_shape) > 1):
        order = "put it after a layer of slabs on a line, a sparse or a dense one"
        advice = "use --scores distributed" if of_scores else order
        raise UserError(f"{label} has weights that belong to no single rank: {advice}")


def _by_domains(layer: Slab, size: int, label: str) -> np.ndarray:
    """Return the rank of each unit of slabs, (units,) int32; raise UserError for fewer domains than ranks."""
    count = layer.inputs.count
    if count < size:
        raise UserError(f"{label} has {count} domains for {size} ranks: use --domains {size} or more, or {count} ranks")
    owners = np.empty(prod(layer.out_shape), np.int32)
    for rank, (first, stop) in enumerate(pairwise(even_edges(count, size))):
        for domain in range(first, stop):
            owners[layer.outputs.cells(domain)] = rank
    return owners


def _alive(network: Network, layer: Layer, uses: Uses) -> np.ndarray:
    """Return (units,) bool: the units that some score depends on."""
    return used(uses, Classes.of(range(network.classes)), layer.out_shape[0])


def _contiguous(alive: np.ndarray, size: int, label: str, advice: str) -> np.ndarray:
    """Return the rank of each unit, (units,) int32: the alive ones are dealt evenly in order, -1 for the others.

    Raise UserError for fewer alive units than ranks.
    """
    count = int(alive.sum())
    if count < size:
        raise UserError(f"{label} has {count} units for {size} ranks: {advice}")
    owners = np.full(len(alive), -1, np.int32)
    owners[alive] = np.repeat(np.arange(size, dtype=np.int32), np.diff(even_edges(count, size)))
    return owners
