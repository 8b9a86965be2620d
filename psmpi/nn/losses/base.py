"""The base class of losses: settings, buffers, checks, and the derivatives of sums over pairs of classes.

Scores are (classes, b), targets labels (b,), class indices, or in a regression values of the shape of scores. A loss is
computed in float64 whatever the dtype of the scores: so the exponentials of `psl` are exact wherever the scores' own
dtype can hold them, and beyond.

Where ranks have the scores of some consecutive classes each, a rank computes the loss of its own, `Loss.terms`, from
what `Loss.summarize` of all ranks comes to; its labels count from its first class, and lie outside where another rank
has the label's score. `Loss.close` then adds what only the sum over all classes' terms knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from psmpi.nn.margin import Margin

if TYPE_CHECKING:
    from psmpi.backend import NumpyOps

# What float64, in which losses are computed, keeps free above the largest exponential, for sums and tangents.
HEADROOM = 60.0

# A mean loss that no training comes back from, in units of the loss's largest derivative: scores would have to move by
# as much. Trainings that ended well had epochs up to 5e3.
HOPELESS = 1e6

# Derivatives up to this size stay in float32 in any backward pass.
PEAK = 2.0**20

# Sums (and maxima) of a sample over all classes, by name: see `Loss.sums`.
SUMS = {
    "label": "c_y, the score of the label",
    "terms": "the sum of d l / d c_j over j != y, which is minus d l / d c_y",
    "largest": "max_j c_j",
    "exponentials": "sum_j exp(c_j - max_k c_k)",
}


def largest_exponent(dtype: np.dtype) -> float:
    """The largest exponent whose exponential `dtype` represents, and of which float64 can sum many: 88.7 or 649.8."""
    return min(log(np.finfo(dtype).max), log(np.finfo(np.float64).max) - HEADROOM)


def own_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """The samples, in order, whose labels (b,) are among the first `classes` from 0 on."""
    return np.flatnonzero((labels >= 0) & (labels < classes))


class OverClasses(Protocol):
    """Sums over ranks that have the scores of other classes of the same samples; all ranks make the same calls."""

    def summed(self, summary: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """What the ranks' summaries (summary_size, b) float64 come to, (sums, b) float64, see `Loss.summarize`."""

    def add(self, values: np.ndarray) -> None:
        """values (b,) float64 become the sum over the ranks, in place."""


class OverflowsError(FloatingPointError):
    """An exponential beyond the dtype, where clipping is off."""


class Loss:
    """value += scale * sum over samples of l(scores, targets); and d value / d scores.

    formula: l in a line, for people. A `pairwise` loss is a sum over ordered pairs (label, other class), so any set of
    pairs can be computed apart; constant: what it adds to these for each sample.
    sums: the names in SUMS of what has to be known of all classes' scores of a sample: with these numbers and a class's
    own score, whether it is the label's or not, the derivative with respect to that score follows. The value is the sum
    over classes of what their own scores and these numbers say. All but "terms" are known before any derivative.
    gathers: whether ranks' summaries are merged, and not added up. outputs: the classes of all ranks together, by
    default those of the scores that the loss is called with.
    tasks: what it can learn, "classes" by labels or "regression" by values; task: which of these.
    settings: the names of the settings that it uses, of those below. weights: what psl divides a sample by.
    options: the dataclass of the settings that this loss alone has, see `psmpi.config.Settings`; own: their values.
    divisors, rests: see `PSL`.
    scale: what scores are times cosines with, 0 where they are not cosines. margin: what `Objective`
    makes of the label's score before the loss sees it, in training; the loss itself, in tests too, knows nothing of it.
    class_weights: (classes,) float64 of all ranks' classes, what `Objective` multiplies the derivatives of a class's
    samples by, in training; values, in training too, are those without. None: nothing.
    immediate: whether derivatives are bounded, and final as soon as what `sums` says is known.
    lenient: a loss of scores that are not finite is NaN, and no error, where `Objective` and `Metric` ask for it.
    Buffers grow to the largest minibatch seen and are then reused.
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
        """The exponent from which psl goes on as its tangent, or beyond which it fails."""
        return self.largest if self.limit is None else self.limit

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return self._store.nbytes

    def sample_weights(self, labels: np.ndarray) -> np.ndarray | None:
        """The class weights (b,) of samples with these labels, numbers among all classes; None without."""
        return None if self.class_weights is None else self.class_weights[labels]

    def check(self, worst: float) -> None:
        """FloatingPointError for a largest exponent that is not finite, or with clipping off beyond the limit."""
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
        """FloatingPointError for a sum "terms" of all ranks (b,) that is not finite, where the loss has one to say."""

    def __call__(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        grad: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        """The scaled sum of the losses; with `grad` (classes, b) float64, also its derivative.

        `pairs` (classes, classes) bool, symmetric, keeps only the terms of those pairs (a pairwise loss only); the
        loss's constant is then left out, for it belongs to no pair.
        """
        given = self.summarize(scores, targets) if self.sums else None
        rest = np.empty(scores.shape[-1]) if grad is not None and "terms" in self.sums else None
        value = self.terms(scores, targets, scale, given, grad, rest, pairs)
        if grad is not None and rest is not None:
            value += self.close(grad, targets, rest, scale)
        return value

    def summary_size(self, classes: int) -> int:
        """The numbers of a sample that `summarize` makes of the scores of so many classes."""
        return 1

    def summarize(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The share of some classes in the sums that are known before any derivative, (summary_size, b) float64.

        By default the score of the label, 0 where another rank has it: these shares add up to it. scores: (classes, b);
        labels: (b,), counted from the first of these classes.
        """
        own = own_labels(labels, len(scores))
        found = np.zeros((1, scores.shape[1]))
        found[0, own] = scores[labels[own], own]
        return found

    def merge(self, gathered: np.ndarray, starts: Sequence[int], labels: np.ndarray) -> np.ndarray:
        """The sums over all classes from the summaries of all ranks, one below the other; of a loss that `gathers`.

        gathered: (sum of the ranks' summary_size, b); starts: (ranks + 1,) the first class of each rank and one behind
        the last, counted as the labels (b,) are.
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
        """The share of some classes in a call's value; with `grad` also the derivatives of all ranks' values together.

        given: (sums, b) float64, what summaries come to, where the loss has `sums`; the label's score comes last. rest:
        (b,) float64, filled where the loss has the sum "terms", with the share of these classes in it, scaled; grad
        then lacks the rows of the labels, which are 0.
        """
        raise NotImplementedError

    def close(self, grad: np.ndarray, labels: np.ndarray, rest: np.ndarray, scale: float) -> float:
        """Complete the derivatives of labels' scores; rest: of all classes, see `terms`. Returns what its value lacked.

        Every term is one of c_j - c_y: what c_y adds is minus the sum of the others.
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
        others: OverClasses | None = None,
    ) -> float:
        """What a call returns, of a `lenient` loss NaN in place of an error: so is then all of `grad`.

        With `given` the share of some classes, without derivatives; others: sums over the ranks that have others.
        """
        try:
            if given is not None:
                return self.partial_value(scores, targets, scale, given, others)
            return self(scores, targets, scale, grad, pairs)
        except FloatingPointError:
            if not self.lenient:
                raise
            if grad is not None:
                grad.fill(np.nan)
            return np.nan

    def partial_value(
        self, scores: np.ndarray, targets: np.ndarray, scale: float, given: np.ndarray, others: OverClasses | None
    ) -> float:
        """The share of some classes in a call's value; given as in `terms`. All ranks of `others` call it."""
        return self.terms(scores, targets, scale, given)

    def diverged(self, mean: float, clipped: float, size: float = 1.0) -> bool:
        """Whether a mean loss over the samples of an epoch is one of a training that has diverged.

        clipped: the share of psl's terms that were beyond `tangent`; size: of classes how many others a label has, of
        values to learn the mean over samples of sum_j t_j^2.
        """
        return mean > HOPELESS

    def constants(self, divisors: np.ndarray | None, b: int) -> float:
        """What b samples add to a sum over pairs, whatever the weights; divisors: see `PSL`."""
        return self.constant * b

    def fused(self, ops: NumpyOps) -> Callable[..., None] | None:
        """The loss in one pass on the arrays of `ops`, or None where these have none.

        Called with scores, targets, scale, pairs, given, grad and rest as in `terms`, and report, it fills grad and
        rest, where there are any, and report (4,) float64: the scaled loss, the largest exponent in psl, the number of
        its terms beyond `tangent`, the largest derivative. Without `given` scores are those of all classes; without
        `rest` the labels' rows of grad are complete.
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
        """`summarize` on the arrays of `ops`, into the front of room (any,) float64."""
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
        """`close` on the arrays of `ops`; the report's largest derivative follows. dtype: that of the scores."""
        self._operation(ops, "close_losses")(grad, labels, rest, report, dtype)

    @staticmethod
    def _operation(ops: NumpyOps, name: str) -> Callable[..., None]:
        found = ops.fused(name)
        if found is None:
            raise TypeError(f"the backend {ops.name} has no {name}")
        return found

    def suits(self, largest: float, scale: float, given: np.ndarray | None) -> bool:
        """Whether terms made in the scores' dtype, by `class_terms` of a backend, are as exact as its scores.

        And whether their derivatives, and sums of products with these, stay in it. largest: what the operation says of
        its scores; scale, given: as in `terms`.
        """
        return True

    def offset(self, classes: int) -> float:
        """What is added to every score first, given how many there are here."""
        return 0.0

    def _buffers(self, scores: np.ndarray, count: int) -> list[np.ndarray]:
        size = scores.size
        if self._store.size < count * size:
            self._store = np.empty(count * size)
        return [self._store[k * size : (k + 1) * size].reshape(scores.shape) for k in range(count)]


class PairwiseLoss(Loss):
    """A loss that is a sum over the other classes j of terms in z_j = kappa (c_j - c_y)."""

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
        """The sum of the terms in margins z (classes, b), which are used up; with `grad` d value / d c_j of each.

        own: the places of the labels, which have no term, as an index; values: room like z; pairs: (classes, b), the
        terms to be kept.
        """
        raise NotImplementedError

    def diverged(self, mean: float, clipped: float, size: float = 1.0) -> bool:
        return mean > HOPELESS * self.kappa * size
