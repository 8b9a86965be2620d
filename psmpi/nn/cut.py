"""Cutting a network into runs of layers."""

from __future__ import annotations

from itertools import pairwise

from psmpi.layout import split_evenly
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
