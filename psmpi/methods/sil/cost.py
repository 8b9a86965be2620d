"""Multiply-accumulate operations (MACs) of runs of layers, and of whole trainings; biases and activations not counted.

A dense layer a -> b takes ab a sample forward, ab for the gradient of its weights, and ab for that of its inputs, which
the first layer of what is trained alone does without. (Counts derived, not from a paper.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psmpi.nn.layers.chain import leaves
from psmpi.nn.network import Network


@dataclass(frozen=True)
class Cost:
    """Of a run of layers: parameters, MACs a sample of a forward pass, and of that the first layer's."""

    parameters: int
    forward: int
    first: int

    def training(self, inputs: bool = False) -> int:
        """MACs a sample of forward and backward; with `inputs` the gradient of the run's own inputs is made too."""
        return 3 * self.forward - (0 if inputs else self.first)


def count(network: Network, first: int, behind: int) -> Cost:
    """The cost of the layers [first, behind); of convolutions without the pooling that may be folded into them."""
    layers = list(leaves(network.layers[first:behind]))
    macs = [layer.macs for layer in layers if layer.linear]
    parameters = [p for layer in layers for p in layer.parameters()]
    return Cost(sum(p.units * p.unit_size for p in parameters), sum(macs), macs[0])


def conventional(parts: Sequence[Cost], samples: int, epochs: int) -> int:
    """MACs of the training of the parts as one network."""
    return samples * epochs * (3 * sum(part.forward for part in parts) - parts[0].first)


def apart(parts: Sequence[Cost], samples: int, epochs: Sequence[int], recovery: int = 0) -> int:
    """MACs of the training of the parts one after the other, `epochs` of each, with one hand-over behind each but the
    last, and of `recovery` epochs of all as one network."""
    alone = sum(many * part.training() for many, part in zip(epochs, parts, strict=True))
    handed = sum(part.forward for part in parts[:-1])
    return samples * (alone + handed) + conventional(parts, samples, recovery)
