"""The layers behind a network's shared ones, of which each class has units of its own, by tiles of classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from psmpi.nn.cut import couples
from psmpi.nn.layers import Part
from psmpi.nn.layers.chain import Tape, output_numbers
from psmpi.nn.layers.workspace import Workspace
from psmpi.nn.losses import own_labels
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.tail import Tail, classes_at_once

# Numbers that the layers of all classes put out for a minibatch. Tiles save time where there are more; fewer stay in
# the last cache, and the labels' own scores cost more than tiles save.
SPILL = 1 << 23

# Classes of labels at a time. With as many samples at least, the kernels' vectors are full.
FEW = 16


def class_numbers(network: Network, tail: tuple[int, int]) -> int:
    """Numbers that the layers [first, behind) of one class put out a sample."""
    return output_numbers(network.stages(range(1), layers=tail))


def goes_by_tiles(network: Network, tail: tuple[int, int], classes: int, batch: int) -> bool:
    """Whether the layers [first, behind) of so many classes are better computed by tiles."""
    numbers = batch * class_numbers(network, tail)
    return classes * numbers > SPILL and classes > classes_at_once(classes, numbers)


def tile_of(classes: int, numbers: int) -> int:
    """Classes of a tile whose layers put out so many numbers each: up to half more than needed, if fewer are left over.

    Classes that are left over take a model of their own.
    """
    least = classes_at_once(classes, numbers)
    return min(range(least, min(least + least // 2, classes) + 1), key=lambda count: (classes % count, count))


class PrivateLayers(Tail):
    """The subnetworks of a tile's classes, all of one shape, in turn by one model: only its weights are others'.

    Activations, packed kernels and the like are those of a tile.
    """

    in_rows = True

    def __init__(self, model: Model):
        super().__init__(model)
        assert model.tail is not None
        self.network, self.layers = model.network, model.tail
        self.numbers = class_numbers(self.network, self.layers)
        # Classes need not be neighbours in the flat vector; in the local one they are.
        own = self.network.runs(model.layout, *self.layers) & model.part
        self.size, self.start = own.size // self.classes, int(model.part.places(own.starts, own.stops)[0])
        self.space = Workspace(self.ops, self.dtype)
        self.models: dict[int, Model] = {}
        # The pass of the tile whose scores were made last, and its model.
        self.last: tuple[Model, Tape] | None = None
        self.batch, self.dx = 0, np.empty(0, self.dtype)
        self.labelled: Labelled | None = None

    @property
    def nbytes(self) -> int:
        passes = sum(model.buffer_bytes for model in self.models.values())
        labelled = self.labelled.nbytes if self.labelled is not None else 0
        return int(passes + labelled + self.space.nbytes + self.dx.nbytes)

    @property
    def activation_bytes(self) -> int:
        models = [*self.models.values(), *([self.labelled.model] if self.labelled is not None else [])]
        return sum(model.activation_bytes for model in models)

    def tile(self, batch: int) -> int:
        """As `Tail.tile`; smaller minibatches have the same tiles."""
        return tile_of(self.classes, max(batch, self.batch) * self.numbers)

    def reserve(self, batch: int, labels: bool) -> None:
        if batch <= self.batch:
            return
        # The smaller arrays go first.
        self.last, self.labelled, self.models, self.dx = None, None, {}, np.empty(0, self.dtype)
        self.batch, tile = batch, self.tile(batch)
        self.dx = self.ops.empty(self.model.size * batch, self.dtype)
        for classes in {tile, self.classes % tile} - {0}:
            self._model(0, classes, batch).chain.reserve_backward(batch, True)
        if labels:
            self.labelled = Labelled(self, batch)

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
        dx = None if dh is None else self.dx[: features.size]
        model.backward(tape, dy, dx=None if dx is None else dx.reshape(*model.in_shape, -1))
        if dh is not None and dx is not None:
            dh += dx.reshape(dh.shape)

    def close(self, features: np.ndarray, labels: np.ndarray, slopes: np.ndarray, dh: np.ndarray | None) -> None:
        assert self.labelled is not None
        self.labelled.add_gradients(features, labels, slopes, dh)

    def label_scores(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        assert self.labelled is not None
        return self.labelled.scores(features, labels)

    def trace(self, features: np.ndarray) -> Iterator[tuple[slice, Part, np.ndarray]]:
        b = features.shape[1]
        for first in range(0, self.classes, self.tile(b)):
            stop = min(first + self.tile(b), self.classes)
            for part, output in self._model(first, stop, b).trace(features):
                yield slice(first, stop), part, output

    def make_model(self, w: np.ndarray, g: np.ndarray | None) -> Model:
        """A model of as many classes as there are weights (classes size,)."""
        classes, layout = range(len(w) // self.size), self.model.layout
        return Model(self.network, layout, w, g, self.ops, classes, layers=self.layers, space=self.space)

    def _model(self, first: int, stop: int, batch: int) -> Model:
        """The model of a tile's classes, with their weights."""
        at, g = self.run(first, stop), None
        w = self.model.w[at]
        if self.model.g is not None:
            g = self.model.g[at]
        model = self.models.get(stop - first)
        if model is None:
            model = self.models[stop - first] = self.make_model(w, g)
        else:
            model.move(w, g)
        model.reserve(batch)
        return model


class Labelled:
    """The labels' own scores, and what these add to the gradients, of up to `batch` samples.

    The classes that are labels, FEW at a time, see the samples of these labels alone; where batch normalization makes a
    sample's outputs depend on the others, all samples.
    """

    def __init__(self, private: PrivateLayers, batch: int):
        whole, self.size = private.model, private.size
        at, size, empty = private.run(0, private.classes), private.size, private.ops.empty
        self.classes, self.few = private.classes, min(FEW, private.classes)
        self.w, self.g = whole.w[at].reshape(-1, size), None
        if whole.g is not None:
            self.g = whole.g[at].reshape(-1, size)
        self.couples = couples(private.network, private.layers)
        weights, features = self.few * size, whole.size * batch
        # Weights of few classes, what is added to their gradients, and these then.
        self.rows, self.more, self.sum = (empty(weights, private.dtype).reshape(-1, size) for _ in range(3))
        # Features that a pass sees, and their gradient, which nobody needs meanwhile.
        self.x, self.dx = empty(features, private.dtype), private.dx
        self.dy = empty(self.few * batch, private.dtype)
        self.model = private.make_model(self.rows.reshape(-1), self.more.reshape(-1))
        self.model.reserve(batch)
        self.model.chain.reserve_backward(batch, True)

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds besides activations."""
        arrays = self.rows, self.more, self.sum, self.x, self.dy
        return self.model.buffer_bytes + sum(array.nbytes for array in arrays)

    def scores(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(1, b) float64, as `Tail.label_scores`."""
        found = np.zeros((1, len(labels)))
        for _, own, rows, columns in self._some(labels):
            found[0, own] = self.model.forward(self._seen(features, own)).scores[rows, columns]
        return found

    def add_gradients(
        self, features: np.ndarray, labels: np.ndarray, slopes: np.ndarray, dh: np.ndarray | None
    ) -> None:
        """As `Tail.close`."""
        assert self.g is not None
        for classes, own, rows, columns in self._some(labels):
            x = self._seen(features, own)
            tape, dy = self.model.forward(x), self.dy[: self.few * x.shape[1]].reshape(self.few, -1)
            dy.fill(0)
            dy[rows, columns] = -slopes[own]
            dx = None if dh is None else self.dx[: x.size].reshape(x.shape)
            self.model.backward(tape, dy, dx=None if dx is None else dx.reshape(*self.model.in_shape, -1))
            here = np.take(self.g, classes, axis=0, out=self.sum, mode="clip")[: rows.max() + 1]
            here += self.more[: len(here)]
            self.g[classes[: len(here)]] = here
            if dh is None or dx is None:
                continue
            if self.couples:
                dh += dx
            else:
                there = np.take(dh, own, axis=1, out=x, mode="clip")
                there += dx
                dh[:, own] = there

    def _some(self, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """The classes of labels in groups of `few`, each with its weights in the model.

        classes (few,), of which the last is repeated in a smaller group; samples (n,) with these labels; rows (n,) and
        columns (n,), the places of their labels' scores in a pass.
        """
        known = own_labels(labels, self.classes)
        classes, places = np.unique(labels[known], return_inverse=True)
        for first in range(0, len(classes), self.few):
            own = np.flatnonzero(places // self.few == first // self.few)
            some = np.resize(classes[first : first + self.few], self.few)
            some[len(classes) - first :] = classes[-1]
            np.take(self.w, some, axis=0, out=self.rows, mode="clip")
            yield some, known[own], places[own] - first, known[own] if self.couples else np.arange(len(own))

    def _seen(self, features: np.ndarray, own: np.ndarray) -> np.ndarray:
        """The features of the samples that the model is to see."""
        if self.couples:
            return features
        # Without a mode NumPy makes a copy before, in case that a place is wrong.
        return np.take(features, own, axis=1, out=self.x[: len(features) * len(own)].reshape(-1, len(own)), mode="clip")
