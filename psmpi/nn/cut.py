"""Cutting a network into runs of layers."""

from __future__ import annotations

from itertools import pairwise

from psmpi.layout import Classes, split_evenly
from psmpi.nn.layers.chain import leaves, uses_of
from psmpi.nn.network import Network


def starts(network: Network) -> list[int]:
    """The layers at which a network can be cut: those with weights, residual blocks, and the padding before either.

    Layers without weights follow the one with weights before them; leading ones join the first.
    """
    layers = network.layers
    return [k - (k > 0 and layers[k - 1].leads) for k, layer in enumerate(layers) if layer.linear or layer.inner]


def split_layers(network: Network, parts: int) -> list[tuple[int, int]]:
    """(first, behind the last) layer of each of `parts` runs with about as many layers with weights each."""
    found = starts(network)
    groups = split_evenly(range(len(found)), parts)
    edges = [0, *(found[group[0]] for group in groups[1:]), len(network.layers)]
    return list(pairwise(edges))


def cut_stages(network: Network) -> list[tuple[int, int]]:
    """(first, behind the last) layer of each of the smallest runs."""
    return split_layers(network, len(starts(network)))


def trunk_length(network: Network) -> int:
    """The number of leading layers all of whose outputs every score depends on; 0 where none of them has weights.

    A layer that goes with the one that follows it is not among them.
    """
    layers, everyone = network.layers, Classes.of(range(network.classes))
    found = 0
    for uses, layer in zip(uses_of(layers, network.score_uses()), layers[:-1], strict=False):
        if uses != ((0, layer.out_shape[0], everyone),):
            break
        found += 1
    while found and layers[found - 1].leads:
        found -= 1
    return found if any(layer.linear for layer in leaves(layers[:found])) else 0
