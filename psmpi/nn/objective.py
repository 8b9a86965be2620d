"""The loss of a minibatch and the backward pass that follows from it, wherever the arrays are."""

from __future__ import annotations

import numpy as np

from psmpi.nn.layers.chain import Tape
from psmpi.nn.losses import Loss
from psmpi.nn.model import Model

# The largest gradient component that a part hands out: its square, summed over thousands of ranks, stays in the dtype.
GRADIENT_LIMIT = {np.dtype(np.float32): 2.0**50, np.dtype(np.float64): 2.0**400}
DIVERGED = "the loss is not a finite number: the training diverged; lower --lr, or clip gradients with --clip 1"


class Objective:
    """The loss of a model's minibatch and the gradient that follows from it, wherever the model's arrays are.

    The backward pass is linear in the derivatives of the loss, float64 of any size: very large ones are scaled down by
    a power of two first, and the gradient is scaled up again and limited to GRADIENT_LIMIT in each component.
    """

    def __init__(self, loss: Loss, model: Model):
        self.loss, self.model, self.ops = loss, model, model.ops
        # Loss, largest exponent, terms beyond the limit, largest derivative of the last minibatch.
        self.report = self.ops.mirror(self.ops.zeros(4, np.dtype(np.float64)))
        self.on_device = False

    def reserve(self, classes: int, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples with scores of `classes` classes."""
        self.grad = self.ops.empty(classes * batch, np.dtype(np.float64))
        self.cast = self.ops.empty(self.model.size * batch, self.model.dtype)

    @property
    def nbytes(self) -> int:
        return int(self.grad.nbytes + self.cast.nbytes)

    def losses(
        self,
        scores: np.ndarray,
        labels: np.ndarray,
        scale: float,
        own: slice,
        pairs: np.ndarray | None = None,
        derivatives: bool = True,
    ) -> np.ndarray:
        """Compute the scaled sum of the losses, see `value`, and its derivatives (classes, b) float64, to be returned.

        Arguments as in `derive`. Without `derivatives` none are made, and what is returned means nothing.
        """
        loss, report = self.loss, self.report.array
        found = self.grad[: scores.size].reshape(scores.shape)
        grad = found if derivatives else None
        self.on_device = loss.derive_there(self.ops, scores, labels, scale, pairs, own, grad, report)
        if not self.on_device:
            report[0] = loss(scores, labels, scale, grad, pairs)
            if not np.isfinite(report[0]):
                raise FloatingPointError(DIVERGED)
            if grad is not None:
                # Without an array of absolute values: outputs at a cut are many.
                report[3] = max(grad[own].max(initial=0.0), -grad[own].min(initial=0.0))
        return found

    def derive(
        self,
        tape: Tape,
        scores: np.ndarray,
        labels: np.ndarray,
        scale: float,
        own: slice,
        pairs: np.ndarray | None = None,
        dx: np.ndarray | None = None,
    ) -> None:
        """Fill the model's gradient with that of the scaled sum of the losses of the minibatch of a pass.

        scores (classes, b), the pass's own being `own`; labels, pairs as in `Loss`. dx, of the shape of the model's
        inputs, is filled with the gradient of these; the model then begins with a layer with weights.
        """
        grad, report = self.losses(scores, labels, scale, own, pairs), self.report.array
        cast = self.cast[: grad[own].size].reshape(grad[own].shape)
        self.ops.cast_scores(grad[own], cast, report)
        # Outputs of some layers alone may be images.
        self.model.backward(tape, cast.reshape(tape.scores.shape), dx=dx)
        if dx is not None:
            self.ops.unscale(dx, report, GRADIENT_LIMIT[self.model.dtype])
        assert self.model.g is not None
        self.ops.unscale(self.model.g, report, GRADIENT_LIMIT[self.model.dtype])

    def value(self) -> float:
        """The scaled sum of the losses last derived. FloatingPointError where it, or a score, is not finite."""
        self.report.fetch()
        self.report.wait()
        value, worst, clipped, _ = (float(number) for number in self.report.host)
        if self.on_device:
            self.loss.check(worst)
            if not np.isfinite(value):
                raise FloatingPointError(DIVERGED)
            self.loss.clipped += int(clipped)
        return value
