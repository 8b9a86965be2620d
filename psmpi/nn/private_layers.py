"""The layers behind a network's shared ones, of which each class has units of its own, by tiles of classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from psmpi.nn.layers import Part
from psmpi.nn.layers.chain import Tape, leaves, output_numbers
from psmpi.nn.layers.workspace import Workspace
from psmpi.nn.losses import own_labels
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.tail import Tail


def class_numbers(network: Network, tail: tuple[int, int]) -> int:
    """Numbers that the layers [first, behind) of one class put out a sample."""
    return output_numbers(network.stages(range(1), layers=tail))


class PrivateLayers(Tail):
    """The subnetworks of a tile's classes, all of one shape, in turn by one model: only its weights are others'.

    Activations, packed kernels and the like are those of a tile. The label's score, and what it adds to the gradients,
    is made of the samples whose labels are among a tile's classes alone; where batch normalization makes a sample's
    outputs depend on the others, of all samples.
    """

    in_rows = True

    def __init__(self, model: Model):
        super().__init__(model)
        assert model.tail is not None
        self.network, self.tail = model.network, model.tail
        self.numbers = class_numbers(self.network, self.tail)
        self.couples = any(layer.couples for layer in leaves(self.network.layers[self.tail[0] : self.tail[1]]))
        (own,) = (self.network.runs(model.layout, *self.tail) & model.part).intervals
        at = model.part.local(*own)
        # Weights of a class, and of all classes from where on.
        self.size, self.start = (at.stop - at.start) // self.classes, at.start
        self.space = Workspace(self.ops, self.dtype)
        self.models: dict[int, Model] = {}
        # The pass of the tile whose scores were made last, and its model.
        self.last: tuple[Model, Tape] | None = None
        self.batch, self.dx, self.some, self.more, self.dy = 0, *(np.empty(0, self.dtype) for _ in range(4))

    @property
    def nbytes(self) -> int:
        arrays = self.dx, self.some, self.more, self.dy
        passes = sum(model.activation_bytes + model.buffer_bytes for model in self.models.values())
        return passes + self.space.nbytes + sum(array.nbytes for array in arrays)

    def reserve(self, batch: int, labels: bool) -> None:
        if batch <= self.batch:
            return
        self.batch, self.models, tile = batch, {}, self.tile(batch)
        features, empty = self.model.size * batch, self.ops.empty
        self.dx = empty(features, self.dtype)
        if labels:
            self.more, self.dy = empty(self.size * tile, self.dtype), empty(tile * batch, self.dtype)
            self.some = empty(0 if self.couples else features, self.dtype)
        for classes in {tile, self.classes % tile} - {0}:
            self._model(0, classes, batch).chain.reserve_backward(batch, True)

    def run(self, first: int, stop: int) -> slice:
        return slice(self.start + first * self.size, self.start + stop * self.size)

    def scores(self, features: np.ndarray, first: int, out: np.ndarray) -> np.ndarray:
        b = features.shape[1]
        stop = min(first + out.size // b, self.classes)
        found: np.ndarray = out[: (stop - first) * b].reshape(-1, b)
        model = self._model(first, stop, b)
        self.last = model, model.forward(features)
        found[...] = self.last[1].scores
        return found

    def backward(
        self, features: np.ndarray, first: int, dy: np.ndarray, dh: np.ndarray | None, rows: np.ndarray | None
    ) -> None:
        assert self.last is not None
        model, tape = self.last
        if rows is not None:
            model.move(model.w, rows)
        dx = None
        if dh is not None:
            dx = self.dx[: features.size].reshape(*model.in_shape, -1)
        model.backward(tape, dy, dx=dx)
        if dx is not None:
            dh += dx.reshape(features.shape)

    def close(self, features: np.ndarray, labels: np.ndarray, slopes: np.ndarray, dh: np.ndarray | None) -> None:
        g = self.model.g
        assert g is not None
        for first, stop, own, place in self._with_labels(labels):
            model, x = self._model(first, stop, features.shape[1]), self._some(features, own)
            tape, more = model.forward(x), self.more[: self.size * (stop - first)]
            dy = self.dy[: (stop - first) * x.shape[1]].reshape(-1, x.shape[1])
            dy.fill(0)
            dy[labels[own] - first, place] = -slopes[own]
            model.move(model.w, more)
            dx = None if dh is None else self.dx[: x.size].reshape(*model.in_shape, -1)
            model.backward(tape, dy, dx=dx)
            g[self.run(first, stop)] += more
            if dh is None or dx is None:
                continue
            if self.couples:
                dh += dx.reshape(dh.shape)
            else:
                dh[:, own] += dx.reshape(x.shape)

    def label_scores(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        found = np.zeros((1, len(labels)))
        for first, stop, own, place in self._with_labels(labels):
            scores = self._model(first, stop, features.shape[1]).forward(self._some(features, own)).scores
            found[0, own] = scores[labels[own] - first, place]
        return found

    def trace(self, features: np.ndarray) -> Iterator[tuple[slice, Part, np.ndarray]]:
        b = features.shape[1]
        for first in range(0, self.classes, self.tile(b)):
            stop = min(first + self.tile(b), self.classes)
            for part, output in self._model(first, stop, b).trace(features):
                yield slice(first, stop), part, output

    def _with_labels(self, labels: np.ndarray) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Tiles (first, stop) that have labels, these samples, and their places among those of a pass."""
        tile = self.tile(len(labels))
        for first in range(0, self.classes, tile):
            stop = min(first + tile, self.classes)
            own = own_labels(labels - first, stop - first)
            if own.size:
                yield first, stop, own, own if self.couples else np.arange(len(own))

    def _some(self, features: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The features of some samples, or of all where layers couple them."""
        if self.couples:
            return features
        found = self.some[: len(features) * len(own)].reshape(len(features), -1)
        # Without a mode NumPy makes a copy before, in case that a place is wrong.
        return np.take(features, own, axis=1, out=found, mode="clip")

    def _model(self, first: int, stop: int, batch: int) -> Model:
        """The model of a tile's classes, with their weights."""
        count, w, own = stop - first, self.model.w[self.run(first, stop)], None
        if self.model.g is not None:
            own = self.model.g[self.run(first, stop)]
        model = self.models.get(count)
        if model is None:
            network, layout = self.network, self.model.layout
            model = self.models[count] = Model(
                network, layout, w, own, self.ops, range(count), layers=self.tail, space=self.space
            )
        model.reserve(batch)
        model.move(w, own)
        return model
