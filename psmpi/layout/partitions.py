"""Partitions of the neurons of a sparse network into parts of about equal work: pure functions of their arguments.

Layers are patterns between consecutive sets of neurons. The inputs of the first layer belong to no part: each part
reads the inputs that it needs.
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

# Largest excess of a part's work over the mean, as a fraction of the mean, in graph and hypergraph partitions.
EPSILON = 0.03
# Largest excess of values sent, as a fraction, at which a layer reuses the parts of an earlier layer.
REUSE = 0.02
NEEDS = "a {0} partition needs {1}, which is not installed: pip install 'psmpi[partition]', or choose slab"


def partition(
    layers: Sequence[Pattern],
    parts: int,
    mode: str,
    weights: Sequence[np.ndarray] | None = None,
    seed: int = 0,
) -> Owners:
    """Return the part of each neuron of each layer, a list of (rows,) int32; mode: a key of MODES.

    The result is the same on any machine and for any number of threads. weights: work of the neurons of each layer,
    (rows,) whole numbers, by default `weights_of(layers)`. UserError for a mode that is unknown or whose package is
    not installed, for layers whose sizes do not match, and for fewer neurons in a layer than parts.
    """
    check_mode(mode)
    for number, (before, layer) in enumerate(pairwise(layers), 2):
        if layer.inputs != before.rows:
            raise UserError(
                f"sparse layer {number} has {layer.inputs} inputs, but the layer before it has {before.rows} units"
            )
    least = min((one.rows for one in layers), default=0)
    if not 1 <= parts <= least:
        raise UserError(f"{parts} parts of a network whose smallest layer has {least} units: use 1 to {least}")
    owners = MODES[mode](layers, parts, weights_of(layers) if weights is None else weights, seed)
    return [own.astype(np.int32) for own in owners]


def _slab(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """Runs of neighbouring neurons in each layer."""
    return [_runs(one, parts) for one in weights]


def _contiguous(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """Runs of neighbouring neurons in the order of the whole network: each part lies in few layers."""
    return _apart(_runs(np.concatenate(weights), parts), layers)


def _random(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """Runs of the neurons of each layer in a random order, drawn from (seed, layer)."""
    owners = []
    for number, work in enumerate(weights):
        order = np.random.default_rng([seed, number]).permutation(len(work))
        own = np.empty(len(work), np.int64)
        own[order] = _runs(work[order], parts)
        owners.append(own)
    return owners


def _graph(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """Parts with few connections between them, by METIS."""
    import pymetis

    firsts = _firsts(layers)
    ends = [
        (layer.columns.astype(np.int64) + firsts[k], layer.row_numbers.astype(np.int64) + firsts[k + 1])
        for k, layer in enumerate(layers[1:])
    ]
    tails = np.concatenate([a for a, _ in ends] + [b for _, b in ends]) if ends else np.empty(0, np.int64)
    heads = np.concatenate([b for _, b in ends] + [a for a, _ in ends]) if ends else tails
    order = np.lexsort((heads, tails))
    starts = np.concatenate([[0], np.cumsum(np.bincount(tails, minlength=firsts[-1]))])
    if parts == 1 or not len(tails):
        return _contiguous(layers, parts, weights, seed)
    options = pymetis.Options(seed=seed, ufactor=round(1000 * EPSILON))
    _, membership = pymetis.part_graph(
        parts,
        pymetis.CSRAdjacency(starts.astype(np.int32), heads[order].astype(np.int32)),
        vweights=np.maximum(1, np.concatenate(weights)).astype(np.int32),
        recursive=False,
        options=options,
    )
    return _apart(np.asarray(membership), layers)


def _hypergraph(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """Parts that send each other few values, by Mt-KaHyPar."""
    return _apart(_cut(hypernets(layers), np.concatenate(weights), parts, seed), layers)


def _layered(layers: Sequence[Pattern], parts: int, weights: Sequence[np.ndarray], seed: int) -> Owners:
    """Parts of equal work in each layer that receive few values from the layer before, by Mt-KaHyPar, layer by layer.

    A layer with the pattern of an earlier layer reuses the earlier parts if they send at most 1 + REUSE times as many
    values here.
    """
    owners = [_runs(weights[0], parts)]
    earlier: dict[tuple[str, bytes], list[tuple[int, np.ndarray]]] = {}
    for layer, work in zip(layers[1:], weights[1:], strict=True):
        before, same = owners[-1], earlier.setdefault((layer.digest, work.tobytes()), [])
        own = next((own for sent, own in same if _sent(layer, before, own, parts) <= (1 + REUSE) * sent), None)
        if own is None:
            # The parts of the sending neurons are fixed, so one vertex stands for all neurons of a part.
            nets = [[int(before[net[0]]), *net[1:]] for net in _nets(layer, 0, parts)]
            fixed = [*range(parts), *[-1] * layer.rows]
            own = _cut(nets, np.concatenate([np.zeros(parts, np.int64), work]), parts, seed, fixed)[parts:]
            same.append((_sent(layer, before, own, parts), own))
        owners.append(own)
    return owners


def _sent(layer: Pattern, before: np.ndarray, after: np.ndarray, parts: int) -> int:
    """Return the number of values that a layer's parts need from other parts of the layer before it."""
    return len(needs(layer, before, after, parts)[0])


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
    """Raise UserError for a mode that is unknown or whose package is not installed."""
    if mode not in MODES:
        raise UserError(f"partition {mode!r} is unknown: choose one of {', '.join(MODES)}")
    package = {"graph": "pymetis", "hypergraph": "mtkahypar", "layered": "mtkahypar"}.get(mode, "")
    if package and find_spec(package) is None:
        raise UserError(NEEDS.format(mode, package))


def hypernets(layers: Sequence[Pattern]) -> list[list[int]]:
    """Return for each neuron with successors its number and its successors' numbers, counted layer by layer."""
    firsts = _firsts(layers)
    return [net for k, layer in enumerate(layers[1:]) for net in _nets(layer, firsts[k], firsts[k + 1])]


def _runs(weights: np.ndarray, parts: int) -> np.ndarray:
    """Return the part of each neuron, (neurons,) int64: runs of about equal weight with at least one neuron each."""
    n, ends = len(weights), np.cumsum(np.maximum(0, weights), dtype=np.float64)
    edges = np.searchsorted(ends - weights / 2, ends[-1] * np.arange(1, parts) / parts)
    numbers = np.arange(1, parts)
    # Every part has a neuron, even if single neurons outweigh the share of a part.
    edges = np.maximum.accumulate(np.maximum(edges, numbers) - numbers) + numbers
    edges = np.minimum(edges, n - parts + numbers)
    return np.searchsorted(edges, np.arange(n), side="right")


def _firsts(layers: Sequence[Pattern]) -> list[int]:
    """Return the number of the first neuron of each layer, and the number of all neurons."""
    firsts: list[int] = np.cumsum([0, *(one.rows for one in layers)]).tolist()
    return firsts


def _apart(owners: np.ndarray, layers: Sequence[Pattern]) -> Owners:
    return np.split(owners, _firsts(layers)[1:-1])


def _nets(layer: Pattern, before: int, after: int) -> list[list[int]]:
    """Return for each used input of a layer its number, counted from `before`, and its units', counted from `after`."""
    back, pins = layer.transposed, (layer.transposed.rows + after).tolist()
    edges = back.starts.tolist()
    return [[before + c, *pins[a:b]] for c, (a, b) in enumerate(pairwise(edges)) if a < b]


@cache
def _kahypar() -> tuple[Any, Any]:
    """Return the module and the library object of Mt-KaHyPar, initialized with one thread."""
    import mtkahypar

    return mtkahypar, mtkahypar.initialize(1, False)


def _cut(
    nets: list[list[int]], weights: np.ndarray, parts: int, seed: int, fixed: list[int] | None = None
) -> np.ndarray:
    """Return the part of each vertex of a hypergraph, (vertices,); fixed: the known part of each vertex, else -1."""
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
        membership = np.asarray(graph.partition(context).get_partition())
    finally:
        # Mt-KaHyPar binds its threads to cores, and would leave this thread bound as well.
        os.sched_setaffinity(0, cores)
    return membership
