"""The pass over tiles of classes on a device: nothing waits for it, and there is no array of all scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.nn.cut import has_head
from psmpi.nn.head import Head
from psmpi.nn.layers.cosine import Cosine
from psmpi.nn.losses import Loss, OverClasses
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.objective import GRADIENT_LIMIT, Objective
from psmpi.nn.tail import LEAST

# Scores of a tile: enough for a device to be busy with; with their derivatives they take 50 MB in float32.
ELEMENTS = 1 << 22


def tile_size(batch: int) -> int:
    """Classes of a tile, given the minibatch."""
    return max(LEAST, ELEMENTS // max(1, batch))


def has_device_tiles(network: Network, classes: int, batch: int, loss: Loss, ops: NumpyOps) -> bool:
    """Whether a model on a device computes scores by tiles: where all are more than one, and the loss is made there.

    Scores that are cosines are made all at once.
    """
    plain = has_head(network) and not isinstance(network.layers[-1], Cosine)
    return loss.fused(ops) is not None and plain and classes > tile_size(batch)


class DeviceHead(Head):
    """The same with features on a device; tests, which are made in host memory, bring it tile after tile."""

    def tiles(self, features: Any) -> Iterator[tuple[int, np.ndarray]]:
        for first, scores in super().tiles(features):
            yield first, self.ops.host(scores)


class DeviceTiledObjective(Objective):
    """The objective of a model with a head on a device, of a loss that is `fused`; see `TiledObjective`.

    For each tile: scores, terms of the loss, the gradient of its rows, and what they add to the gradient of the
    features. Of nll a pass for the normalizer comes before. Values stay on the device, where the report is of all tiles
    in the end.

    Nothing is made again where derivatives are very large: the largest is known of all tiles so far, and those of the
    next tile are scaled down by the power of two that it asks for. Where a later one is larger, what there is by then
    of the gradient of the features is scaled further; the rows are at the end, by what their tile lacks of the power
    for all of them. Numbers so small that these powers take them out of the dtype are 0, as they are where all are
    scaled at once, as in `Objective`.
    """

    tail: DeviceHead

    def __init__(self, loss: Loss, model: Model, others: OverClasses | None = None):
        super().__init__(loss, model, others)
        assert self.fused is not None
        self.tail = DeviceHead(model)
        self.g_weights = self.tail.g_weights
        self.g_biases = self.tail.g_biases if self.tail.part.bias else None
        # Whether anything before the head has weights.
        self.below = model.hands_on or model.chain.lowest < len(model.parts)
        self.terms = "terms" in loss.sums
        # Operations of the device alone.
        self.device: Any = model.ops
        # With other ranks a step is not recorded as a whole, but what lies between exchanges is.
        work: Callable[[Callable[..., Any]], Callable[..., Any]] = self.ops.record
        if self.others is None:
            work = lambda plain: plain  # noqa: E731
        self.find, self.make, self.finish = work(self._find), work(self._make), work(self._finish)

    def reserve(self, outputs: int, batch: int) -> None:
        self.tile = min(outputs, tile_size(batch))
        super().reserve(self.tile, batch)
        real, dtype, empty = np.dtype(np.float64), self.model.dtype, self.ops.empty
        self.scores, self.part = empty(self.tile * batch, dtype), empty(self.model.size * batch, dtype)
        self.own = empty(batch, np.dtype(np.int64))
        self.reports = empty(4 * -(-outputs // self.tile), real).reshape(-1, 4)
        # What is known of all classes, and sums of terms: a tile's, this rank's, all ranks'.
        self.sums = empty((len(self.loss.sums) + 3) * batch, real)
        # The factor of the last minibatch, whoever has played it back.
        self.factor = empty(1, real)

    @property
    def nbytes(self) -> int:
        arrays = self.scores, self.part, self.own, self.reports, self.factor
        return super().nbytes + int(sum(array.nbytes for array in arrays))

    def losses(
        self, scores: Any, targets: Any, scale: float, pairs: Any | None = None, derivatives: bool = True
    ) -> Any:
        """Compute loss and gradients of the head; scores: the features (inputs, b), whose gradient is returned."""
        features, b = scores.reshape(-1, scores.shape[-1]), scores.shape[-1]
        self.factor.fill(scale)
        known = self._known(b)
        if known is not None:
            self.find(features, targets, known)
            if self.others is not None:
                known[...] = self.others.summed(known, targets)
        self.make(features, targets, scale)
        if self.terms:
            _, rests, total = self._sums(b)
            total[...] = rests
            if self.others is not None:
                self.others.add(total)
        self.finish(features, targets)
        return self._dh(features)

    def again(self, tape: Any, dx: Any | None = None) -> None:
        scale, b = float(self.ops.host(self.factor)[0]), tape.scores.shape[-1]
        features, targets = tape.scores.reshape(-1, b), self.targets(b)
        self._make(features, targets, scale)
        self._finish(features, targets)
        self.backward(tape, dx)

    def backward(self, tape: Any, dx: Any | None = None) -> None:
        """Fill the rest of the model's gradient from that of the features."""
        model, finished = self.model, self.model.finished
        if finished is not None:
            finished(model.behind)
        assert model.g is not None
        if self.below:
            model.backward(tape, self._dh(tape.scores), dx=dx)
        if dx is not None:
            self.ops.unscale(dx, self.report.array, GRADIENT_LIMIT[model.dtype])
        self.ops.unscale(model.g, self.report.array, GRADIENT_LIMIT[model.dtype])

    def _dh(self, features: Any) -> Any:
        """The gradient of the features, in their shape."""
        return self.cast[: features.size].reshape(features.shape)

    def _known(self, b: int) -> Any | None:
        """(sums, b) what is known of all classes before any derivative, in the order of `Loss.terms`."""
        if not self.loss.sums:
            return None
        rows = len(self.loss.sums) - self.terms
        return self.sums[: rows * b].reshape(rows, b)

    def _sums(self, b: int) -> Any:
        """Sums of terms (3, b): a tile's, this rank's, all ranks'."""
        return self.sums[self.sums.size - 3 * b :].reshape(3, b)

    def _find(self, features: Any, labels: Any, known: Any) -> None:
        """This rank's share of what is known before."""
        head = self.tail
        if not self.loss.gathers:
            self.device.head_labels(features, labels, head.weights, head.biases, known)
            return
        room = self.scores[: self.tile * len(labels)]
        for first in range(0, head.classes, self.tile):
            self.device.add_normalizers(first, head.scores(features, first, room), labels, known)

    def _make(self, features: Any, labels: Any, scale: float) -> None:
        """One pass over the tiles: reports, sums of terms, and gradients without what these add."""
        head, loss, device, b = self.tail, self.loss, self.device, len(labels)
        one_pass = device.fused(f"{loss.name}_loss")
        settings = (scale, loss.kappa, loss.tangent, loss.limit is None, loss.offset(head.classes))
        rest, rests = self._sums(b)[:2] if self.terms else (None, None)
        room, part = self.scores[: self.tile * b], self.part[: features.size].reshape(features.shape)
        dh, known, own, before = self._dh(features), self._known(b), labels, None
        for first, report in zip(range(0, head.classes, self.tile), self.reports, strict=True):
            scores = head.scores(features, first, room)
            stop, grad = first + len(scores), self.grad.array[: scores.size].reshape(scores.shape)
            one_pass(scores, own, *settings, None, known, grad, rest, report)
            own = self.own[:b]
            device.next_tile(scores, stop, labels, before, rest, report, rests, own)
            device.cast_scores(grad, scores, report)
            if self.below:
                device.matmul(head.weights[first:stop].T, scores, dh if before is None else part)
                if before is not None:
                    device.add_part(part, before, report, dh)
            device.matmul(scores, features.T, self.g_weights[first:stop])
            if self.g_biases is not None:
                device.row_sums(scores[None], self.g_biases[None, first:stop])
            before = report

    def _finish(self, features: Any, labels: Any) -> None:
        """The report, and gradients that are complete and scaled as it says."""
        device, rest, report = self.device, self._sums(len(labels))[2] if self.terms else None, self.report.array
        device.close_head(features, labels, rest, self.reports, self.tile, self.g_weights, self.g_biases, report)
        if self.below and rest is not None:
            last, dh = self.reports[-1], self._dh(features)
            device.close_features(labels, rest, self.tail.weights, last, report, dh)
