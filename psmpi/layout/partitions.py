"""Partitions of the neurons of a sparse network into parts, of about equal work: pure functions of their arguments.

Layers are patterns between consecutive sets of neurons; the inputs of the first one are of no part, for each part reads
those that it needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.errors import UserError
from psmpi.layout.pattern import Pattern
from psmpi.layout.volume import Owners, needs, weights_of

# By how much the work of a part of a graph or hypergraph may be above the mean.
EPSILON = 0.03
# By how much more values parts of an earlier layer may need in another one, for which they are taken.
AGAIN = 0.02
NEEDS = "a {0} partition needs {1}, which is not installed: pip install 'psmpi[partition]', or choose slab"


def partition(
    layers: Sequence[Pattern],
    parts: int,
    mode: str,
    weights: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> Owners:
    """The part of each neuron of each layer, see MODES; the same wherever, and by however many threads, it is made.

    weights: work of the neurons of each layer, whole numbers, by default as of `weights_of`. UserError for a mode that
    is not known or whose package is not installed, for layers that do not follow each other, and for fewer neurons in a
    layer than parts.
    """
    check_mode(mode)
    for number, (before, layer) in enumerate(pairwise(layers), 2):
        if layer.inputs != before.rows:
            raise UserError(f"sparse layer {number} has {layer.inputs} inputs, and the one before {before.rows} units")
    least = min((one.rows for one in layers), default=0)
    if not 1 <= parts <= least:
        raise UserError(f"{parts} parts of a network whose smallest layer has {least} units: use 1 to {least}")
    made = MODES[mode](layers, parts, weights_of(layers) if weights is None else weights, seed)
    return [own.astype(np.int32) for own in made]


def _slab(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """Neighbours of each layer."""
    return [_runs(one, parts) for one in weights]


def _contiguous(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """Neighbours in the order of the whole network: parts are of different layers."""
    return _apart(_runs(np.concatenate(weights), parts), layers)


def _random(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """Neurons of each layer in an order that is drawn by (seed, layer)."""
    found = []
    for number, one in enumerate(weights):
        order = np.random.default_rng([seed, number]).permutation(len(one))
        own = np.empty(len(one), np.int64)
        own[order] = _runs(one[order], parts)
        found.append(own)
    return found


def _graph(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """The fewest connections between parts, by METIS."""
    import pymetis

    firsts = _firsts(layers)
    ends = [
        (layer.columns.astype(np.int64) + firsts[k], layer.row_numbers.astype(np.int64) + firsts[k + 1])
        for k, layer in enumerate(layers[1:])
    ]
    one = np.concatenate([a for a, _ in ends] + [b for _, b in ends]) if ends else np.empty(0, np.int64)
    other = np.concatenate([b for _, b in ends] + [a for a, _ in ends]) if ends else one
    order = np.lexsort((other, one))
    starts = np.concatenate([[0], np.cumsum(np.bincount(one, minlength=firsts[-1]))])
    if parts == 1 or not len(one):
        return _contiguous(layers, parts, weights, seed)
    options = pymetis.Options(seed=seed, ufactor=round(1000 * EPSILON))
    _, found = pymetis.part_graph(
        parts,
        pymetis.CSRAdjacency(starts.astype(np.int32), other[order].astype(np.int32)),
        vweights=np.maximum(1, np.concatenate(weights)).astype(np.int32),
        recursive=False,
        options=options,
    )
    return _apart(np.asarray(found), layers)


def _hypergraph(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """The fewest values that parts send each other, by Mt-KaHyPar."""
    return _apart(_cut(hypernets(layers), np.concatenate(weights), parts, seed), layers)


def _layered(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """The fewest values that go to a layer, layer by layer, each cut into equal parts, by Mt-KaHyPar.

    A layer with the pattern of an earlier one takes the parts of that where they cost about as much as they did there.
    """
    found = [_runs(weights[0], parts)]
    known: dict[tuple[str, bytes], list[tuple[int, np.ndarray]]] = {}
    for layer, one in zip(layers[1:], weights[1:], strict=True):
        before, same = found[-1], known.setdefault((layer.digest, one.tobytes()), [])
        own = next((own for sent, own in same if _sent(layer, before, own, parts) <= (1 + AGAIN) * sent), None)
        if own is None:
            # What is sent is of parts that are known: a neuron of each of them stands for them all.
            nets = [[int(before[net[0]]), *net[1:]] for net in _nets(layer, 0, parts)]
            fixed = [*range(parts), *[-1] * layer.rows]
            own = _cut(nets, np.concatenate([np.zeros(parts, np.int64), one]), parts, seed, fixed)[parts:]
            same.append((_sent(layer, before, own, parts), own))
        found.append(own)
    return found


def _sent(layer: Pattern, before: np.ndarray, behind: np.ndarray, parts: int) -> int:
    """The values that a layer's parts need of other parts before it."""
    return len(needs(layer, before, behind, parts)[0])


Mode = Callable[[Sequence[Pattern], int, Sequence[np.ndarray], int], Owners]
MODES: dict[str, Mode] = {
    "slab": _slab,
    "contiguous": _contiguous,
    "random": _random,
    "graph": _graph,
    "hypergraph": _hypergraph,
    "layered": _layered,
}


def check_mode(mode: str) -> None:
    """UserError for a mode that is not known, or whose package is not installed."""
    if mode not in MODES:
        raise UserError(f"partition {mode!r} is unknown: choose one of {', '.join(MODES)}")
    package = {"graph": "pymetis", "hypergraph": "mtkahypar", "layered": "mtkahypar"}.get(mode, "")
    if package and find_spec(package) is None:
        raise UserError(NEEDS.format(mode, package))


def hypernets(layers: Sequence[Pattern]) -> list[list[int]]:
    """For each neuron of a network that has successors, its number, counted layer by layer, and theirs."""
    firsts = _firsts(layers)
    return [net for k, layer in enumerate(layers[1:]) for net in _nets(layer, firsts[k], firsts[k + 1])]


def _runs(weights: np.ndarray, parts: int) -> np.ndarray:
    """Runs of neurons of about equal weight, each of at least one: the part of each."""
    n, ends = len(weights), np.cumsum(np.maximum(0, weights), dtype=np.float64)
    edges = np.searchsorted(ends - weights / 2, ends[-1] * np.arange(1, parts) / parts)
    numbers = np.arange(1, parts)
    # A part has a neuron however heavy the others are.
    edges = np.maximum.accumulate(np.maximum(edges, numbers) - numbers) + numbers
    edges = np.minimum(edges, n - parts + numbers)
    return np.searchsorted(edges, np.arange(n), side="right")


def _firsts(layers: Sequence[Pattern]) -> list[int]:
    """The number of the first neuron of each layer, and of all."""
    found: list[int] = np.cumsum([0, *(one.rows for one in layers)]).tolist()
    return found


def _apart(owners: np.ndarray, layers: Sequence[Pattern]) -> Owners:
    return np.split(owners, _firsts(layers)[1:-1])


def _nets(layer: Pattern, before: int, behind: int) -> list[list[int]]:
    """For each input of a layer that a unit has, its number and those of these units, counted from two firsts."""
    back, pins = layer.transposed, (layer.transposed.rows + behind).tolist()
    edges = back.starts.tolist()
    return [[before + c, *pins[a:b]] for c, (a, b) in enumerate(pairwise(edges)) if a < b]


@cache
def _kahypar() -> tuple[Any, Any]:
    """Mt-KaHyPar on one thread, which changes nothing of what the process may run on."""
    import mtkahypar

    return mtkahypar, mtkahypar.initialize(1, False)


def _cut(
    nets: list[list[int]], weights: np.ndarray, parts: int, seed: int, fixed: list[int] | None = None
) -> np.ndarray:
    """The part of each vertex of a hypergraph; fixed: those that are known, -1 elsewhere."""
    if parts == 1 or not nets:
        return np.zeros(len(weights), np.int64) if parts == 1 else _runs(weights, parts)
    cores = os.sched_getaffinity(0)
    kahypar, library = _kahypar()
    try:
        kahypar.set_seed(seed)
        context = library.context_from_preset(kahypar.PresetType.DETERMINISTIC)
        context.set_partitioning_parameters(parts, EPSILON, kahypar.Objective.KM1)
        context.logging = False
        graph = library.create_hypergraph(
            context, len(weights), len(nets), nets, np.maximum(1, weights).tolist(), [1] * len(nets)
        )
        if fixed is not None:
            graph.add_fixed_vertices(fixed, parts)
        found = np.asarray(graph.partition(context).get_partition())
    finally:
        # Its threads stay on cores that they are given, and so would this one.
        os.sched_setaffinity(0, cores)
    return found
