"""Partitions of the neurons of sparse networks, and the volume of messages between their parts."""

import os
import sys
from itertools import pairwise

import numpy as np
import pytest
from helpers.sparse_products import some_pattern

from psmpi.errors import UserError
from psmpi.layout import Pattern, partition, radix_pattern, random_pattern
from psmpi.layout.partitions import MODES, hypernets
from psmpi.layout.volume import measure, weights_of

PACKAGES = {"graph": "pymetis", "hypergraph": "mtkahypar", "layered": "mtkahypar"}


def network(widths=(40, 30, 50, 20), inputs=25, density=0.15):
    return [some_pattern(b, a, density, seed) for seed, (a, b) in enumerate(pairwise((inputs, *widths)))]


def cut(layers, parts, mode, **given):
    if mode in PACKAGES:
        pytest.importorskip(PACKAGES[mode], reason=f"no {PACKAGES[mode]} here")
    return partition(layers, parts, mode, **given)


def brute(layers, owners):
    """Count km1, cut connections, and (sends, receives) by part, neuron by neuron with sets."""
    km1, edges, sends, receives = 0, 0, {}, {}
    for number in range(len(layers) - 1):
        layer, own = layers[number + 1], owners[number]
        for u in range(len(own)):
            reading_parts = set()
            for r in range(layer.rows):
                if u in layer.columns[layer.starts[r] : layer.starts[r + 1]]:
                    reading_parts.add(int(owners[number + 1][r]))
                    edges += owners[number + 1][r] != own[u]
            km1 += len(reading_parts | {int(own[u])}) - 1
            for part in reading_parts - {int(own[u])}:
                sends[int(own[u])] = sends.get(int(own[u]), 0) + 1
                receives[part] = receives.get(part, 0) + 1
    return km1, edges, sends, receives


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_the_volume_is_that_of_sets(mode, parts):
    layers = network()
    owners = cut(layers, parts, mode)
    assert [own.dtype for own in owners] == [np.int32] * 4 and [len(own) for own in owners] == [40, 30, 50, 20]
    volume = measure(layers, owners, parts)
    km1, edges, sends, receives = brute(layers, owners)
    assert (volume.km1, volume.edge_cut) == (km1, edges)
    assert volume.sends.tolist() == [sends.get(part, 0) for part in range(parts)]
    assert volume.receives.tolist() == [receives.get(part, 0) for part in range(parts)]
    assert volume.work.sum() == sum(layer.size + layer.rows for layer in layers)
    assert (volume.km1 == 0) == (parts == 1)


@pytest.mark.parametrize("mode", ["hypergraph", "layered", "slab"])
def test_the_volume_is_that_which_the_partitioner_counts(mode):
    kahypar = pytest.importorskip("mtkahypar", reason="no mtkahypar here")
    layers, parts = network(), 4
    owners, nets = cut(layers, parts, mode), hypernets(layers)
    library = kahypar.initialize(1, False)
    context = library.context_from_preset(kahypar.PresetType.DETERMINISTIC)
    graph = library.create_hypergraph(context, 140, len(nets), nets)
    partitioned = graph.create_partitioned_hypergraph(context, parts, np.concatenate(owners).tolist())
    assert partitioned.km1() == measure(layers, owners, parts).km1


@pytest.mark.parametrize("mode", MODES)
def test_partitions_are_balanced_and_functions_of_their_arguments(mode):
    layers = [random_pattern(200, 150, 8, (0,)), random_pattern(300, 200, 12, (1,)), random_pattern(120, 300, 30, (2,))]
    cores = os.sched_getaffinity(0)
    owners, repeated = (cut(layers, 4, mode, seed=3) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(owners, repeated, strict=True))
    assert os.sched_getaffinity(0) == cores
    volume = measure(layers, owners, 4)
    assert volume.imbalance < 0.06
    if mode in ("slab", "random", "layered"):
        assert volume.layer_imbalance < 0.06
    if mode == "random":
        assert any(not np.array_equal(a, b) for a, b in zip(owners, cut(layers, 4, mode, seed=4), strict=True))


def test_slabs_are_runs_of_equal_weight_and_none_is_empty():
    layer = Pattern.of(np.array([0, 5, 6, 7, 8]), np.array([0, 1, 2, 3, 4, 0, 1, 2]), 5)
    for weights, expected in (
        ([1, 1, 1, 1], [0, 0, 1, 1]),
        ([100, 1, 1, 1], [0, 1, 1, 1]),
        ([1, 1, 1, 100], [0, 0, 0, 1]),
    ):
        assert partition([layer], 2, "slab", [np.array(weights)])[0].tolist() == expected
    for weights in ([9, 1, 1, 1], [1, 1, 1, 9], [0, 0, 0, 0]):
        for parts in (3, 4):
            assert set(partition([layer], parts, "slab", [np.array(weights)])[0].tolist()) == set(range(parts))
    assert weights_of([layer])[0].tolist() == [6, 2, 2, 2]
    # A contiguous partition cuts the whole network, layer after layer.
    owners = partition([layer, Pattern.of(np.arange(5), np.arange(4), 4)], 2, "contiguous", [np.ones(4), np.ones(4)])
    assert [own.tolist() for own in owners] == [[0] * 4, [1] * 4]


def test_parts_of_a_mixed_radix_system_need_fewer_values_than_slabs():
    """A layer of stride 16 is all to all between slabs; with every fourth neuron in a part it is not."""
    layers = [radix_pattern(256, 16, stride) for stride in (1, 16, 1, 16)]
    slabs, layered = (measure(layers, cut(layers, 4, mode), 4) for mode in ("slab", "layered"))
    assert 1.5 * layered.km1 < slabs.km1 and layered.layer_imbalance < 0.05


def test_what_cannot_be_cut_is_an_error(monkeypatch):
    layers = network()
    for change, says in (
        ((layers, 3, "spectral"), "choose one of slab, contiguous"),
        ((layers, 21, "slab"), "21 parts of a network whose smallest layer has 20 units"),
        ((layers, 0, "slab"), "0 parts"),
        (([layers[0], layers[2]], 2, "slab"), "sparse layer 2 has 30 inputs, but the layer before it has 40 units"),
    ):
        with pytest.raises(UserError, match=says):
            partition(*change)
    from psmpi.layout.partitions import _kahypar

    _kahypar.cache_clear()
    for mode, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"needs {package}.*psmpi\[partition\]"):
            partition(layers, 2, mode)
