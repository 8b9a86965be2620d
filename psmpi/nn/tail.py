"""Tails: the layers with private units of each class, computed by tiles of classes from the features before them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from psmpi.nn.layers import Part
from psmpi.nn.losses import own_labels
from psmpi.nn.losses.nll import add_normalizers
from psmpi.nn.model import Model

# Output numbers of a tile's layers, which fit the cache together with their derivatives; fewest classes of a tile.
ELEMENTS, LEAST = 1 << 17, 64


def tile_size(numbers: int) -> int:
    """Return the number of classes of a tile; numbers: output numbers of a class's layers for a minibatch."""
    return max(LEAST, ELEMENTS // max(1, numbers))


def classes_at_once(classes: int, numbers: int) -> int:
    """Return `tile_size(numbers)`, limited to `classes`."""
    return min(classes, tile_size(numbers))


class Tail:
    """Base class of tails, which compute scores of a model's classes by tiles, from the features (inputs, b).

    numbers: output numbers per sample of a class's layers.
    """

    def __init__(self, model: Model):
        self.model, self.ops, self.dtype, self.classes = model, model.ops, model.dtype, len(model.classes)
        self.numbers = 1
        self.add_normalizers = self.ops.fused("class_normalizers") or add_normalizers

    @property
    def in_rows(self) -> bool:
        """Whether the weights of each class are contiguous in the local vector, class after class."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays except weights, gradients and activations."""
        raise NotImplementedError

    @property
    def activation_bytes(self) -> int:
        """Bytes of the layers' outputs except the scores."""
        return 0

    def tile(self, batch: int) -> int:
        """Return the number of classes of a tile for minibatches of `batch` samples."""
        return classes_at_once(self.classes, batch * self.numbers)

    def reserve(self, batch: int, labels: bool) -> None:
        """Allocate memory for gradients of up to `batch` samples; labels: `label_scores` and `close` will be called."""
        raise NotImplementedError

    def run(self, first: int, stop: int) -> slice:
        """Return the slice of the local vector with the weights of classes [first, stop); only for a tail `in_rows`."""
        raise NotImplementedError

    def scores(self, features: np.ndarray, first: int, out: np.ndarray) -> np.ndarray:
        """Return the scores (classes, b) of the classes from `first` on, as a view of out (any,), as many as fit."""
        raise NotImplementedError

    def backward(
        self, features: np.ndarray, first: int, dy: np.ndarray, dh: np.ndarray | None, rows: np.ndarray | None
    ) -> None:
        """Write the gradient of the tile whose scores were computed last, given the gradient dy of these scores.

        dy: (classes, b), overwritten. rows: (k,) array for the gradient of the tile's weights, in the order of the
        local vector; None writes to the model's gradient. dh: (inputs, b) array to which the gradient of the features
        is added; None if it is not needed.
        """
        raise NotImplementedError

    def close(self, features: np.ndarray, labels: np.ndarray, slopes: np.ndarray, dh: np.ndarray | None) -> None:
        """Add the share of the labels' scores to the gradients.

        slopes: (b,) minus the derivatives of the loss with respect to the labels' scores. Labels that are not among the
        model's classes add nothing.
        """
        raise NotImplementedError

    def label_scores(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the scores of labels, (1, b) float64, with 0 for labels that are not among the model's classes."""
        raise NotImplementedError

    def trace(self, features: np.ndarray) -> Iterator[tuple[slice, Part, np.ndarray]]:
        """Iterate over tiles and their parts: classes of the tile, part, and the part's outputs, in new arrays."""
        raise NotImplementedError

    def tiles(self, features: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Iterate over tiles: first class, and scores (classes, b), which the next tile overwrites."""
        b = features.shape[1]
        room = self.ops.scratch("tile", self.tile(b) * b, self.dtype)[: self.tile(b) * b]
        first = 0
        while first < self.classes:
            scores = self.scores(features, first, room)
            yield first, scores
            first += len(scores)

    def normalizers(self, features: np.ndarray, labels: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
        """Return (3, b) float64: largest scores, sums of exponentials relative to the largest, and labels' scores.

        known: (b,) labels' scores that replace the computed ones.
        """
        b = len(labels)
        sums = np.zeros((3, b))
        sums[0] = -np.inf
        for first, scores in self.tiles(features):
            own = own_labels(labels - first, len(scores))
            if known is not None:
                scores[labels[own] - first, own] = known[own]
            self.add_normalizers(scores, sums[0], sums[1])
            sums[2, own] = scores[labels[own] - first, own]
        return sums
