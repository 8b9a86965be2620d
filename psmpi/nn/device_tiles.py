"""Pass over tiles of classes on a device, without an array of all scores and without waiting for the device."""

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

# Scores of a tile, which are enough to keep a device busy; with their derivatives they take 50 MB in float32.
ELEMENTS = 1 << 22


def tile_size(batch: int) -> int:
    """Return the number of classes of a tile for minibatches of `batch` samples."""
    return max(LEAST, ELEMENTS // max(1, batch))


def has_device_tiles(network: Network, classes: int, batch: int, loss: Loss, ops: NumpyOps) -> bool:
    """Return whether a model on a device computes scores by tiles.

    Tiles are used if the classes fill more than one tile, the device computes the loss, and scores are not cosines.
    """
    plain = has_head(network) and not isinstance(network.layers[-1], Cosine)
    return loss.fused(ops) is not None and plain and classes > tile_size(batch)


class DeviceHead(Head):
    """Head with features on a device; `tiles` copies the scores to host memory, where metrics are computed."""

    def tiles(self, features: Any) -> Iterator[tuple[int, np.ndarray]]:
        for first, scores in super().tiles(features):
            yield first, self.ops.host(scores)


class DeviceTiledObjective(Objective):
    """Objective of a model with a head on a device, for a loss that is `fused`; see `TiledObjective`.

    For each tile, the pass computes the scores, the terms of the loss, the gradient of the tile's rows, and the tile's
    share in the gradient of the features. For nll, another pass computes the normalizers first. Values stay on the
    device, where the report finally covers all tiles.

    Very large derivatives need no second pass. The derivatives of a tile are scaled down by a power of two, which the
    largest derivative so far determines. If a later tile needs a larger power, the present gradient of the features is
    scaled further. In the end, the rows of each tile are scaled by the factor that their power lacks. Numbers that
    underflow become 0, as in `Objective`, which scales all derivatives at once.
    """

    tail: DeviceHead

    def __init__(self, loss: Loss, model: Model, over_classes: OverClasses | None = None):
        super().__init__(loss, model, over_classes)
        assert self.fused is not None
        self.tail = DeviceHead(model)
        self.g_weights = self.tail.g_weights
        self.g_biases = self.tail.g_biases if self.tail.part.bias else None
        # Whether backward passes continue below the head.
        self.below = model.gives_dx or model.chain.lowest < len(model.parts)
        self.terms = "terms" in loss.sums
        # Operations that only the device's backend has.
        self.device: Any = model.ops
        # With other ranks, the work between two exchanges is recorded, because the whole step cannot be.
        work: Callable[[Callable[..., Any]], Callable[..., Any]] = self.ops.record
        if self.over_classes is None:
            work = lambda plain: plain  # noqa: E731
        self.find, self.make, self.finish = work(self._find), work(self._make), work(self._finish)

    def reserve(self, outputs: int, batch: int) -> None:
        self.tile = min(outputs, tile_size(batch))
        super().reserve(self.tile, batch)
        real, dtype, empty = np.dtype(np.float64), self.model.dtype, self.ops.empty
        self.scores, self.part = empty(self.tile * batch, dtype), empty(self.model.size * batch, dtype)
        self.own = empty(batch, np.dtype(np.int64))
        self.reports = empty(4 * -(-outputs // self.tile), real).reshape(-1, 4)
        # Sums over all classes before the derivatives, and sums of terms: of a tile, of this rank, of all ranks.
        self.sums = empty((len(self.loss.sums) + 3) * batch, real)
        # The scale of the last minibatch, kept on the device because a recorded step may have been replayed.
        self.factor = empty(1, real)

    @property
    def nbytes(self) -> int:
        arrays = self.scores, self.part, self.own, self.reports, self.factor
        return super().nbytes + int(sum(array.nbytes for array in arrays))

    def losses(
        self, scores: Any, targets: Any, scale: float, pairs: Any | None = None, derivatives: bool = True
    ) -> Any:
        """Compute the loss and the gradients of the head; return the gradient of the features.

        scores: the features (inputs, b).
        """
        features, b = scores.reshape(-1, scores.shape[-1]), scores.shape[-1]
        self.factor.fill(scale)
        class_sums = self._class_sums(b)
        if class_sums is not None:
            self.find(features, targets, class_sums)
            if self.over_classes is not None:
                class_sums[...] = self.over_classes.summed(class_sums, targets)
        self.make(features, targets, scale)
        if self.terms:
            _, rests, total = self._sums(b)
            total[...] = rests
            if self.over_classes is not None:
                self.over_classes.add(total)
        self.finish(features, targets)
        return self._dh(features)

    def again(self, tape: Any, dx: Any | None = None) -> None:
        scale, b = float(self.ops.host(self.factor)[0]), tape.scores.shape[-1]
        features, targets = tape.scores.reshape(-1, b), self.targets(b)
        self._make(features, targets, scale)
        self._finish(features, targets)
        self.backward(tape, dx)

    def backward(self, tape: Any, dx: Any | None = None) -> None:
        """Fill the rest of the model's gradient from the gradient of the features."""
        model, finished = self.model, self.model.finished
        if finished is not None:
            finished(model.tail_number)
        assert model.g is not None
        if self.below:
            model.backward(tape, self._dh(tape.scores), dx=dx)
        if dx is not None:
            self.ops.unscale(dx, self.report.array, GRADIENT_LIMIT[model.dtype])
        self.ops.unscale(model.g, self.report.array, GRADIENT_LIMIT[model.dtype])

    def _dh(self, features: Any) -> Any:
        """Return the gradient of the features, in their shape."""
        return self.cast[: features.size].reshape(features.shape)

    def _class_sums(self, b: int) -> Any | None:
        """Return the array of the sums over all classes that precede derivatives, (sums, b), in `Loss.terms`' order.

        None if the loss has no sums.
        """
        if not self.loss.sums:
            return None
        rows = len(self.loss.sums) - self.terms
        return self.sums[: rows * b].reshape(rows, b)

    def _sums(self, b: int) -> Any:
        """Return the arrays of the sums of terms, (3, b): of a tile, of this rank, of all ranks."""
        return self.sums[self.sums.size - 3 * b :].reshape(3, b)

    def _find(self, features: Any, labels: Any, class_sums: Any) -> None:
        """Compute this rank's share of the sums that precede derivatives, in `known`."""
        head = self.tail
        if not self.loss.gathers:
            self.device.head_labels(features, labels, head.weights, head.biases, class_sums)
            return
        room = self.scores[: self.tile * len(labels)]
        for first in range(0, head.classes, self.tile):
            self.device.add_normalizers(first, head.scores(features, first, room), labels, class_sums)

    def _make(self, features: Any, labels: Any, scale: float) -> None:
        """Pass over the tiles: compute reports, sums of terms, and gradients without the labels' derivatives."""
        head, loss, device, b = self.tail, self.loss, self.device, len(labels)
        one_pass = device.fused(f"{loss.name}_loss")
        settings = (scale, loss.kappa, loss.tangent, loss.limit is None, loss.offset(head.classes))
        rest, rests = self._sums(b)[:2] if self.terms else (None, None)
        room, part = self.scores[: self.tile * b], self.part[: features.size].reshape(features.shape)
        dh, class_sums, own, before = self._dh(features), self._class_sums(b), labels, None
        for first, report in zip(range(0, head.classes, self.tile), self.reports, strict=True):
            scores = head.scores(features, first, room)
            stop, grad = first + len(scores), self.grad.array[: scores.size].reshape(scores.shape)
            one_pass(scores, own, *settings, None, class_sums, grad, rest, report)
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
        """Compute the report of all tiles, complete the gradients and scale them as the report says."""
        device, rest, report = self.device, self._sums(len(labels))[2] if self.terms else None, self.report.array
        device.close_head(features, labels, rest, self.reports, self.tile, self.g_weights, self.g_biases, report)
        if self.below and rest is not None:
            last, dh = self.reports[-1], self._dh(features)
            device.close_features(labels, rest, self.tail.weights, last, report, dh)
