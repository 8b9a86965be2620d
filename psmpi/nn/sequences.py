"""Networks of sequences: which of their layers carry states, which compute single steps, and chunks of time."""

from __future__ import annotations

from collections.abc import Sequence

from psmpi.backend import CELLS
from psmpi.nn.layers import Layer
from psmpi.nn.layers.chain import leaves
from psmpi.nn.layers.last import Last
from psmpi.nn.layers.recurrent import Recurrent
from psmpi.nn.network import Network


def is_recurrent(layer: Layer) -> bool:
    """Whether a layer, or one inside it, carries states from step to step."""
    return any(one.recurrent for one in leaves([layer]))


def count_states(layers: Sequence[Layer]) -> int:
    """Numbers a sample that recurrent layers carry from step to step: h, and c of an lstm, of all of them."""
    found = (layer for layer in leaves(layers) if isinstance(layer, Recurrent))
    return sum(CELLS[layer.kind][1] * layer.units for layer in found)


def find_head(network: Network) -> int:
    """The first layer whose outputs are not those of each step; behind the last one where all are."""
    layers = network.layers
    return next((k for k, layer in enumerate(layers) if len(layer.out_shape) != 2), len(layers))


def find_padding(network: Network, chunked: bool = False) -> Layer | None:
    """The layer that ends sequences, where what it takes of shorter ones is padding; None where there is no such.

    Behind a sequence's end a recurrent layer puts out its last state, and so do layers of single steps of what they
    take; the samples have padding there. chunked: whether sequences go through it chunk by chunk, of which the layer
    `last` takes the last column.
    """
    held = False
    for layer in network.layers:
        if len(layer.in_shape) == 2 and len(layer.out_shape) != 2:
            return None if held or (isinstance(layer, Last) and not chunked) else layer
        held = _holds(layer, held)
    return None


def stretch(network: Network, steps: int) -> Network | None:
    """The same network for sequences of so many steps; None where a layer takes all steps of one number."""
    ends = next((layer for layer in network.layers if len(layer.out_shape) != 2), None)
    return network.with_steps(steps) if ends is None or isinstance(ends, Last) else None


def _holds(layer: Layer, held: bool) -> bool:
    """Whether outputs behind a sequence's end are those of its last step, given whether the inputs are."""
    if not layer.inner:
        return held or layer.recurrent
    branch = held
    for one in layer.inner:
        branch = _holds(one, branch)
    # The inputs go past the branch.
    return held and branch


def chunks(steps: int, each: int) -> list[tuple[int, int]]:
    """(first, behind the last) step of each chunk of `each` steps; the last one may be shorter."""
    return [(first, min(first + each, steps)) for first in range(0, steps, each)]
