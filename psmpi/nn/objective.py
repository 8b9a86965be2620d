"""Objective: the loss of a minibatch and the backward pass, on the host or on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from psmpi.backend import Mirror, NumpyOps
from psmpi.nn.layers.chain import Tape
from psmpi.nn.losses import Loss, OverClasses, OverflowsError
from psmpi.nn.model import Model
from psmpi.nn.tail import Tail

# Largest component of a gradient: its square, summed over thousands of ranks, stays in the dtype's range.
GRADIENT_LIMIT = {np.dtype(np.float32): 2.0**50, np.dtype(np.float64): 2.0**400}
DIVERGED = "the loss is not a finite number: the training diverged; lower --lr, or clip gradients with --clip 1"


class Objective:
    """Loss of a model's minibatch and its gradient, on the device of the model's arrays.

    The backward pass is linear in the derivatives of the loss, which are float64 of any size. Very large derivatives
    are therefore scaled down by a power of two before the pass. Afterwards the gradient is scaled up again, and each
    component is limited to GRADIENT_LIMIT.

    over_classes: sums over the ranks that have the scores of the other classes, if the loss needs sums; they take
    arrays of `ops` if the loss is `fused`, otherwise of the host. Labels then count from the model's first class.

    If there are scores at each step of sequences, (classes, steps, b), the loss treats each step as a sample: scores
    are (classes, steps b), targets (steps b,) or (outputs, steps b). Steps whose target is a label below 0 or NaN have
    no loss and no derivatives.

    first: class of the model's first score, which `bring` subtracts from labels of steps.
    finite: whether the last loss and its scores were finite. If not, a `lenient` loss is NaN or infinity, and other
    losses raise an error. ids: ids of the minibatch's samples, if the caller of `bring` sets them.

    A loss that the backend cannot compute in one pass is computed by NumPy in host memory, even for a model on a
    device: its steps branch on values and index by labels, which would wait for the device.
    """

    def __init__(self, loss: Loss, model: Model, over_classes: OverClasses | None = None):
        self.loss, self.model, self.ops = loss, model, model.ops
        self.over_classes = over_classes if loss.sums else None
        self.fused = loss.fused(self.ops)
        # Operations that compute the loss.
        self.where = self.ops if self.fused is not None else NumpyOps()
        self.finite = True
        # The tail that computes the last layers, if tiles of classes do.
        self.tail: Tail | None = None
        self.ids: np.ndarray | None = None
        self.first = 0
        # The model of the layers before this model's, and the slice of the minibatch that it computes.
        self.trunk: tuple[Model, slice] | None = None
        # Results of the last minibatch: loss, largest exponent, number of terms beyond the limit, largest derivative.
        self.report = self.ops.mirror(self.ops.zeros(4, np.dtype(np.float64)))
        self.report.host.fill(0)
        self.grad = self._derivatives(0)
        self.target_mirror = self._targets(0)
        self.weights = self.ops.mirror(self.ops.empty(0, np.dtype(np.float64)))
        # Sums over all classes, and slopes of margins, in arrays of `where`.
        self.sums = self.slopes = np.empty(0)
        # Columns of the scores whose targets count, or None if all do; their number; and an array for their scores.
        self.counted: np.ndarray | None = None
        self.columns = 0
        self.some = np.empty(0, model.dtype)

    def record(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return `NumpyOps.record` of work that computes losses, or the work itself if it cannot be recorded.

        Work that waits for the device or for ranks cannot be recorded, nor work on sequences, whose lengths and targets
        decide what is computed.
        """
        waits = self.fused is None or self.over_classes is not None or self.model.network.sequences
        return work if waits else self.ops.record(work)

    def reserve(self, outputs: int, batch: int) -> None:
        """Allocate memory for minibatches of up to `batch` samples, or steps of samples, with `outputs` scores each."""
        self.grad.settle()
        self.target_mirror.settle()
        self.weights.settle()
        self.grad = self._derivatives(outputs * batch)
        self.outputs = outputs
        self.target_mirror = self._targets(batch if self.loss.task == "classes" else outputs * batch)
        if self.loss.class_weights is not None:
            self.weights = self.ops.mirror(self.ops.empty(batch, np.dtype(np.float64)))
        self.cast = self.ops.empty(self.model.size // max(1, self.model.steps) * batch, self.model.dtype)
        if self.model.steps:
            self.some = self.ops.empty(outputs * batch, self.model.dtype)
        if self.over_classes is not None:
            self.sums = self.where.empty((len(self.loss.sums) + 1) * batch, np.dtype(np.float64))
        if self.loss.margin is not None:
            self.slopes = self.where.empty(batch, np.dtype(np.float64))

    def _derivatives(self, size: int) -> Mirror:
        """Return an array for derivatives; a loss in one pass needs no copy of it on the host."""
        array = self.ops.empty(size, np.dtype(np.float64))
        return self.ops.mirror(array) if self.fused is None else Mirror(array)

    def _targets(self, size: int) -> Mirror:
        return self.ops.mirror(self.ops.empty(size, np.dtype(np.int64 if self.loss.task == "classes" else np.float64)))

    @property
    def nbytes(self) -> int:
        arrays = (
            self.grad.array,
            self.cast,
            self.target_mirror.array,
            self.weights.array,
            self.sums,
            self.slopes,
            self.some,
        )
        return int(sum(array.nbytes for array in arrays))

    def bring(self, targets: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Copy the next minibatch's targets, (b,) or (outputs, b) in host memory, to the device of the loss.

        Targets of steps of sequences are (steps, b) or (outputs, steps, b), with labels among all classes. weights:
        (b,) float64, class weights of the samples; targets of steps have none.
        """
        self.counted = None
        if self.model.steps:
            targets = targets.reshape(-1) if self.loss.task == "classes" else targets.reshape(len(targets), -1)
            counts = targets >= 0 if self.loss.task == "classes" else ~np.isnan(targets[0])
            if not counts.all():
                at = np.flatnonzero(counts)
                self.counted, targets = self.ops.put(at), targets[..., at]
            if self.first and self.loss.task == "classes":
                targets = targets - self.first
            self.columns = targets.shape[-1]
        self.target_mirror.settle()
        self.target_mirror.host[: targets.size].reshape(targets.shape)[...] = targets
        self.target_mirror.push(slice(0, targets.size))
        if weights is not None:
            self.weights.settle()
            self.weights.host[: len(weights)] = weights
            self.weights.push(slice(0, len(weights)))

    def targets(self, b: int) -> np.ndarray:
        """Return the targets of the last call of `bring`, for b samples; for steps of sequences, those that count."""
        if self.model.steps:
            b = self.columns
        if self.loss.task == "classes":
            return self.target_mirror.array[:b]
        return self.target_mirror.array[: self.outputs * b].reshape(self.outputs, b)

    def losses(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        pairs: np.ndarray | None = None,
        derivatives: bool = True,
    ) -> np.ndarray:
        """Compute the scaled sum of the losses, see `value`, and return its derivatives (classes, b) float64.

        scores: (classes, b), in which labels' scores get the loss's margin; targets, pairs as in `Loss`. derivatives:
        False computes no derivatives, and the returned array is then meaningless.
        """
        if scores.ndim == 3:
            scores = self._counted(scores.reshape(len(scores), -1))
        grads: np.ndarray = self.grad.array[: scores.size].reshape(scores.shape)
        if self.fused is None:
            self._losses_on_host(scores, targets, scale, pairs, derivatives)
            return grads
        self.add_margins(scores, targets)
        if self.over_classes is None:
            grad = grads if derivatives else None
            self.fused(scores, targets, scale, pairs, None, grad, None, self.report.array)
        else:
            b = scores.shape[-1]
            rest = self.sums[:b] if "terms" in self.loss.sums else None
            given = self.over_classes.summed(self.loss.fused_summary(self.ops, scores, targets, self.sums[b:]), targets)
            self.fused(scores, targets, scale, None, given, grads, rest, self.report.array)
            if rest is not None:
                self.over_classes.add(rest)
                self.loss.fused_close(self.ops, grads, targets, rest, self.report.array, scores.dtype)
        if derivatives:
            self._multiply_slopes(grads, targets, self.report.array)
            self._weigh(grads, self.weights.array, self.report.array)
        return grads

    def _counted(self, scores: np.ndarray) -> np.ndarray:
        """Return the columns (classes, n) of scores (classes, steps b) whose targets count."""
        if self.counted is None:
            return scores
        size = len(scores) * len(self.counted)
        some: np.ndarray = self.some[:size].reshape(len(scores), -1)
        some[...] = scores[:, self.counted]
        return some

    def add_margins(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """Apply the loss's margin, if it has one, to the labels' scores in scores (classes, b), and keep the slopes."""
        if self.loss.margin is not None:
            self.where.add_margins(scores, labels, *self.loss.margin, self.slopes[: len(labels)])

    def _multiply_slopes(self, grad: np.ndarray, labels: np.ndarray, report: np.ndarray) -> None:
        """Multiply derivatives (classes, b) of labels' scores by the margin's slopes: derivatives without margin."""
        if self.loss.margin is not None:
            self.where.multiply_labels(grad, labels, self.slopes[: len(labels)], report)

    def _weigh(self, grad: np.ndarray, weights: np.ndarray, report: np.ndarray) -> None:
        """Multiply derivatives (classes, b) by the samples' class weights; the report gets an upper bound of them."""
        if self.loss.class_weights is not None:
            self.where.scale_samples(grad[None], weights[None, : grad.shape[1]], grad[None, None])
            self.where.scale(report[3:], float(self.loss.class_weights.max()))

    def _losses_on_host(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        pairs: np.ndarray | None,
        derivatives: bool,
    ) -> None:
        """Compute `losses` by NumPy in host memory, and copy derivatives and report to the device."""
        host, report = self.ops.host, self.report.host
        scores, targets = host(scores), host(targets)
        self.grad.settle()
        self.report.settle()
        self.add_margins(scores, targets)
        grad = self.grad.host[: scores.size].reshape(scores.shape) if derivatives else None
        pairs = None if pairs is None else host(pairs)
        self.finite = False
        if self.over_classes is None:
            report[0] = self.loss.value(scores, targets, scale, grad, pairs)
        else:
            assert grad is not None
            report[0] = self._shared_loss(self.over_classes, scores, targets, scale, grad)
        self.finite = bool(np.isfinite(report[0]))
        if not (self.finite or self.loss.lenient):
            raise FloatingPointError(DIVERGED)
        if grad is not None:
            # No array of absolute values, because the outputs at a cut are large.
            report[3] = max(grad.max(initial=0.0), -grad.min(initial=0.0))
            self._multiply_slopes(grad, targets, report)
            self._weigh(grad, self.weights.host, report)
            self.grad.push(slice(0, scores.size))
        self.report.push()

    def _shared_loss(
        self, over_classes: OverClasses, scores: np.ndarray, labels: np.ndarray, scale: float, grad: np.ndarray
    ) -> float:
        """Return this rank's share of the loss; it is finite on all ranks or on none.

        Every rank takes part in the sums, even if its scores are not finite.
        """
        loss = self.loss
        given = over_classes.summed(loss.summarize(scores, labels), labels)
        rest = self.sums[: len(labels)] if "terms" in loss.sums else None
        value, wrong = np.nan, None
        try:
            value = loss.terms(scores, labels, scale, given, grad, rest)
        except FloatingPointError as error:
            wrong = error
            grad.fill(np.nan)
        value = self.agreed(value, wrong, given, rest)
        if rest is not None:
            value += loss.close(grad, labels, rest, scale)
        return value

    def agreed(
        self, value: float, wrong: FloatingPointError | None, given: np.ndarray | None, rest: np.ndarray | None
    ) -> float:
        """Return the loss `value` of this rank's terms, or NaN if some rank's terms are not finite.

        wrong: error of this rank's terms, if any. rest: (b,) sums of this rank's terms, if the loss needs them, which
        become the sums over all ranks. given: sums over all classes. If these sums or the terms are not finite, all
        ranks raise an error, or return NaN for a lenient loss.
        """
        loss, sums = self.loss, given
        if rest is not None:
            if wrong is not None or not np.isfinite(value):
                rest.fill(np.inf if isinstance(wrong, OverflowsError) else np.nan)
            if self.over_classes is not None:
                self.over_classes.add(rest)
            sums = rest
        if wrong is not None and not loss.lenient:
            raise wrong
        if wrong is None and (sums is None or np.isfinite(sums).all()):
            return value
        if sums is not None and not loss.lenient:
            loss.check_rest(sums)
        return np.nan

    def derive(
        self,
        tape: Tape,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        pairs: np.ndarray | None = None,
        dx: np.ndarray | None = None,
    ) -> None:
        """Compute the scaled sum of the losses of a pass's minibatch, and its gradient.

        scores: (outputs, b) of the pass; targets, pairs as in `Loss`; dx: see `backward`.
        """
        self.losses(scores, targets, scale, pairs)
        self.backward(tape, dx)

    def backward(self, tape: Tape, dx: np.ndarray | None = None) -> None:
        """Fill the model's gradient from the derivatives of the last call of `losses`.

        dx: array of the shape of the model's inputs, filled with their gradient; the model's first layer must then have
        weights.
        """
        report = self.report.array
        cast = self.derivatives(tape.scores)
        # The outputs of a model of some layers may be images.
        self.model.backward(tape, cast.reshape(tape.scores.shape), dx=dx)
        if dx is not None:
            self.ops.unscale(dx, report, GRADIENT_LIMIT[self.model.dtype])
        assert self.model.g is not None
        self.ops.unscale(self.model.g, report, GRADIENT_LIMIT[self.model.dtype])

    def derivatives(self, scores: np.ndarray) -> np.ndarray:
        """Return the derivatives of the last call of `losses`, (classes, n) of the model's dtype.

        The derivatives are scaled down by the power of two that the report determines. scores: of the pass, (classes,
        b), or (classes, steps, b) for steps of sequences.
        """
        report = self.report.array
        cast: np.ndarray = self.cast[: scores.size].reshape(len(scores), -1)
        some = cast if self.counted is None else self.some[: len(cast) * len(self.counted)].reshape(len(cast), -1)
        self.ops.cast_scores(self.grad.array[: some.size].reshape(some.shape), some, report)
        if self.counted is not None:
            cast.fill(0)
            cast[:, self.counted] = some
        return cast

    def again(self, tape: Tape, dx: np.ndarray | None = None) -> None:
        """Fill the model's gradient again for the last minibatch, from the tape of its pass and unchanged weights.

        A pass through batch normalization must be repeated first, because backward overwrites arrays of its tape.
        """
        self.backward(tape, dx)

    def value(self) -> float:
        """Return the scaled sum of the losses of the last minibatch; raise FloatingPointError if it is not finite.

        A `lenient` loss returns NaN or infinity instead.
        """
        self.report.fetch()
        self.report.wait()
        value, worst, clipped, _ = (float(number) for number in self.report.host)
        if self.fused is not None:
            self.finite = False
            try:
                self.loss.check(worst)
                if not np.isfinite(value):
                    raise FloatingPointError(DIVERGED)
            except FloatingPointError:
                if not self.loss.lenient:
                    raise
                return np.nan
            self.finite = True
            self.loss.clipped += int(clipped)
        return value
