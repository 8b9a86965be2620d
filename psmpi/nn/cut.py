"""Cutting a network into runs of layers."""

from __future__ import annotations

from itertools import pairwise

from psmpi.layout import Classes, Each, split_evenly
from psmpi.nn.layers.chain import leaves, uses_of
from psmpi.nn.layers.dense import Dense
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


def shared_length(network: Network) -> int:
    """The number of leading layers all of whose outputs every score depends on.

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
    return found


def trunk_length(network: Network) -> int:
    """`shared_length` of a network, 0 where none of these layers has weights."""
    found = shared_length(network)
    return found if any(layer.linear for layer in leaves(network.layers[:found])) else 0


def has_head(network: Network) -> bool:
    """Whether the network ends in a dense layer in one group, all inputs of which every class sees."""
    last = network.layers[-1]
    return isinstance(last, Dense) and last.groups == 1


def couples(network: Network, tail: tuple[int, int]) -> bool:
    """Whether outputs of a sample of the layers [first, behind) depend on the other samples of its minibatch."""
    return any(layer.couples for layer in leaves(network.layers[tail[0] : tail[1]]))


def tail_of(network: Network) -> tuple[int, int] | None:
    """(first, behind the last) of the layers that every class has for itself, from outputs that all classes see.

    Those are the last layer of a network that `has_head`, and else all behind the shared ones, where each of their
    units is one class's and all classes have as many. None where that is not so, or where steps of sequences have
    scores.
    """
    if network.steps:
        return None
    layers, everyone, each = network.layers, Classes.of(range(network.classes)), Each(0, network.classes)
    if has_head(network):
        return len(layers) - 1, len(layers)
    first, uses = shared_length(network), uses_of(layers, network.score_uses())
    begins = True
    for layer, users in zip(layers[first:], uses[first:], strict=True):
        # What goes with the first of these layers puts out what all classes see.
        begins = begins and layer.leads
        if users != ((0, layer.out_shape[0], everyone if begins else each),):
            return None
    if layers[first].sources(uses[first]) != ((0, layers[first].in_shape[0], everyone),):
        return None
    return first, len(layers)
