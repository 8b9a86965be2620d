"""Base classes of losses: settings, buffers, checks, and the derivatives of sums over pairs of classes.

Scores are (classes, b). Targets are labels (b,), which are class indices, or in a regression values (outputs, b).
Losses are computed in float64 for any dtype of the scores, so that the exponentials of `psl` are accurate wherever the
scores' dtype can represent them, and beyond.

If each rank has the scores of some consecutive classes, every rank computes `Loss.summarize` of its scores, the ranks
add or merge these summaries, and each rank computes the loss of its scores by `Loss.terms`. Labels then count from the
rank's first class, and a label outside the rank's classes means that another rank has its score. `Loss.close` then
adds the derivatives that need the sum of the terms of all classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from psmpi.nn.margin import Margin

if TYPE_CHECKING:
    from psmpi.backend import NumpyOps

# Margin in the exponent, below float64's largest number, that stays free for sums and tangents of exponentials.
HEADROOM = 60.0

# Mean loss, in units of the loss's largest derivative, above which a training has diverged: the scores would have to
# move by as much. Successful trainings had epochs with values up to 5e3.
HOPELESS = 1e6

# Derivatives up to this size stay in float32 in any backward pass.
PEAK = 2.0**20

# Sums and maxima of a sample over all classes, by the names of `Loss.sums`.
SUMS = {
    "label": "c_y, the score of the label",
    "terms": "the sum of d l / d c_j over j != y, which is minus d l / d c_y",
    "largest": "max_j c_j",
    "exponentials": "sum_j exp(c_j - max_k c_k)",
}


def largest_exponent(dtype: np.dtype) -> float:
    """Return the largest exponent whose exponential fits `dtype` and, many times, a sum in float64: 88.7 or 649.8."""
    return min(log(np.finfo(dtype).max), log(np.finfo(np.float64).max) - HEADROOM)


def own_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the samples, in order, whose labels (b,) are in [0, classes)."""
    return np.flatnonzero((labels >= 0) & (labels < classes))


class OverClasses(Protocol):
    """Sums over the ranks that share the classes of the same samples; all these ranks make the same calls."""

    def summed(self, summary: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the ranks' summaries (summary_size, b) float64 added or merged, (sums, b) float64.

        See `Loss.summarize` and `Loss.merge`.
        """

    def add(self, values: np.ndarray) -> None:
        """Replace values (b,) float64 by their sum over the ranks, in place."""


class OverflowsError(FloatingPointError):
    """Error of an exponential beyond the dtype's range while clipping is off."""


class Loss:
    """Loss: scale * sum over samples of l(scores, targets), and its derivative with respect to the scores.

    formula: l in one line, for help.
    pairwise: whether the loss is a sum over ordered pairs (label, other class), so that any set of pairs can be
    computed separately. constant: the number that the loss adds to the pairs for each sample.
    sums: names in SUMS of the sums over all classes that the loss needs for a sample. The derivative with respect to a
    class's score follows from these sums, that score, and whether the class is the label's. The value is a sum over
    classes of functions of a score and these sums. All sums except "terms" are known before any derivative.
    gathers: whether ranks' summaries are merged by `merge` instead of added.
    outputs: number of classes of all ranks together, by default the number of scores in a call.
    tasks: tasks that the loss can learn, "classes" with labels or "regression" with values; task: the chosen one.
    settings: names of the settings below that the loss uses. weights: the divisor of a sample's derivatives in psl.
    options: dataclass of the settings of this loss alone, see `psmpi.config.Settings`; own: their values.
    divisors, rests: see `PSL`.
    scale: factor of cosines that gives the scores, 0 if the scores are not cosines.
    margin: change of the label's score that `Objective` applies in training before it calls the loss.
    class_weights: (classes,) float64 over all ranks' classes, by which `Objective` multiplies the derivatives of a
    class's samples in training. Values are without class weights, in training too. None: no weights.
    immediate: whether derivatives are bounded, and final as soon as `sums` are known.
    lenient: whether `Objective` and `Metric` get NaN instead of an error for scores that are not finite.
    Buffers grow to the largest minibatch and are then reused.
    """

    name = ""
    formula = ""
    pairwise = False
    constant = 0.0
    sums: tuple[str, ...] = ()
    gathers = False
    immediate = False
    tasks: tuple[str, ...] = ("classes",)
    settings: tuple[str, ...] = ()
    options: type[Any] | None = None
    scale = 0.0
    margin: Margin | None = None
    class_weights: np.ndarray | None = None

    def __init__(
        self,
        dtype: np.dtype,
        *,
        kappa: float = 1.0,
        exp_clip: float | None = 0.0,
        task: str = "classes",
        outputs: int = 0,
        weights: str = "none",
        own: Any = None,
    ):
        self.own = self.options() if own is None and self.options is not None else own
        self.dtype, self.kappa, self.task, self.outputs = np.dtype(dtype), float(kappa), task, outputs
        self.clipped, self.lenient, self.weights = 0, False, weights
        self.largest = largest_exponent(self.dtype if weights == "none" else np.dtype(np.float64))
        self.limit = self.largest if exp_clip == 0.0 else exp_clip
        self.divisors: np.ndarray | None = None
        self.rests: np.ndarray | None = None
        self._store = np.empty(0)

    @property
    def tangent(self) -> float:
        """Exponent above which psl continues as its tangent, or fails if clipping is off."""
        return self.largest if self.limit is None else self.limit

    @property
    def nbytes(self) -> int:
        """Bytes of the loss's buffers."""
        return self._store.nbytes

    def sample_weights(self, labels: np.ndarray) -> np.ndarray | None:
        """Return the class weights (b,) of samples with labels (b,) among all classes; None without class weights."""
        return None if self.class_weights is None else self.class_weights[labels]

    def check(self, worst: float) -> None:
        """Raise FloatingPointError for a largest exponent that is not finite, or beyond the limit with clipping off."""
        if not worst < np.inf:
            raise FloatingPointError(
                "a score is not a finite number: the training diverged; lower --lr, clip gradients with --clip 1, or "
                "use --loss logistic"
            )
        if self.limit is None and worst > self.tangent:
            raise OverflowsError(
                f"exp(kappa (c_j - c_y)) in the PSL loss overflows {self.dtype} and --exp-clip is off: set --exp-clip "
                "auto, lower --lr, clip gradients with --clip 1, or use --loss logistic"
            )

    def check_rest(self, rest: np.ndarray) -> None:
        """Raise FloatingPointError for non-finite sums "terms" (b,) over all ranks, if the loss checks them."""

    def __call__(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        grad: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        """Return the scaled sum of the losses, and write its derivative to `grad` (classes, b) float64.

        pairs: (classes, classes) bool, symmetric, restricts a pairwise loss to the terms of these pairs, without the
        loss's constant, which belongs to no pair.
        """
        given = self.summarize(scores, targets) if self.sums else None
        rest = np.empty(scores.shape[-1]) if grad is not None and "terms" in self.sums else None
        value = self.terms(scores, targets, scale, given, grad, rest, pairs)
        if grad is not None and rest is not None:
            value += self.close(grad, targets, rest, scale)
        return value

    def summary_size(self, classes: int) -> int:
        """Return how many numbers per sample `summarize` returns for scores of `classes` classes."""
        return 1

    def summarize(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the share of some classes in the sums that precede any derivative, (summary_size, b) float64.

        By default the share is the score of the label, or 0 if another rank has that score. scores: (classes, b);
        labels: (b,), counted from the first of these classes.
        """
        own = own_labels(labels, len(scores))
        label_scores = np.zeros((1, scores.shape[1]))
        label_scores[0, own] = scores[labels[own], own]
        return label_scores

    def merge(self, gathered: np.ndarray, starts: Sequence[int], labels: np.ndarray) -> np.ndarray:
        """Return the sums over all classes, (sums, b) float64, from the stacked summaries of all ranks.

        Only losses with `gathers` have this method. gathered: (sum of the ranks' summary_size, b); starts: (ranks + 1,)
        the first class of each rank and the class after the last one, counted like the labels (b,).
        """
        raise NotImplementedError

    def terms(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        given: np.ndarray | None = None,
        grad: np.ndarray | None = None,
        rest: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        """Return the share of some classes in the value of a call, and write derivatives of the whole value to `grad`.

        given: (sums, b) float64, the added or merged summaries, with the label's score last; None if the loss has no
        `sums`. rest: (b,) float64, filled with the scaled share of these classes in the sum "terms", if the loss has
        it. The rows of the labels in grad are then 0, and `close` fills them.
        """
        raise NotImplementedError

    def close(self, grad: np.ndarray, labels: np.ndarray, rest: np.ndarray, scale: float) -> float:
        """Complete the derivatives of labels' scores; return the part of the value that `terms` left out.

        rest: (b,) the sums "terms" over all classes, see `terms`. Every term is a function of c_j - c_y, so the
        derivative with respect to c_y is minus the sum of the other derivatives.
        """
        own = own_labels(labels, len(grad))
        grad[labels[own], own] = -rest[own]
        return 0.0

    def value(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        grad: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
        given: np.ndarray | None = None,
        over_classes: OverClasses | None = None,
    ) -> float:
        """Return the value of a call; a `lenient` loss returns NaN, and fills `grad` with NaN, instead of an error.

        With `given`, the value is the share of some classes, without derivatives; over_classes: sums over the ranks
        that have the other classes.
        """
        try:
            if given is not None:
                return self.partial_value(scores, targets, scale, given, over_classes)
            return self(scores, targets, scale, grad, pairs)
        except FloatingPointError:
            if not self.lenient:
                raise
            if grad is not None:
                grad.fill(np.nan)
            return np.nan

    def partial_value(
        self, scores: np.ndarray, targets: np.ndarray, scale: float, given: np.ndarray, over_classes: OverClasses | None
    ) -> float:
        """Return the share of some classes in a call's value; given as in `terms`.

        All ranks of `over_classes` call this.
        """
        return self.terms(scores, targets, scale, given)

    def diverged(self, mean: float, clipped: float, size: float = 1.0) -> bool:
        """Return whether a mean loss over the samples of an epoch shows that the training has diverged.

        clipped: fraction of psl's terms beyond `tangent`; size: for classes the number of classes minus 1, for a
        regression the mean over samples of sum_j t_j^2.
        """
        return mean > HOPELESS

    def constants(self, divisors: np.ndarray | None, b: int) -> float:
        """Return the number that b samples add to a sum over pairs of classes; divisors: see `PSL`."""
        return self.constant * b

    def fused(self, ops: NumpyOps) -> Callable[..., None] | None:
        """Return a function that computes the loss in one pass on arrays of `ops`, or None if `ops` has none.

        The function takes scores, targets, scale, pairs, given, grad and rest as in `terms`, and report, and fills grad
        and rest unless they are None, and report (4,) float64: the scaled loss, psl's largest exponent, the number of
        psl's terms beyond `tangent`, and the largest derivative. With given = None, scores are of all classes; with
        rest = None, the function completes the labels' rows of grad.
        """
        one_pass = ops.fused(f"{self.name}_loss")
        if one_pass is None or self.task != "classes":
            return None

        def compute(
            scores: np.ndarray,
            labels: np.ndarray,
            scale: float,
            pairs: np.ndarray | None,
            given: np.ndarray | None,
            grad: np.ndarray | None,
            rest: np.ndarray | None,
            report: np.ndarray,
        ) -> None:
            settings = (scale, self.kappa, self.tangent, self.limit is None, self.offset(len(scores)))
            one_pass(scores, labels, *settings, pairs, given, grad, rest, report)

        return compute

    def fused_summary(self, ops: NumpyOps, scores: np.ndarray, labels: np.ndarray, room: np.ndarray) -> np.ndarray:
        """Compute `summarize` on arrays of `ops`; return a view of the start of room (any,) float64."""
        out = room[: scores.shape[1]].reshape(1, -1)
        self._operation(ops, "label_scores")(scores, labels, out)
        return out

    def fused_close(
        self,
        ops: NumpyOps,
        grad: np.ndarray,
        labels: np.ndarray,
        rest: np.ndarray,
        report: np.ndarray,
        dtype: np.dtype,
    ) -> None:
        """Compute `close` on arrays of `ops`, and update the report's largest derivative; dtype: of the scores."""
        self._operation(ops, "close_losses")(grad, labels, rest, report, dtype)

    @staticmethod
    def _operation(ops: NumpyOps, name: str) -> Callable[..., None]:
        operation = ops.fused(name)
        if operation is None:
            raise TypeError(f"the backend {ops.name} has no {name}")
        return operation

    def suits(self, largest: float, scale: float, given: np.ndarray | None) -> bool:
        """Return whether a backend's operation `class_terms` may compute the terms in the scores' dtype.

        The terms must be as accurate as the scores, and their derivatives, and sums of products with them, must be in
        the dtype's range. largest: the second result of the operation; scale, given: as in `terms`.
        """
        return True

    def offset(self, classes: int) -> float:
        """Return the number that the loss adds to every score first; classes: number of scores of a sample."""
        return 0.0

    def _buffers(self, scores: np.ndarray, count: int) -> list[np.ndarray]:
        size = scores.size
        if self._store.size < count * size:
            self._store = np.empty(count * size)
        return [self._store[k * size : (k + 1) * size].reshape(scores.shape) for k in range(count)]


class PairwiseLoss(Loss):
    """Loss that is a sum over the other classes j of functions of z_j = kappa (c_j - c_y)."""

    pairwise = True
    sums = ("label", "terms")
    settings: tuple[str, ...] = ("kappa",)

    def terms(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        given: np.ndarray | None = None,
        grad: np.ndarray | None = None,
        rest: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        assert given is not None
        z, values = self._buffers(scores, 2)
        np.copyto(z, scores)
        z -= given[-1]
        z *= self.kappa
        own = own_labels(targets, len(scores))
        if pairs is not None:
            pairs = pairs[:, targets]
        value = self.of_margins(z, values, grad, (targets[own], own), pairs)
        if grad is not None:
            grad *= scale
            grad[targets[own], own] = 0
            if rest is not None:
                grad.sum(axis=0, out=rest)
        return value * scale

    def of_margins(
        self,
        z: np.ndarray,
        values: np.ndarray,
        grad: np.ndarray | None,
        own: tuple[np.ndarray, np.ndarray],
        pairs: np.ndarray | None,
    ) -> float:
        """Return the sum of the terms of margins z (classes, b), and write d value / d c_j to `grad` unless it is None.

        z is overwritten. own: index of the labels' places, which have no term; values: scratch of the shape of z;
        pairs: (classes, b) bool, the terms that count.
        """
        raise NotImplementedError

    def diverged(self, mean: float, clipped: float, size: float = 1.0) -> bool:
        return mean > HOPELESS * self.kappa * size
