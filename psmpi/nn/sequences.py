"""Networks of sequences: layers that carry states, layers of single steps, and chunks of steps."""

from __future__ import annotations

from collections.abc import Sequence

from psmpi.backend import CELLS
from psmpi.nn.layers import Layer
from psmpi.nn.layers.chain import leaves
from psmpi.nn.layers.last import Last
from psmpi.nn.layers.recurrent import Recurrent
from psmpi.nn.network import Network


def is_recurrent(layer: Layer) -> bool:
    """Return whether a layer, or a layer inside it, carries states from step to step."""
    return any(one.recurrent for one in leaves([layer]))


def count_states(layers: Sequence[Layer]) -> int:
    """Return the numbers per sample that all recurrent layers carry from step to step: h, and c of an lstm."""
    recurrent = (layer for layer in leaves(layers) if isinstance(layer, Recurrent))
    return sum(CELLS[layer.kind][1] * layer.units for layer in recurrent)


def find_head(network: Network) -> int:
    """Return the first layer whose outputs are not sequences, or the number of layers if there is none."""
    layers = network.layers
    return next((k for k, layer in enumerate(layers) if len(layer.out_shape) != 2), len(layers))


def find_padding(network: Network, chunked: bool = False) -> Layer | None:
    """Return the layer that ends sequences and would take padding of shorter sequences as input; None without one.

    After the end of a sequence, samples have padding. Recurrent layers repeat their last state there, and layers of
    single steps after them repeat its image, so that no padding reaches the next layers. chunked: whether sequences
    pass in chunks, of which the layer `last` takes the last column; in whole sequences it takes the last true step.
    """
    held = False
    for layer in network.layers:
        if len(layer.in_shape) == 2 and len(layer.out_shape) != 2:
            return None if held or (isinstance(layer, Last) and not chunked) else layer
        held = _holds(layer, held)
    return None


def stretch(network: Network, steps: int) -> Network | None:
    """Return the same network for sequences of `steps` steps; None if a layer needs a fixed number of steps."""
    ends = next((layer for layer in network.layers if len(layer.out_shape) != 2), None)
    return network.with_steps(steps) if ends is None or isinstance(ends, Last) else None


def _holds(layer: Layer, held: bool) -> bool:
    """Return whether outputs after a sequence's end repeat its last step; held: whether inputs do."""
    if not layer.inner:
        return held or layer.recurrent
    branch = held
    for one in layer.inner:
        branch = _holds(one, branch)
    # A residual block also adds its inputs, which must repeat as well.
    return held and branch


def chunks(steps: int, each: int) -> list[tuple[int, int]]:
    """Return the steps [first, stop) of each chunk of `each` steps; the last chunk may be shorter."""
    return [(first, min(first + each, steps)) for first in range(0, steps, each)]
