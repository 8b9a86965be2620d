"""A network on ranks: which units of each layer each of them has; made without MPI and arrays of weights."""

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
            kind, behind = PlacedSlab, _by_domains(layer, size, label)
        elif isinstance(layer, Sparse):
            alive = _alive(network, layer, users)
            kind, behind = PlacedSparse, _contiguous(alive, size, label, "use fewer ranks")
            if owners_of is not None and layer.name in owners_of:
                own = np.array(owners_of[layer.name][alive], np.int32)
                if layer.name in shared:
                    give_each(own, size)
                behind[alive] = own
        elif isinstance(layer, Dense) and layer.groups == 1 and len(layer.in_shape) == 1:
            if k == last and owners is None:
                raise UserError(
                    f"{label} is the only layer with weights, and --method spann cuts those before the scores: "
                    f"use --model slabs, or --method {WHOLE}"
                )
            if k == last and not distributed:
                kind, behind = PlacedColumns, None
            else:
                advice = "use --scores reduced" if k == last else "use fewer ranks"
                kind, behind = PlacedRows, _contiguous(_alive(network, layer, users), size, label, advice)
        else:
            _check_single(layer, owners, label, k > last)
            if k < last and owners is None:
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


def _check_single(layer: Layer, owners: np.ndarray | None, label: str, of_scores: bool) -> None:
    """UserError for a layer that takes more than single units, or whose weights no rank would have for itself."""
    if not (isinstance(layer, LayerNorm) or type(layer).sources is Layer.sources) or layer.inner:
        raise UserError(
            f"{label} is none of the layers that --method spann cuts (slab, sparse, dense, activations, normalizations "
            f"of single units, layer_norm): use --model slabs, or --method {WHOLE}"
        )
    if layer.parameters() and (owners is None or len(layer.in_shape) > 1):
        behind = "put it behind a layer of slabs on a line, a sparse or a dense one"
        advice = "use --scores distributed" if of_scores else behind
        raise UserError(f"{label} has weights that no rank would have for itself: {advice}")


def _by_domains(layer: Slab, size: int, label: str) -> np.ndarray:
    """The rank of each unit of slabs, (units,) int32; UserError for fewer domains than ranks."""
    count = layer.inputs.count
    if count < size:
        raise UserError(f"{label} has {count} domains for {size} ranks: use --domains {size} or more, or {count} ranks")
    found = np.empty(prod(layer.out_shape), np.int32)
    for rank, (first, behind) in enumerate(pairwise(even_edges(count, size))):
        for domain in range(first, behind):
            found[layer.outputs.cells(domain)] = rank
    return found


def _alive(network: Network, layer: Layer, uses: Uses) -> np.ndarray:
    """(units,) bool: the units that some score depends on."""
    return used(uses, Classes.of(range(network.classes)), layer.out_shape[0])


def _contiguous(alive: np.ndarray, size: int, label: str, advice: str) -> np.ndarray:
    """The rank of each of some units, which are dealt evenly in their order; -1 where they are not alive.

    UserError for fewer of these than ranks.
    """
    count = int(alive.sum())
    if count < size:
        raise UserError(f"{label} has {count} units for {size} ranks: {advice}")
    found = np.full(len(alive), -1, np.int32)
    found[alive] = np.repeat(np.arange(size, dtype=np.int32), np.diff(even_edges(count, size)))
    return found
