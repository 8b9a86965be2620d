"""What a partition of the neurons of a sparse network costs: values that parts send each other, and work of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from psmpi.layout.pattern import Pattern

# For each layer the part of each of its neurons, (rows,) int32. Inputs of the first layer are of no part.
Owners = list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Volume:
    """Values that go from part to part in a forward pass of one sample, and as many in the backward pass.

    sends, receives (parts,) int64: of each part; edge_cut: connections between neurons of different parts; work
    (layers, parts) int64: weights of the neurons of each part in each layer.
    """

    sends: np.ndarray
    receives: np.ndarray
    edge_cut: int
    work: np.ndarray

    @property
    def km1(self) -> int:
        """The connectivity metric: the sum over neurons of lambda - 1.

        lambda: the parts in which the neuron or one of its successors is. A value goes once to each part that needs it.
        """
        return int(self.sends.sum())

    @property
    def imbalance(self) -> float:
        """The work of the part that has most, over the mean, less 1."""
        work = self.work.sum(axis=0)
        return float(work.max() / work.mean()) - 1

    @property
    def layer_imbalance(self) -> float:
        """The same where parts wait for each other in each layer: the sum of the layers' largest, over the mean."""
        return float(self.work.max(axis=1).sum() * self.work.shape[1] / self.work.sum()) - 1


def weights_of(layers: Sequence[Pattern]) -> list[np.ndarray]:
    """The work of each neuron of each layer, (rows,) int64: its connections and its bias."""
    return [one.fan_in + 1 for one in layers]


def needs(layer: Pattern, before: np.ndarray, behind: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """The neurons before a layer that other parts need, and these parts: (n,) int64 each, sorted, each pair once.

    before (inputs,), behind (rows,): the parts of the neurons.
    """
    pairs = np.unique(layer.columns.astype(np.int64) * parts + behind[layer.row_numbers])
    neurons, other = np.divmod(pairs, parts)
    some = before[neurons] != other
    return neurons[some], other[some]


def measure(
    layers: Sequence[Pattern], owners: Sequence[np.ndarray], parts: int, weights: Sequence[np.ndarray] | None = None
) -> Volume:
    """The volume of a partition; weights: of the neurons of each layer, by default as of `weights_of`."""
    sends, receives, cut = np.zeros(parts, np.int64), np.zeros(parts, np.int64), 0
    for layer, before, behind in zip(layers[1:], owners[:-1], owners[1:], strict=True):
        neurons, other = needs(layer, before, behind, parts)
        sends += np.bincount(before[neurons], minlength=parts)
        receives += np.bincount(other, minlength=parts)
        cut += int((before[layer.columns] != behind[layer.row_numbers]).sum())
    weights = weights_of(layers) if weights is None else weights
    work = [np.bincount(own, one, parts) for own, one in zip(owners, weights, strict=True)]
    return Volume(sends, receives, cut, np.array(work).round().astype(np.int64))
