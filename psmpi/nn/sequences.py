"""Networks of sequences: which of their layers carry states, which compute single steps, and chunks of time."""

from __future__ import annotations

from psmpi.nn.layers import Layer
from psmpi.nn.layers.chain import leaves
from psmpi.nn.network import Network


def is_recurrent(layer: Layer) -> bool:
    """Whether a layer, or one inside it, carries states from step to step."""
    return any(one.recurrent for one in leaves([layer]))


def find_head(network: Network) -> int:
    """The first layer whose outputs are not those of each step; behind the last one where all are."""
    layers = network.layers
    return next((k for k, layer in enumerate(layers) if len(layer.out_shape) != 2), len(layers))


def chunks(steps: int, each: int) -> list[tuple[int, int]]:
    """(first, behind the last) step of each chunk of `each` steps; the last one may be shorter."""
    return [(first, min(first + each, steps)) for first in range(0, steps, each)]
