"""Head: the last dense layer of a network, computed by tiles of classes, with a row of weights for each class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from psmpi.nn.layers import Part, Site
from psmpi.nn.layers.cosine import CosinePart
from psmpi.nn.layers.linear import LinearPart
from psmpi.nn.layers.unit_length import EPS
from psmpi.nn.losses import own_labels
from psmpi.nn.model import Model
from psmpi.nn.tail import Tail


class Head(Tail):
    """Last dense layer of one group, or cosine layer, computed by tiles of classes; every class uses all inputs."""

    def __init__(self, model: Model):
        super().__init__(model)
        (stage,) = model.network.stages(model.classes, layers=model.tail)
        part = stage.layer.part(stage, Site(model.layout, model.part, model.ops, model.space, model.dtype))
        assert isinstance(part, LinearPart)
        part.bind(model.w, model.g)
        self.part: LinearPart = part
        self.weights, self.biases = rows_of(part, part.w)
        if model.g is not None:
            self.g_weights, self.g_biases = rows_of(part, part.g)
        # For cosines: scale / |w_j| of each class, (classes,), from the last time its scores were computed.
        self.scale, self.factors = 0.0, np.empty(0)
        if isinstance(part, CosinePart):
            self.scale, self.factors = part.scale, part.factors
        # A tile's share in the gradient of the features.
        self.product = np.empty(0, self.dtype)

    @property
    def in_rows(self) -> bool:
        w, weights, biases = self.model.w, self.weights, self.biases
        size = weights.shape[1] + self.part.bias
        places = weights.strides == (size * w.itemsize, w.itemsize)
        return places and (not self.part.bias or biases.ctypes.data == weights.ctypes.data + w.itemsize * (size - 1))

    @property
    def nbytes(self) -> int:
        return int(self.product.nbytes + sum(array.nbytes for array in self.part.arrays()))

    def reserve(self, batch: int, labels: bool) -> None:
        if self.product.size < self.weights.shape[1] * batch:
            self.product = self.ops.empty(self.weights.shape[1] * batch, self.dtype)

    def run(self, first: int, stop: int) -> slice:
        size = self.weights.strides[0] // self.dtype.itemsize
        start = (self.weights.ctypes.data - self.model.w.ctypes.data) // self.dtype.itemsize
        return slice(start + first * size, start + stop * size)

    def scores(self, features: np.ndarray, first: int, out: np.ndarray) -> np.ndarray:
        b = features.shape[1]
        stop = min(first + out.size // b, self.classes)
        scores: np.ndarray = out[: (stop - first) * b].reshape(-1, b)
        self.ops.matmul(self.weights[first:stop], features, scores)
        if self.scale:
            factors = self.factors[first:stop]
            self.ops.row_factors(self.weights[None, first:stop], EPS, self.scale, factors[None])
            scores *= factors[:, None]
        else:
            self.ops.finish(scores[None], self.biases[None, first:stop], "identity")
        return scores

    def backward(
        self, features: np.ndarray, first: int, dy: np.ndarray, dh: np.ndarray | None, rows: np.ndarray | None
    ) -> None:
        stop = first + len(dy)
        if self.scale:
            dy *= self.factors[first:stop, None]
        if dh is not None:
            product = self.product[: features.size].reshape(features.shape)
            self.ops.matmul(self.weights[first:stop].T, dy, product)
            dh += product
        weights, biases = self.g_weights[first:stop], self.g_biases[first:stop]
        if rows is not None:
            table = rows.reshape(len(dy), -1)
            weights, biases = table[:, : len(features)], table[:, -1]
        self.ops.matmul(dy, features.T, weights)
        self._project(slice(first, stop), weights)
        if self.part.bias:
            self.ops.row_sums(dy[None], biases[None])

    def close(self, features: np.ndarray, labels: np.ndarray, slopes: np.ndarray, dh: np.ndarray | None) -> None:
        own = own_labels(labels, self.classes)
        if not own.size:
            return
        rows, at = np.unique(labels[own], return_inverse=True)
        factors = slopes[own].astype(self.dtype)
        if self.scale:
            factors *= self.factors[labels[own]]
        # Sum the samples of each label first, so that each row is written once.
        share = np.zeros((len(rows), len(own)), self.dtype)
        share[at, np.arange(len(own))] = factors
        gradient = share @ features[:, own].T
        self._project(rows, gradient)
        self.g_weights[rows] -= gradient
        if self.part.bias:
            self.g_biases[rows] -= share.sum(axis=1)
        if dh is not None:
            dh[:, own] -= self.weights[labels[own]].T * factors

    def label_scores(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        own = own_labels(labels, self.classes)
        rows, scores = labels[own], np.zeros((1, len(labels)))
        weights = self.weights[rows]
        scores[0, own] = np.einsum("sf,fs->s", weights, features[:, own], dtype=np.float64)
        if self.scale and len(rows):
            factors = np.empty(len(rows), self.dtype)
            self.ops.row_factors(weights[None], EPS, self.scale, factors[None])
            scores[0, own] *= factors
        scores[0, own] += self.biases[rows]
        return scores.astype(self.dtype).astype(np.float64)

    def trace(self, features: np.ndarray) -> Iterator[tuple[slice, Part, np.ndarray]]:
        b = features.shape[1]
        for first in range(0, self.classes, self.tile(b)):
            stop = min(first + self.tile(b), self.classes)
            yield (
                slice(first, stop),
                self.part,
                self.scores(features, first, self.ops.empty((stop - first) * b, self.dtype)),
            )

    def _project(self, rows: slice | np.ndarray, g: np.ndarray) -> None:
        """Project the gradient g (n, inputs) of some rows to the gradient of the normalized rows; only for cosines."""
        if self.scale:
            self.ops.project_rows(self.weights[None, rows], self.factors[None, rows], self.scale, g[None, None])


def rows_of(part: LinearPart, views: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (classes, inputs) and biases (classes,) of a head, views of the local vector."""
    ((weights, biases),) = views
    if len(weights) > 1:
        # The segment has one stripe for each class.
        return weights[:, 0], biases[:, 0]
    return weights[0], biases[0]
