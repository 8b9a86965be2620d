"""Cost of a partition of the neurons of a sparse network: values that parts send each other, and work of each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from psmpi.layout.pattern import Pattern

# Part of each neuron of each layer, one (rows,) int32 a layer. Inputs of the first layer belong to no part.
Owners = list[np.ndarray]


@dataclass(frozen=True, eq=False)
class Volume:
    """Values that parts send each other in the forward pass of one sample; the backward pass sends the same number.

    sends, receives (parts,) int64: values that each part sends and receives; edge_cut: number of connections between
    neurons of different parts; work (layers, parts) int64: summed weights of each part's neurons in each layer.
    """

    sends: np.ndarray
    receives: np.ndarray
    edge_cut: int
    work: np.ndarray

    @property
    def km1(self) -> int:
        """Connectivity metric: the sum over neurons of lambda - 1.

        lambda: number of parts that have the neuron or one of its successors. A value goes once to each part that
        needs it.
        """
        return int(self.sends.sum())

    @property
    def imbalance(self) -> float:
        """Largest work of a part over the mean work of a part, minus 1."""
        work = self.work.sum(axis=0)
        return float(work.max() / work.mean()) - 1

    @property
    def layer_imbalance(self) -> float:
        """Imbalance if parts wait for each other in each layer: the layers' largest works over their mean, minus 1."""
        return float(self.work.max(axis=1).sum() * self.work.shape[1] / self.work.sum()) - 1


def weights_of(layers: Sequence[Pattern]) -> list[np.ndarray]:
    """Return the work of each neuron of each layer, (rows,) int64: its number of connections, plus 1 for its bias."""
    return [one.fan_in + 1 for one in layers]


def needs(layer: Pattern, before: np.ndarray, after: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the neurons before a layer that other parts need, and these parts: (n,) int64 each, sorted, no pair twice.

    before (inputs,), after (rows,): parts of the neurons before and after the layer.
    """
    pairs = np.unique(layer.columns.astype(np.int64) * parts + after[layer.row_numbers])
    neurons, other = np.divmod(pairs, parts)
    some = before[neurons] != other
    return neurons[some], other[some]


def measure(
    layers: Sequence[Pattern], owners: Sequence[np.ndarray], parts: int, weights: Sequence[np.ndarray] | None = None
) -> Volume:
    """Return the volume of a partition; weights: work of each layer's neurons, by default `weights_of(layers)`."""
    sends, receives, cut = np.zeros(parts, np.int64), np.zeros(parts, np.int64), 0
    for layer, before, after in zip(layers[1:], owners[:-1], owners[1:], strict=True):
        neurons, other = needs(layer, before, after, parts)
        sends += np.bincount(before[neurons], minlength=parts)
        receives += np.bincount(other, minlength=parts)
        cut += int((before[layer.columns] != after[layer.row_numbers]).sum())
    weights = weights_of(layers) if weights is None else weights
    work = [np.bincount(own, one, parts) for own, one in zip(owners, weights, strict=True)]
    return Volume(sends, receives, cut, np.array(work).round().astype(np.int64))
