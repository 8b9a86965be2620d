"""Multiply-accumulate operations (MACs) of runs of layers, and of whole trainings; biases and activations not counted.

A dense layer a -> b takes ab MACs a sample forward, ab for the gradient of its weights, and ab for the gradient of its
inputs, which the first layer of a separately trained run does not need. (Counts derived, not from a paper.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psmpi.nn.layers.chain import leaves
from psmpi.nn.network import Network


@dataclass(frozen=True)
class Cost:
    """Cost of a run of layers: parameters, MACs a sample of a forward pass, and those of its first linear layer."""

    parameters: int
    forward: int
    first: int

    def training(self, inputs: bool = False) -> int:
        """Return the MACs a sample of forward and backward; inputs: whether with the gradient of the run's inputs."""
        return 3 * self.forward - (0 if inputs else self.first)


def count(network: Network, first: int, stop: int) -> Cost:
    """Return the cost of the layers [first, stop); convolutions count without pooling that may be folded into them."""
    layers = list(leaves(network.layers[first:stop]))
    macs = [layer.macs for layer in layers if layer.linear]
    parameters = [p for layer in layers for p in layer.parameters()]
    return Cost(sum(p.units * p.unit_size for p in parameters), sum(macs), macs[0])


def conventional(parts: Sequence[Cost], samples: int, epochs: int) -> int:
    """Return the MACs of training the parts as one network."""
    return samples * epochs * (3 * sum(part.forward for part in parts) - parts[0].first)


def apart(parts: Sequence[Cost], samples: int, epochs: Sequence[int], recovery: int = 0) -> int:
    """Return the MACs of training the parts one after the other, each for its `epochs`.

    After each part but the last, one forward pass hands over its outputs; `recovery` epochs train all parts as one
    network.
    """
    separate = sum(many * part.training() for many, part in zip(epochs, parts, strict=True))
    handed = sum(part.forward for part in parts[:-1])
    return samples * (separate + handed) + conventional(parts, samples, recovery)
