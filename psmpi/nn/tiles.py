"""Private layers, loss and gradients in one pass over tiles of classes, in host memory.

No array holds the scores of all classes, or the outputs of all classes' private layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.backend.reference import exponent_of
from psmpi.nn.cut import has_head, tail_of
from psmpi.nn.head import Head
from psmpi.nn.losses import Loss, OverClasses, own_labels
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.objective import DIVERGED, GRADIENT_LIMIT, Objective
from psmpi.nn.private_layers import PrivateLayers, class_numbers, goes_by_tiles
from psmpi.nn.tail import Tail, classes_at_once


def is_tiled(network: Network, classes: int, batch: int, ops: NumpyOps, task: str) -> bool:
    """Return whether a model of `classes` classes on the host computes by tiles.

    A head does if the classes fill more than one tile, private layers do if their outputs do not fit the caches.
    """
    tail = None if ops.on_device or task != "classes" else tail_of(network)
    if tail is None or has_head(network):
        return tail is not None and classes > classes_at_once(classes, batch)
    return goes_by_tiles(network, tail, classes, batch)


def tail_numbers(network: Network, tail: tuple[int, int]) -> int:
    """Return the output numbers per sample of one class in the layers tail = [first, stop)."""
    return 1 if has_head(network) else class_numbers(network, tail)


def make_tail(model: Model) -> Tail:
    """Return the object that computes the tail of a model that is `tiled`."""
    return Head(model) if has_head(model.network) else PrivateLayers(model)


class TiledObjective(Objective):
    """Objective of a model that is `tiled`: the model's passes end in features, and the objective computes the rest.

    For each tile of classes, the pass computes the scores, the terms of the loss, the gradient of the classes' weights,
    and the tile's share in the gradient of the features. For nll, another pass computes the normalizers first.

    step_rows: function that is called for each tile with the slice of the tile's weights in the local vector and their
    gradient (k,), while both are in the cache; g then has no gradient of the tail. The function requires a loss that is
    `immediate` and a tail `in_rows`.
    """

    tail: Tail

    def __init__(self, loss: Loss, model: Model, over_classes: OverClasses | None = None):
        super().__init__(loss, model, over_classes)
        self.tail = make_tail(model)
        self.fast = self.ops.fused("class_terms")
        self.step_rows: Callable[[slice, np.ndarray], None] | None = None
        self.rows = np.empty(0, model.dtype)
        # Labels' scores (b,) with the loss's margin, if it has one.
        self.with_margin: np.ndarray | None = None
        # Whether backward passes continue below the tail.
        self.below = model.gives_dx or model.chain.lowest < len(model.parts)

    def reserve(self, outputs: int, batch: int) -> None:
        self.tile = self.tail.tile(batch)
        super().reserve(self.tile, batch)
        self.scores = self.ops.empty(self.tile * batch, self.model.dtype)
        self.tail.reserve(batch, bool(self.loss.sums) and not self.loss.gathers)
        if self.step_rows is not None:
            self._make_rows()
        # Sums of terms: of this rank, of a tile, and of all ranks.
        self.sums = np.empty(3 * batch)

    def step_in_tiles(self, step_rows: Callable[[slice, np.ndarray], None]) -> None:
        """Call `step_rows` for each tile, see the class."""
        self.step_rows = step_rows
        self._make_rows()

    def _make_rows(self) -> None:
        """Allocate memory for the gradient of a tile's weights."""
        at = self.tail.run(0, self.tile)
        self.rows = self.ops.empty(at.stop - at.start, self.model.dtype)

    @property
    def nbytes(self) -> int:
        return super().nbytes + int(self.scores.nbytes + self.rows.nbytes) + self.tail.nbytes

    def losses(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        pairs: np.ndarray | None = None,
        derivatives: bool = True,
    ) -> np.ndarray:
        """Compute the loss and the gradients of the tail; return the gradient of the features.

        scores: the features (inputs, b).
        """
        features, loss, report = scores.reshape(-1, scores.shape[-1]), self.loss, self.report.host
        b = features.shape[1]
        self.finite, report[:] = False, 0
        given, rest, total = self._class_sums(features, targets), self.sums[:b], self.sums[2 * b : 3 * b]
        value, peak, wrong = np.nan, 0.0, None
        try:
            value, peak = self._pass(features, targets, scale, given)
        except FloatingPointError as error:
            wrong = error
        np.copyto(total, rest)
        value = self.agreed(value, wrong, given, total if "terms" in loss.sums else None)
        if "terms" in loss.sums:
            slopes = np.abs(self._slopes(total)[own_labels(targets, self.tail.classes)])
            peak = max(peak, float(slopes.max(initial=0.0)))
        self.last, report[3] = (features, targets, scale, given), peak
        if exponent_of(peak) and np.isfinite(value):
            # Repeat the pass with scaled derivatives, which stay in the dtype's range.
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
        """Return the array of the gradient of the features, (inputs, b)."""
        gradient: np.ndarray = self.cast[: features.size].reshape(features.shape)
        return gradient

    def _derive(self) -> None:
        """Compute the gradients of the last minibatch again, divided by the power of two that the report determines."""
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
        """Fill the rest of the model's gradient from the gradient of the features."""
        finished = self.model.finished
        if finished is not None:
            finished(self.model.tail_number)
        assert self.model.g is not None
        if self.below:
            self.model.backward(tape, self.cast[: tape.scores.size].reshape(tape.scores.shape), dx=dx)
        if dx is not None:
            self.ops.unscale(dx, self.report.array, GRADIENT_LIMIT[self.model.dtype])
        self.ops.unscale(self.model.g, self.report.array, GRADIENT_LIMIT[self.model.dtype])

    def _class_sums(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """Return the sums over all classes that precede derivatives, (sums, b) float64, or None for a loss without."""
        tail, margin, gathers = self.tail, self.loss.margin is not None, self.loss.gathers
        if margin or (self.loss.sums and not gathers):
            own = tail.label_scores(features, labels)
        if margin:
            inside = (labels >= 0) & (labels < tail.classes)
            self.add_margins(own, np.where(inside, 0, -1))
            own = own.astype(self.model.dtype).astype(np.float64)
            self.with_margin = own[0]
        if not self.loss.sums:
            return None
        if gathers:
            own = tail.normalizers(features, labels, self.with_margin)
        return own if self.over_classes is None else self.over_classes.summed(own, labels)

    def _pass(
        self, features: np.ndarray, labels: np.ndarray, scale: float, given: np.ndarray | None
    ) -> tuple[float, float]:
        """Pass over the tiles: return the scaled loss, and the largest derivative if it is large, else 0."""
        value, peak, rest, dh = 0.0, 0.0, self.sums[: len(labels)], self._dh(features)
        rest.fill(0)
        dh.fill(0)
        first = 0
        while first < self.tail.classes:
            scores, more, largest = self._terms(features, labels, first, scale, given, rest)
            start, first = first, first + len(scores)
            value, peak = value + more, max(peak, largest)
            if exponent_of(peak):
                # Derivatives are too large for the dtype: the remaining tiles only determine the largest one.
                continue
            below = dh if self.below else None
            if self.step_rows is None:
                self.tail.backward(features, start, scores, below, None)
                continue
            rows = self.rows[: self.rows.size // self.tile * len(scores)]
            self.tail.backward(features, start, scores, below, rows)
            self.step_rows(self.tail.run(start, first), rows)
        return value, peak

    def _terms(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        first: int,
        scale: float,
        given: np.ndarray | None,
        rest: np.ndarray,
    ) -> tuple[np.ndarray, float, float]:
        """Return the derivatives of a tile (classes, b), its scaled loss, and the largest derivative, or 0 if small."""
        loss, b = self.loss, len(labels)
        tile_rest, own = self.sums[b : 2 * b], labels - first
        tile_rest.fill(0)
        scores = self._scores(features, own, first)
        if self.fast is not None:
            fast_terms = self.fast(
                loss.name, scores, own, scale, loss.kappa, loss.offset(self.tail.classes), given, tile_rest
            )
            if fast_terms is not None and np.isfinite(fast_terms[0]) and loss.suits(fast_terms[1], scale, given):
                rest += tile_rest
                self._times_slopes(scores, own)
                return scores, fast_terms[0], 0.0
            scores = self._scores(features, own, first)
        grad = self.grad.host[: scores.size].reshape(scores.shape)
        value = loss.terms(scores, own, scale, given, grad, tile_rest)
        rest += tile_rest
        self._times_slopes(grad, own)
        peak = float(max(grad.max(initial=0.0), -grad.min(initial=0.0)))
        with np.errstate(over="ignore"):
            np.copyto(scores, grad, casting="same_kind")
        return scores, value, peak

    def _scores(self, features: np.ndarray, labels: np.ndarray, first: int) -> np.ndarray:
        """Return the scores of a tile (classes, b); labels: (b,), counted from the tile's first class."""
        scores = self.tail.scores(features, first, self.scores[: self.tile * len(labels)])
        if self.with_margin is not None:
            own = own_labels(labels, len(scores))
            scores[labels[own], own] = self.with_margin[own]
        return scores

    def _times_slopes(self, grad: np.ndarray, labels: np.ndarray) -> None:
        """Multiply a tile's derivatives (classes, b) of labels' scores by the margin's slopes, if there is a margin."""
        if self.loss.margin is not None:
            own = own_labels(labels, len(grad))
            grad[labels[own], own] *= self.slopes[own]

    def _slopes(self, rest: np.ndarray) -> np.ndarray:
        """Return minus the derivatives of the labels' scores, (b,), given the sums of terms."""
        return rest if self.loss.margin is None else rest * self.slopes[: len(rest)]

    def _close(self, features: np.ndarray, labels: np.ndarray, rest: np.ndarray) -> None:
        """Add the labels' scores' share to the gradients; their derivatives are minus the sums of terms `rest`."""
        self.tail.close(features, labels, self._slopes(rest), self._dh(features) if self.below else None)
