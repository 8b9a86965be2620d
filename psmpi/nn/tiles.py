"""The last layer, the loss and their gradients in one pass over tiles of classes, without an array of all scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.backend.reference import exponent_of
from psmpi.nn.layers.cosine import CosinePart
from psmpi.nn.layers.dense import Dense
from psmpi.nn.layers.linear import LinearPart
from psmpi.nn.layers.unit_length import EPS
from psmpi.nn.losses import Loss, OverClasses, own_labels
from psmpi.nn.losses.nll import add_normalizers
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.objective import DIVERGED, GRADIENT_LIMIT, Objective

# Scores of a tile: with their derivatives they fit the cache. Classes that it has at least.
ELEMENTS, LEAST = 1 << 17, 64


def has_head(network: Network) -> bool:
    """Whether the network ends in a dense layer in one group, all inputs of which every class sees."""
    last = network.layers[-1]
    return isinstance(last, Dense) and last.groups == 1


def tile_size(batch: int) -> int:
    """Classes of a tile, given the minibatch."""
    return max(LEAST, ELEMENTS // max(1, batch))


class Head:
    """The scores of a model's classes by tiles, from the features (inputs, b) that its passes put out.

    with_margin: labels (b,) and their scores (b,), which take the place of those found here.
    """

    def __init__(self, model: Model):
        assert model.head is not None
        self.model, self.ops, self.dtype, self.classes = model, model.ops, model.dtype, len(model.classes)
        self.part: LinearPart = model.head
        self.weights, self.biases = rows_of(self.part, self.part.w)
        self.add_normalizers = self.ops.fused("class_normalizers") or add_normalizers
        # Where scores are cosines: scale / |w_j| of each class (classes,), when its scores were made last.
        self.scale, self.factors = 0.0, np.empty(0)
        if isinstance(self.part, CosinePart):
            self.scale, self.factors = self.part.scale, self.part.factors
        self.with_margin: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def in_rows(self) -> bool:
        """Whether each class's weights and bias lie one after the other in the local vector, class after class."""
        w, weights, biases = self.model.w, self.weights, self.biases
        size = weights.shape[1] + self.part.bias
        places = weights.strides == (size * w.itemsize, w.itemsize)
        return places and (not self.part.bias or biases.ctypes.data == weights.ctypes.data + w.itemsize * (size - 1))

    def run(self, first: int, stop: int) -> slice:
        """The slice of the local vector that the rows of some classes are, where they are `in_rows`."""
        size = self.weights.strides[0] // self.dtype.itemsize
        start = (self.weights.ctypes.data - self.model.w.ctypes.data) // self.dtype.itemsize
        return slice(start + first * size, start + stop * size)

    def scores(self, features: np.ndarray, first: int, out: np.ndarray) -> np.ndarray:
        """The scores of classes from `first` on, as many as `out` (any,) has room for; a view of it, (classes, b)."""
        b = features.shape[1]
        stop = min(first + out.size // b, self.classes)
        found: np.ndarray = out[: (stop - first) * b].reshape(-1, b)
        self.ops.matmul(self.weights[first:stop], features, found)
        if self.scale:
            factors = self.factors[first:stop]
            self.ops.row_factors(self.weights[None, first:stop], EPS, self.scale, factors[None])
            found *= factors[:, None]
        else:
            self.ops.finish(found[None], self.biases[None, first:stop], "identity")
        if self.with_margin is not None:
            labels, known = self.with_margin
            own = own_labels(labels - first, len(found))
            found[labels[own] - first, own] = known[own]
        return found

    def project(self, rows: slice | np.ndarray, g: np.ndarray) -> None:
        """Of the gradient g (n, inputs) of some rows, by scores times factors, leave that of rows of unit length."""
        if self.scale:
            self.ops.project_rows(self.weights[None, rows], self.factors[None, rows], self.scale, g[None, None])

    def tiles(self, features: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The first class of each tile, and its scores (classes, b), which the next one overwrites."""
        b = features.shape[1]
        room = self.ops.scratch("tile", min(tile_size(b), self.classes) * b, self.dtype)[: tile_size(b) * b]
        first = 0
        while first < self.classes:
            found = self.scores(features, first, room)
            yield first, found
            first += len(found)

    def label_scores(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(1, b) float64: the scores of labels, 0 of those that are not among the model's classes."""
        own = own_labels(labels, self.classes)
        rows, found = labels[own], np.zeros((1, len(labels)))
        weights = self.weights[rows]
        found[0, own] = np.einsum("sf,fs->s", weights, features[:, own], dtype=np.float64)
        if self.scale and len(rows):
            factors = np.empty(len(rows), self.dtype)
            self.ops.row_factors(weights[None], EPS, self.scale, factors[None])
            found[0, own] *= factors
        found[0, own] += self.biases[rows]
        return found.astype(self.dtype).astype(np.float64)

    def normalizers(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(3, b) float64: largest scores, sums of exponentials relative to these, labels' scores."""
        b = len(labels)
        found = np.zeros((3, b))
        found[0] = -np.inf
        for first, scores in self.tiles(features):
            self.add_normalizers(scores, found[0], found[1])
            own = own_labels(labels - first, len(scores))
            found[2, own] = scores[labels[own] - first, own]
        return found


class TiledObjective(Objective):
    """The objective of a model with a head (`Model`): its passes end in features, and all after that is done here.

    For each tile of classes: scores, terms of the loss, the gradient of these rows of weights, and what they add to the
    gradient of the features. Of nll a pass for the normalizer comes before. In host memory.

    step_rows: called, where there is one, with a slice of the model's weights, rows of the head, and their gradient
    (k,), while both are in the cache; g has no gradient of the head then. For a loss that is `immediate` and a head
    whose weights are `in_rows`.
    """

    def __init__(self, loss: Loss, model: Model, others: OverClasses | None = None):
        super().__init__(loss, model, others)
        self.head = Head(model)
        self.g_weights, self.g_biases = rows_of(self.head.part, self.head.part.g)
        self.fast = self.ops.fused("class_terms")
        self.step_rows: Callable[[slice, np.ndarray], None] | None = None
        self.rows = np.empty(0, model.dtype)
        # Whether anything before the head has weights.
        self.below = model.hands_on or model.chain.lowest < len(model.parts)

    def reserve(self, outputs: int, batch: int) -> None:
        self.tile = min(outputs, tile_size(batch))
        super().reserve(self.tile, batch)
        self.scores = self.ops.empty(self.tile * batch, self.model.dtype)
        self.part = self.ops.empty(self.model.size * batch, self.model.dtype)
        if self.step_rows is not None:
            self._make_rows()
        # Sums of terms: this rank's, those of a tile, and all ranks'.
        self.sums = np.empty(3 * batch)

    def step_in_tiles(self, step_rows: Callable[[slice, np.ndarray], None]) -> None:
        """Let the rows of a tile be stepped at once, see the class."""
        self.step_rows = step_rows
        self._make_rows()

    def _make_rows(self) -> None:
        """Room for the gradient of a tile's rows."""
        at = self.head.run(0, self.tile)
        self.rows = self.ops.empty(at.stop - at.start, self.model.dtype)

    @property
    def nbytes(self) -> int:
        own = (self.scores, self.part, self.rows, *self.head.part.arrays())
        return super().nbytes + sum(int(array.nbytes) for array in own)

    def losses(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        pairs: np.ndarray | None = None,
        derivatives: bool = True,
    ) -> np.ndarray:
        """Compute loss and gradients of the head; scores: the features (inputs, b), whose gradient is returned."""
        features, loss, report = scores.reshape(-1, scores.shape[-1]), self.loss, self.report.host
        b = features.shape[1]
        self.finite, report[:] = False, 0
        given, rest, total = self._known(features, targets), self.sums[:b], self.sums[2 * b : 3 * b]
        value, peak, wrong = np.nan, 0.0, None
        try:
            value, peak = self._pass(features, targets, scale, given)
        except FloatingPointError as error:
            wrong = error
        np.copyto(total, rest)
        value = self.agreed(value, wrong, given, total if "terms" in loss.sums else None)
        if "terms" in loss.sums:
            slopes = np.abs(self._slopes(total)[own_labels(targets, self.head.classes)])
            peak = max(peak, float(slopes.max(initial=0.0)))
        self.last, report[3] = (features, targets, scale, given), peak
        if exponent_of(peak) and np.isfinite(value):
            # Once more, with derivatives that stay in the dtype.
            self._derive()
        elif "terms" in loss.sums:
            self._close(features, targets, total)
        report[0] = value
        self.finite = bool(np.isfinite(value))
        dh = self._dh(features)
        if not self.finite:
            dh.fill(np.nan)
            if not loss.lenient:
                raise FloatingPointError(DIVERGED)
        return dh

    def _dh(self, features: np.ndarray) -> np.ndarray:
        """The gradient of the features (inputs, b)."""
        found: np.ndarray = self.cast[: features.size].reshape(features.shape)
        return found

    def _derive(self) -> None:
        """Make the gradients of the last minibatch again, divided by the power of two that the report asks for."""
        (features, labels, scale, given), clipped = self.last, self.loss.clipped
        factor = 2.0 ** -exponent_of(float(self.report.host[3]))
        self._pass(features, labels, scale * factor, given)
        self.loss.clipped, b = clipped, len(labels)
        if "terms" in self.loss.sums:
            self._close(features, labels, factor * self.sums[2 * b : 3 * b])

    def again(self, tape: Any, dx: np.ndarray | None = None) -> None:
        self._derive()
        self.backward(tape, dx)

    def backward(self, tape: Any, dx: np.ndarray | None = None) -> None:
        """Fill the rest of the model's gradient from that of the features."""
        finished = self.model.finished
        if finished is not None:
            finished(self.head.part.number)
        assert self.model.g is not None
        if self.below:
            self.model.backward(tape, self.cast[: tape.scores.size].reshape(tape.scores.shape), dx=dx)
        if dx is not None:
            self.ops.unscale(dx, self.report.array, GRADIENT_LIMIT[self.model.dtype])
        self.ops.unscale(self.model.g, self.report.array, GRADIENT_LIMIT[self.model.dtype])

    def _known(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """What is known of all classes before any derivative."""
        self.head.with_margin = None
        margin, gathers = self.loss.margin is not None, self.loss.gathers
        if margin or (self.loss.sums and not gathers):
            own = self.head.label_scores(features, labels)
        if margin:
            here = (labels >= 0) & (labels < self.head.classes)
            self.add_margins(own, np.where(here, 0, -1))
            own = own.astype(self.model.dtype).astype(np.float64)
            self.head.with_margin = labels, own[0]
        if not self.loss.sums:
            return None
        if gathers:
            own = self.head.normalizers(features, labels)
        return own if self.others is None else self.others.summed(own, labels)

    def _pass(
        self, features: np.ndarray, labels: np.ndarray, scale: float, given: np.ndarray | None
    ) -> tuple[float, float]:
        """One pass over the tiles: the scaled loss, and the largest derivative where it is large."""
        value, peak, rest, dh = 0.0, 0.0, self.sums[: len(labels)], self._dh(features)
        rest.fill(0)
        dh.fill(0)
        across, part = features.T, self.part[: features.size].reshape(features.shape)
        first = 0
        while first < self.head.classes:
            scores, more, largest = self._terms(features, labels, first, scale, given, rest)
            start, stop = first, first + len(scores)
            value, peak, first = value + more, max(peak, largest), stop
            if exponent_of(peak):
                # Too large for the dtype: what is found now is the largest.
                continue
            if self.head.scale:
                scores *= self.head.factors[start:stop, None]
            if self.below:
                self.ops.matmul(self.head.weights[start:stop].T, scores, part)
                dh += part
            if self.step_rows is None:
                self._gradient(scores, across, start, self.g_weights[start:stop], self.g_biases[start:stop])
                continue
            at, rows = self.head.run(start, stop), self.rows[: self.rows.size // self.tile * len(scores)]
            table = rows.reshape(len(scores), -1)
            self._gradient(scores, across, start, table[:, : len(features)], table[:, -1])
            self.step_rows(at, rows)
        return value, peak

    def _gradient(
        self, scores: np.ndarray, across: np.ndarray, first: int, weights: np.ndarray, biases: np.ndarray
    ) -> None:
        """The gradients of a tile's weights and biases, from the derivatives of its scores."""
        self.ops.matmul(scores, across, weights)
        self.head.project(slice(first, first + len(scores)), weights)
        if self.head.part.bias:
            self.ops.row_sums(scores[None], biases[None])

    def _terms(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        first: int,
        scale: float,
        given: np.ndarray | None,
        rest: np.ndarray,
    ) -> tuple[np.ndarray, float, float]:
        """The derivatives of a tile (classes, b), its scaled loss, and the largest derivative where it is large."""
        loss, b = self.loss, len(labels)
        mine, own = self.sums[b : 2 * b], labels - first
        mine.fill(0)
        room = self.scores[: self.tile * b]
        scores = self.head.scores(features, first, room)
        if self.fast is not None:
            found = self.fast(loss.name, scores, own, scale, loss.kappa, loss.offset(self.head.classes), given, mine)
            if found is not None and np.isfinite(found[0]) and loss.suits(found[1], scale, given):
                rest += mine
                self._times_slopes(scores, own)
                return scores, found[0], 0.0
            scores = self.head.scores(features, first, room)
        grad = self.grad.host[: scores.size].reshape(scores.shape)
        value = loss.terms(scores, own, scale, given, grad, mine)
        rest += mine
        self._times_slopes(grad, own)
        peak = float(max(grad.max(initial=0.0), -grad.min(initial=0.0)))
        with np.errstate(over="ignore"):
            np.copyto(scores, grad, casting="same_kind")
        return scores, value, peak

    def _times_slopes(self, grad: np.ndarray, labels: np.ndarray) -> None:
        """Of a tile's derivatives (classes, b), those with respect to labels' scores before the margin."""
        if self.loss.margin is not None:
            own = own_labels(labels, len(grad))
            grad[labels[own], own] *= self.slopes[own]

    def _slopes(self, rest: np.ndarray) -> np.ndarray:
        """Minus what the labels' own scores add, (b,), from the sums of terms."""
        return rest if self.loss.margin is None else rest * self.slopes[: len(rest)]

    def _close(self, features: np.ndarray, labels: np.ndarray, rest: np.ndarray) -> None:
        """Complete what the labels' own scores add: minus the sum of the terms."""
        own = own_labels(labels, self.head.classes)
        if not own.size:
            return
        rows, at = np.unique(labels[own], return_inverse=True)
        slopes = self._slopes(rest)[own].astype(self.model.dtype)
        if self.head.scale:
            slopes *= self.head.factors[labels[own]]
        # Rows of several samples are written once.
        share = np.zeros((len(rows), len(own)), self.model.dtype)
        share[at, np.arange(len(own))] = slopes
        gradient = share @ features[:, own].T
        self.head.project(rows, gradient)
        self.g_weights[rows] -= gradient
        if self.head.part.bias:
            self.g_biases[rows] -= share.sum(axis=1)
        if self.below:
            self._dh(features)[:, own] -= self.head.weights[labels[own]].T * slopes


def rows_of(part: LinearPart, views: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weights (classes, inputs) and biases (classes,) of a head, views of the local vector."""
    ((weights, biases),) = views
    if len(weights) > 1:
        # Each class's row by itself.
        return weights[:, 0], biases[:, 0]
    return weights[0], biases[0]


def is_tiled(network: Network, classes: int, batch: int, ops: NumpyOps, task: str) -> bool:
    """Whether a model of so many classes computes scores by tiles: where all of them are more than one, on the host."""
    return task == "classes" and not ops.on_device and has_head(network) and classes > tile_size(batch)
