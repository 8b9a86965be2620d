"""The loss of a minibatch and the backward pass that follows from it, wherever the arrays are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from psmpi.backend import Mirror, NumpyOps
from psmpi.nn.layers.chain import Tape
from psmpi.nn.losses import Loss, OverClasses, OverflowsError
from psmpi.nn.model import Model
from psmpi.nn.tail import Tail

# The largest gradient component that a part hands out: its square, summed over thousands of ranks, stays in the dtype.
GRADIENT_LIMIT = {np.dtype(np.float32): 2.0**50, np.dtype(np.float64): 2.0**400}
DIVERGED = "the loss is not a finite number: the training diverged; lower --lr, or clip gradients with --clip 1"


class Objective:
    """The loss of a model's minibatch and the gradient that follows from it, wherever the model's arrays are.

    The backward pass is linear in the derivatives of the loss, float64 of any size: very large ones are scaled down by
    a power of two first, and the gradient is scaled up again and limited to GRADIENT_LIMIT in each component.

    others: ranks that compute the scores of other classes, whose sums the loss needs; they are arrays of `ops` where
    the loss is `fused`, else of the host. Labels then count from the model's first class.

    Where there are scores at each step of sequences, (classes, steps, b), a step is to the loss as a sample: scores are
    (classes, steps b), targets (steps b,) or (outputs, steps b). Of those whose target does not count, labels below 0
    or values that are NaN, there are no losses and no derivatives.

    first: the class that the model's scores begin with, from which labels of steps are to count; `bring` takes those of
    all classes, and which of them count.

    finite: whether the last loss and its scores were. Where they were not, a `lenient` loss is NaN or infinity, and any
    other an error. ids: of the samples of the minibatch, where whoever brings their targets says so.

    A loss that the backend does not have in one pass is computed by NumPy in host memory, on a device too: its steps
    look at values and index by labels, for which a device would have to be waited for.
    """

    def __init__(self, loss: Loss, model: Model, others: OverClasses | None = None):
        self.loss, self.model, self.ops = loss, model, model.ops
        self.others = others if loss.sums else None
        self.fused = loss.fused(self.ops)
        # Where the loss is computed.
        self.where = self.ops if self.fused is not None else NumpyOps()
        self.finite = True
        # What computes the last layers, where these go by tiles of classes.
        self.tail: Tail | None = None
        self.ids: np.ndarray | None = None
        self.first = 0
        # Where passes begin with what other layers put out: these, and the samples of the minibatch that they are of.
        self.trunk: tuple[Model, slice] | None = None
        # Loss, largest exponent, terms beyond the limit, largest derivative of the last minibatch.
        self.report = self.ops.mirror(self.ops.zeros(4, np.dtype(np.float64)))
        self.report.host.fill(0)
        self.grad = self._derivatives(0)
        self.given = self._targets(0)
        self.weights = self.ops.mirror(self.ops.empty(0, np.dtype(np.float64)))
        # What is known of other classes, and the slopes of margins, there.
        self.sums = self.slopes = np.empty(0)
        # The columns of scores whose targets count, where not all do; their scores.
        self.counted: np.ndarray | None = None
        self.columns = 0
        self.some = np.empty(0, model.dtype)

    def record(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`NumpyOps.record` for work that computes losses: not recorded where it waits for the device, or for ranks.

        Nor of sequences, whose lengths and targets say what is looked at.
        """
        waits = self.fused is None or self.others is not None or self.model.network.sequences
        return work if waits else self.ops.record(work)

    def reserve(self, outputs: int, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples, or steps of samples, with `outputs` scores."""
        self.grad.settle()
        self.given.settle()
        self.weights.settle()
        self.grad = self._derivatives(outputs * batch)
        self.outputs = outputs
        self.given = self._targets(batch if self.loss.task == "classes" else outputs * batch)
        if self.loss.class_weights is not None:
            self.weights = self.ops.mirror(self.ops.empty(batch, np.dtype(np.float64)))
        self.cast = self.ops.empty(self.model.size // max(1, self.model.steps) * batch, self.model.dtype)
        if self.model.steps:
            self.some = self.ops.empty(outputs * batch, self.model.dtype)
        if self.others is not None:
            self.sums = self.where.empty((len(self.loss.sums) + 1) * batch, np.dtype(np.float64))
        if self.loss.margin is not None:
            self.slopes = self.where.empty(batch, np.dtype(np.float64))

    def _derivatives(self, size: int) -> Mirror:
        """Room for derivatives; in one pass the host needs no image of them."""
        made = self.ops.empty(size, np.dtype(np.float64))
        return self.ops.mirror(made) if self.fused is None else Mirror(made)

    def _targets(self, size: int) -> Mirror:
        return self.ops.mirror(self.ops.empty(size, np.dtype(np.int64 if self.loss.task == "classes" else np.float64)))

    @property
    def nbytes(self) -> int:
        arrays = (self.grad.array, self.cast, self.given.array, self.weights.array, self.sums, self.slopes, self.some)
        return int(sum(array.nbytes for array in arrays))

    def bring(self, targets: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Take the next minibatch's targets, (b,) or (outputs, b) in host memory, to where its loss is computed.

        Of each step of sequences (steps, b) or (outputs, steps, b). weights: (b,) float64, what the loss's class
        weights say of the samples; they are not for targets of steps.
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
        self.given.settle()
        self.given.host[: targets.size].reshape(targets.shape)[...] = targets
        self.given.push(slice(0, targets.size))
        if weights is not None:
            self.weights.settle()
            self.weights.host[: len(weights)] = weights
            self.weights.push(slice(0, len(weights)))

    def targets(self, b: int) -> np.ndarray:
        """The arrays that were brought last, of b samples with as many scores as there is room for.

        Of steps of sequences those that count.
        """
        if self.model.steps:
            b = self.columns
        if self.loss.task == "classes":
            return self.given.array[:b]
        return self.given.array[: self.outputs * b].reshape(self.outputs, b)

    def losses(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        pairs: np.ndarray | None = None,
        derivatives: bool = True,
    ) -> np.ndarray:
        """Compute the scaled sum of the losses, see `value`, and its derivatives (classes, b) float64, to be returned.

        scores: (classes, b), of which labels' get the loss's margin; targets, pairs as in `Loss`. Without
        `derivatives` none are made, and what is returned means nothing.
        """
        if scores.ndim == 3:
            scores = self._counted(scores.reshape(len(scores), -1))
        found: np.ndarray = self.grad.array[: scores.size].reshape(scores.shape)
        if self.fused is None:
            self._losses_on_host(scores, targets, scale, pairs, derivatives)
            return found
        self.add_margins(scores, targets)
        if self.others is None:
            grad = found if derivatives else None
            self.fused(scores, targets, scale, pairs, None, grad, None, self.report.array)
        else:
            b = scores.shape[-1]
            rest = self.sums[:b] if "terms" in self.loss.sums else None
            given = self.others.summed(self.loss.fused_summary(self.ops, scores, targets, self.sums[b:]), targets)
            self.fused(scores, targets, scale, None, given, found, rest, self.report.array)
            if rest is not None:
                self.others.add(rest)
                self.loss.fused_close(self.ops, found, targets, rest, self.report.array, scores.dtype)
        if derivatives:
            self._multiply_slopes(found, targets, self.report.array)
            self._weigh(found, self.weights.array, self.report.array)
        return found

    def _counted(self, scores: np.ndarray) -> np.ndarray:
        """The scores (classes, n) of those of (classes, steps b) whose targets count."""
        if self.counted is None:
            return scores
        size = len(scores) * len(self.counted)
        some: np.ndarray = self.some[:size].reshape(len(scores), -1)
        some[...] = scores[:, self.counted]
        return some

    def add_margins(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """Give scores (classes, b) of labels the loss's margin, if it has one, and keep the slopes."""
        if self.loss.margin is not None:
            self.where.add_margins(scores, labels, *self.loss.margin, self.slopes[: len(labels)])

    def _multiply_slopes(self, grad: np.ndarray, labels: np.ndarray, report: np.ndarray) -> None:
        """Make of derivatives (classes, b) with respect to labels' scores with the margin those without."""
        if self.loss.margin is not None:
            self.where.multiply_labels(grad, labels, self.slopes[: len(labels)], report)

    def _weigh(self, grad: np.ndarray, weights: np.ndarray, report: np.ndarray) -> None:
        """Multiply derivatives (classes, b) by the samples' class weights; the report's largest becomes a bound."""
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
        """The same by NumPy; a device gets derivatives and report afterwards."""
        host, report = self.ops.host, self.report.host
        scores, targets = host(scores), host(targets)
        self.grad.settle()
        self.report.settle()
        self.add_margins(scores, targets)
        grad = self.grad.host[: scores.size].reshape(scores.shape) if derivatives else None
        pairs = None if pairs is None else host(pairs)
        self.finite = False
        if self.others is None:
            report[0] = self.loss.value(scores, targets, scale, grad, pairs)
        else:
            assert grad is not None
            report[0] = self._shared_loss(self.others, scores, targets, scale, grad)
        self.finite = bool(np.isfinite(report[0]))
        if not (self.finite or self.loss.lenient):
            raise FloatingPointError(DIVERGED)
        if grad is not None:
            # Without an array of absolute values: outputs at a cut are many.
            report[3] = max(grad.max(initial=0.0), -grad.min(initial=0.0))
            self._multiply_slopes(grad, targets, report)
            self._weigh(grad, self.weights.host, report)
            self.grad.push(slice(0, scores.size))
        self.report.push()

    def _shared_loss(
        self, others: OverClasses, scores: np.ndarray, labels: np.ndarray, scale: float, grad: np.ndarray
    ) -> float:
        """This rank's share of the loss; of scores that are not finite no rank of them all has a finite one.

        Whatever a rank finds, it takes part in the sums.
        """
        loss = self.loss
        given = others.summed(loss.summarize(scores, labels), labels)
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
        """The loss of own terms, or NaN; `rest`, their sum where the loss needs it, becomes that of all ranks.

        wrong: what is wrong with own terms. Where these are not finite, or what is known of all classes, all ranks
        raise an error, or have NaN where the loss is lenient.
        """
        loss, known = self.loss, given
        if rest is not None:
            if wrong is not None or not np.isfinite(value):
                rest.fill(np.inf if isinstance(wrong, OverflowsError) else np.nan)
            if self.others is not None:
                self.others.add(rest)
            known = rest
        if wrong is not None and not loss.lenient:
            raise wrong
        if wrong is None and (known is None or np.isfinite(known).all()):
            return value
        if known is not None and not loss.lenient:
            loss.check_rest(known)
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
        """Compute the scaled sum of the losses of the minibatch of a pass, and its gradient.

        scores (outputs, b): the pass's; targets, pairs as in `Loss`. dx: see `backward`.
        """
        self.losses(scores, targets, scale, pairs)
        self.backward(tape, dx)

    def backward(self, tape: Tape, dx: np.ndarray | None = None) -> None:
        """Fill the model's gradient from the derivatives that `losses` has found last.

        dx, of the shape of the model's inputs, is filled with the gradient of these; the model then begins with a layer
        with weights.
        """
        report = self.report.array
        cast = self.derivatives(tape.scores)
        # Outputs of some layers alone may be images.
        self.model.backward(tape, cast.reshape(tape.scores.shape), dx=dx)
        if dx is not None:
            self.ops.unscale(dx, report, GRADIENT_LIMIT[self.model.dtype])
        assert self.model.g is not None
        self.ops.unscale(self.model.g, report, GRADIENT_LIMIT[self.model.dtype])

    def derivatives(self, scores: np.ndarray) -> np.ndarray:
        """The derivatives that `losses` has found last, (classes, n) of the model's dtype, scaled down by the report.

        scores: of the pass, (classes, b), or of each step of sequences (classes, steps, b).
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
        """Fill the model's gradient once more for the last minibatch, from its pass; the weights are as they were.

        A pass through batch normalization, of which backward uses up what it keeps, is to be made anew.
        """
        self.backward(tape, dx)

    def value(self) -> float:
        """The scaled sum of the losses last derived. Where it, or a score, is not finite, see the class."""
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
