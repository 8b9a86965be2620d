"""Cuts of a network into runs of layers."""

from __future__ import annotations

from itertools import pairwise

from psmpi.layout import Classes, Each, split_evenly
from psmpi.nn.layers.chain import leaves, uses_of
from psmpi.nn.layers.dense import Dense
from psmpi.nn.network import Network


def starts(network: Network) -> list[int]:
    """Return the layers at which runs can start: layers with weights and residual blocks, or the padding before them.

    Layers without weights belong to the run of the layer before them; leading ones join the first run.
    """
    layers = network.layers
    return [k - (k > 0 and layers[k - 1].leads) for k, layer in enumerate(layers) if layer.linear or layer.inner]


def split_layers(network: Network, parts: int) -> list[tuple[int, int]]:
    """Return the layers [first, stop) of each of `parts` runs with about equally many layers with weights."""
    first_layers = starts(network)
    groups = split_evenly(range(len(first_layers)), parts)
    edges = [0, *(first_layers[group[0]] for group in groups[1:]), len(network.layers)]
    return list(pairwise(edges))


def cut_stages(network: Network) -> list[tuple[int, int]]:
    """Return the layers [first, stop) of each of the smallest possible runs."""
    return split_layers(network, len(starts(network)))


def shared_length(network: Network) -> int:
    """Return the number of leading layers such that every score depends on all of their outputs.

    The last of these layers is never one that `leads`, as padding does.
    """
    layers, everyone = network.layers, Classes.of(range(network.classes))
    count = 0
    for uses, layer in zip(uses_of(layers, network.score_uses()), layers[:-1], strict=False):
        if uses != ((0, layer.out_shape[0], everyone),):
            break
        count += 1
    while count and layers[count - 1].leads:
        count -= 1
    return count


def trunk_length(network: Network) -> int:
    """Return `shared_length` of a network, or 0 if none of the shared layers has weights."""
    count = shared_length(network)
    return count if any(layer.linear for layer in leaves(network.layers[:count])) else 0


def has_head(network: Network) -> bool:
    """Return whether the network ends in a dense layer of one group, so that every class uses all of its inputs."""
    last = network.layers[-1]
    return isinstance(last, Dense) and last.groups == 1


def couples(network: Network, tail: tuple[int, int]) -> bool:
    """Return whether outputs of the layers tail = [first, stop) depend on the other samples of the minibatch."""
    return any(layer.couples for layer in leaves(network.layers[tail[0] : tail[1]]))


def tail_of(network: Network) -> tuple[int, int] | None:
    """Return the layers [first, stop) in which every class has private units, on inputs that all classes share.

    For a network that `has_head`, this is the last layer. For other networks, these are all layers after the shared
    ones, if each unit of them belongs to one class and all classes have equally many. None for other networks, and for
    networks with scores at each step of sequences.
    """
    if network.steps:
        return None
    layers, everyone, each = network.layers, Classes.of(range(network.classes)), Each(0, network.classes)
    if has_head(network):
        return len(layers) - 1, len(layers)
    first, uses = shared_length(network), uses_of(layers, network.score_uses())
    begins = True
    for layer, users in zip(layers[first:], uses[first:], strict=True):
        # Layers that lead (padding) before the first private layer have outputs that all classes use.
        begins = begins and layer.leads
        if users != ((0, layer.out_shape[0], everyone if begins else each),):
            return None
    if layers[first].sources(uses[first]) != ((0, layers[first].in_shape[0], everyone),):
        return None
    return first, len(layers)
