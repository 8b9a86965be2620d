"""The layers that each class has for itself, as tiles of classes compute them from what the layers before put out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from psmpi.nn.layers import Part
from psmpi.nn.losses import own_labels
from psmpi.nn.losses.nll import add_normalizers
from psmpi.nn.model import Model

# Numbers that the layers of a tile put out: with their derivatives they fit the cache. Classes that it has at least.
ELEMENTS, LEAST = 1 << 17, 64


def tile_size(numbers: int) -> int:
    """Classes of a tile, given the numbers that a class's layers put out for a minibatch."""
    return max(LEAST, ELEMENTS // max(1, numbers))


def classes_at_once(classes: int, numbers: int) -> int:
    """Classes of a tile, of no more than there are."""
    return min(classes, tile_size(numbers))


class Tail:
    """The scores of a model's classes by tiles, from the features (inputs, b) that its passes put out.

    numbers: those that the layers of a class put out a sample.
    """

    def __init__(self, model: Model):
        self.model, self.ops, self.dtype, self.classes = model, model.ops, model.dtype, len(model.classes)
        self.numbers = 1
        self.add_normalizers = self.ops.fused("class_normalizers") or add_normalizers

    @property
    def in_rows(self) -> bool:
        """Whether all weights of a class lie together in the local vector, class after class."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds besides weights, gradients and activations."""
        raise NotImplementedError

    @property
    def activation_bytes(self) -> int:
        """Bytes of its layers' outputs besides the scores."""
        return 0

    def tile(self, batch: int) -> int:
        """Classes of a tile for minibatches of `batch` samples."""
        return classes_at_once(self.classes, batch * self.numbers)

    def reserve(self, batch: int, labels: bool) -> None:
        """Make room for gradients of up to `batch` samples; labels: `label_scores` and `close` are to be called."""
        raise NotImplementedError

    def run(self, first: int, stop: int) -> slice:
        """The slice of the local vector that the weights of some classes are, where they are `in_rows`."""
        raise NotImplementedError

    def scores(self, features: np.ndarray, first: int, out: np.ndarray) -> np.ndarray:
        """The scores of classes from `first` on, as many as `out` (any,) has room for; a view of it, (classes, b)."""
        raise NotImplementedError

    def backward(
        self, features: np.ndarray, first: int, dy: np.ndarray, dh: np.ndarray | None, rows: np.ndarray | None
    ) -> None:
        """Write the gradient of the tile whose scores were made last, given that of these, dy (classes, b), used up.

        The gradient of its weights goes into the model's, or into `rows` (k,), in the order of the local vector; that
        of the features is added to dh (inputs, b), if it is wanted.
        """
        raise NotImplementedError

    def close(self, features: np.ndarray, labels: np.ndarray, slopes: np.ndarray, dh: np.ndarray | None) -> None:
        """Add what the labels' own scores add to the gradients: the derivatives of the loss by them are -slopes (b,).

        Labels that are not among the model's classes add nothing.
        """
        raise NotImplementedError

    def label_scores(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(1, b) float64: the scores of labels, 0 of those that are not among the model's classes."""
        raise NotImplementedError

    def trace(self, features: np.ndarray) -> Iterator[tuple[slice, Part, np.ndarray]]:
        """Of tile after tile, its classes, and its parts with their outputs, in arrays that no pass uses."""
        raise NotImplementedError

    def tiles(self, features: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The first class of each tile, and its scores (classes, b), which the next one overwrites."""
        b = features.shape[1]
        room = self.ops.scratch("tile", self.tile(b) * b, self.dtype)[: self.tile(b) * b]
        first = 0
        while first < self.classes:
            found = self.scores(features, first, room)
            yield first, found
            first += len(found)

    def normalizers(self, features: np.ndarray, labels: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
        """(3, b) float64: largest scores, sums of exponentials relative to these, labels' scores.

        known: labels' scores (b,), in the place of those found here.
        """
        b = len(labels)
        found = np.zeros((3, b))
        found[0] = -np.inf
        for first, scores in self.tiles(features):
            own = own_labels(labels - first, len(scores))
            if known is not None:
                scores[labels[own] - first, own] = known[own]
            self.add_normalizers(scores, found[0], found[1])
            found[2, own] = scores[labels[own] - first, own]
        return found
