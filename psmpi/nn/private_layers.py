"""Private layers: layers after a network's shared ones, with private units of each class, by tiles of classes."""

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

# Output numbers of all classes' layers for a minibatch, above which tiles save time. Fewer numbers stay in the
# last-level cache, and the separate pass for the labels' scores costs more than tiles save.
SPILL = 1 << 23

# Classes of labels that are computed at a time.
FEW = 16


def class_numbers(network: Network, tail: tuple[int, int]) -> int:
    """Return the output numbers per sample of one class in the layers tail = [first, stop)."""
    return output_numbers(network.stages(range(1), layers=tail))


def goes_by_tiles(network: Network, tail: tuple[int, int], classes: int, batch: int) -> bool:
    """Return whether the layers tail = [first, stop) of `classes` classes are faster by tiles."""
    numbers = batch * class_numbers(network, tail)
    return classes * numbers > SPILL and classes > classes_at_once(classes, numbers)


def tile_of(classes: int, numbers: int) -> int:
    """Return the number of classes of a tile; numbers: output numbers of a class's layers for a minibatch.

    A tile has up to half more classes than needed if this reduces the number of classes in the last, smaller tile,
    which needs another model.
    """
    least = classes_at_once(classes, numbers)
    return min(range(least, min(least + least // 2, classes) + 1), key=lambda count: (classes % count, count))


class PrivateLayers(Tail):
    """Tail of private layers: one model computes the subnetwork of each tile in turn, with the tile's weights.

    All tiles have the same shape, except perhaps the last. Activations and packed kernels take the memory of one tile.
    """

    in_rows = True

    def __init__(self, model: Model):
        super().__init__(model)
        assert model.tail is not None
        self.network, self.layers = model.network, model.tail
        self.numbers = class_numbers(self.network, self.layers)
        # Classes that are not neighbours in the flat vector are neighbours in the local vector.
        own = self.network.runs(model.layout, *self.layers) & model.part
        self.size, self.start = own.size // self.classes, int(model.part.places(own.starts, own.stops)[0])
        self.space = Workspace(self.ops, self.dtype)
        self.models: dict[int, Model] = {}
        # Model and tape of the tile whose scores were computed last.
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
        """Return the number of classes of a tile, as `Tail.tile`; smaller minibatches have the same tiles."""
        return tile_of(self.classes, max(batch, self.batch) * self.numbers)

    def reserve(self, batch: int, labels: bool) -> None:
        if batch <= self.batch:
            return
        # Free the smaller arrays first.
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
        scores: np.ndarray = out[: (stop - first) * b].reshape(-1, b)
        model = self._model(first, stop, b)
        self.last = model, model.forward(features)
        scores[...] = self.last[1].scores
        return scores

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
        """Return a model with weights w and gradient g, (classes * size,) each; their length gives the classes."""
        classes, layout = range(len(w) // self.size), self.model.layout
        return Model(self.network, layout, w, g, self.ops, classes, layers=self.layers, space=self.space)

    def _model(self, first: int, stop: int, batch: int) -> Model:
        """Return the model of the tile of classes [first, stop), with their weights."""
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
    """Scores of the labels, and their share in the gradients, for up to `batch` samples.

    The classes that are labels are computed FEW at a time, on the samples with these labels only. If batch
    normalization couples samples, they are computed on all samples.
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
        # Weights of FEW classes, the labels' share in their gradients, and the sum of both gradients.
        self.rows, self.label_gradients, self.sum = (empty(weights, private.dtype).reshape(-1, size) for _ in range(3))
        # Features of a pass, and their gradient; `private.dx` is not in use at that time.
        self.x, self.dx = empty(features, private.dtype), private.dx
        self.dy = empty(self.few * batch, private.dtype)
        self.model = private.make_model(self.rows.reshape(-1), self.label_gradients.reshape(-1))
        self.model.reserve(batch)
        self.model.chain.reserve_backward(batch, True)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays except activations."""
        arrays = self.rows, self.label_gradients, self.sum, self.x, self.dy
        return self.model.buffer_bytes + sum(array.nbytes for array in arrays)

    def scores(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the scores of labels (1, b) float64, as `Tail.label_scores`."""
        scores = np.zeros((1, len(labels)))
        for _, own, rows, columns in self._some(labels):
            scores[0, own] = self.model.forward(self._seen(features, own)).scores[rows, columns]
        return scores

    def add_gradients(
        self, features: np.ndarray, labels: np.ndarray, slopes: np.ndarray, dh: np.ndarray | None
    ) -> None:
        """Add the share of the labels' scores to the gradients, as `Tail.close`."""
        assert self.g is not None
        for classes, own, rows, columns in self._some(labels):
            x = self._seen(features, own)
            tape, dy = self.model.forward(x), self.dy[: self.few * x.shape[1]].reshape(self.few, -1)
            dy.fill(0)
            dy[rows, columns] = -slopes[own]
            dx = None if dh is None else self.dx[: x.size].reshape(x.shape)
            self.model.backward(tape, dy, dx=None if dx is None else dx.reshape(*self.model.in_shape, -1))
            gradient = np.take(self.g, classes, axis=0, out=self.sum, mode="clip")[: rows.max() + 1]
            gradient += self.label_gradients[: len(gradient)]
            self.g[classes[: len(gradient)]] = gradient
            if dh is None or dx is None:
                continue
            if self.couples:
                dh += dx
            else:
                dh_own = np.take(dh, own, axis=1, out=x, mode="clip")
                dh_own += dx
                dh[:, own] = dh_own

    def _some(self, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Iterate over groups of `few` classes of labels, and copy the weights of each group to the model.

        Yields classes (few,), in which the last class is repeated to fill a smaller group; samples (n,) with these
        labels; and rows (n,), columns (n,), the places of the labels' scores in a pass.
        """
        present = own_labels(labels, self.classes)
        classes, places = np.unique(labels[present], return_inverse=True)
        for first in range(0, len(classes), self.few):
            own = np.flatnonzero(places // self.few == first // self.few)
            some = np.resize(classes[first : first + self.few], self.few)
            some[len(classes) - first :] = classes[-1]
            np.take(self.w, some, axis=0, out=self.rows, mode="clip")
            yield some, present[own], places[own] - first, present[own] if self.couples else np.arange(len(own))

    def _seen(self, features: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return the features of the samples `own`, or of all samples if batch normalization couples them."""
        if self.couples:
            return features
        # With mode="clip" NumPy writes to `out` directly; the default mode first fills a buffer.
        return np.take(features, own, axis=1, out=self.x[: len(features) * len(own)].reshape(-1, len(own)), mode="clip")
