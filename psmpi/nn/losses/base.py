"""The base class of losses: settings, buffers, checks, and the derivatives of sums over pairs of classes.

Scores are (classes, b), targets labels (b,), class indices, or in a regression values of the shape of scores. A loss is
computed in float64 whatever the dtype of the scores: the arrays are small, and so the exponentials of `psl` are exact
wherever the scores' own dtype can hold them, and beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from psmpi.backend import NumpyOps

# What float64, in which losses are computed, keeps free above the largest exponential, for sums and tangents.
HEADROOM = 60.0

# A mean loss that no training comes back from, in units of the loss's largest derivative: scores would have to move by
# as much. Trainings that ended well had epochs up to 5e3.
HOPELESS = 1e6

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


class Loss:
    """value += scale * sum over samples of l(scores, targets); and d value / d scores.

    formula: l in a line, for people. A `pairwise` loss is a sum over ordered pairs (label, other class), so any set of
    pairs can be computed apart; constant: what it adds to these for each sample.
    sums: the names in SUMS of what has to be known of all classes' scores of a sample: with these numbers and a class's
    own score, whether it is the label's or not, the derivative with respect to that score follows. The value is the sum
    over classes of what their own scores and these numbers say.
    tasks: what it can learn, "classes" by labels or "regression" by values; task: which of these.
    settings: the names of the settings that it uses, of those below.
    lenient: a loss of scores that are not finite is NaN, and no error, where `Objective` and `Metric` ask for it.
    Buffers grow to the largest minibatch seen and are then reused.
    """

    name = ""
    formula = ""
    pairwise = False
    constant = 0.0
    sums: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("classes",)
    settings: tuple[str, ...] = ()

    def __init__(self, dtype: np.dtype, *, kappa: float = 1.0, exp_clip: float | None = 0.0, task: str = "classes"):
        self.dtype, self.kappa, self.task = np.dtype(dtype), float(kappa), task
        self.clipped, self.lenient = 0, False
        self.limit = largest_exponent(self.dtype) if exp_clip == 0.0 else exp_clip
        self._store = np.empty(0)

    @property
    def tangent(self) -> float:
        """The exponent from which psl goes on as its tangent, or beyond which it fails."""
        return largest_exponent(self.dtype) if self.limit is None else self.limit

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return self._store.nbytes

    def check(self, worst: float) -> None:
        """FloatingPointError for a largest exponent that is not finite, or with clipping off beyond the limit."""
        if not worst < np.inf:
            raise FloatingPointError(
                "a score is not a finite number: the training diverged; lower --lr, clip gradients with --clip 1, or "
                "use --loss logistic"
            )
        if self.limit is None and worst > self.tangent:
            raise FloatingPointError(
                f"exp({worst:.1f}) in the PSL loss overflows {self.dtype} and --exp-clip is off: set --exp-clip auto, "
                "lower --lr, clip gradients with --clip 1, or use --loss logistic"
            )

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
        raise NotImplementedError

    def value(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        grad: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        """What a call returns, of a `lenient` loss NaN in place of an error: so is then all of `grad`."""
        try:
            return self(scores, targets, scale, grad, pairs)
        except FloatingPointError:
            if not self.lenient:
                raise
            if grad is not None:
                grad.fill(np.nan)
            return np.nan

    def diverged(self, mean: float, clipped: float, size: float = 1.0) -> bool:
        """Whether a mean loss over the samples of an epoch is one of a training that has diverged.

        clipped: the share of psl's terms that were beyond `tangent`; size: of classes how many others a label has, of
        values to learn the mean over samples of sum_j t_j^2.
        """
        return mean > HOPELESS

    def fused(self, ops: NumpyOps) -> Callable[..., None] | None:
        """The loss in one pass on the arrays of `ops`, or None where these have none.

        Called with scores, targets, scale, pairs as above, own, grad and report, it fills grad, where there is one, and
        report (4,) float64: the scaled loss, the largest exponent in psl, the number of its terms beyond `tangent`, the
        largest derivative with respect to the scores `own`, a slice of the classes.
        """
        one_pass = ops.fused(f"{self.name}_loss")
        if one_pass is None or self.task != "classes":
            return None

        def compute(
            scores: np.ndarray,
            labels: np.ndarray,
            scale: float,
            pairs: np.ndarray | None,
            own: slice,
            grad: np.ndarray | None,
            report: np.ndarray,
        ) -> None:
            one_pass(scores, labels, scale, self.kappa, self.tangent, pairs, own, grad, report)

        return compute

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

    def _margins(self, scores: np.ndarray, labels: np.ndarray, z: np.ndarray) -> np.ndarray:
        """z = kappa (c_j - c_y); returns the flat positions of the labels' own scores."""
        own: np.ndarray = labels * scores.shape[1] + np.arange(scores.shape[1])
        np.copyto(z, scores)
        z -= z.ravel()[own]
        z *= self.kappa
        return own

    def diverged(self, mean: float, clipped: float, size: float = 1.0) -> bool:
        return mean > HOPELESS * self.kappa * size

    @staticmethod
    def _close(grad: np.ndarray, own: np.ndarray, scale: float) -> None:
        """Every pair term sees c_j - c_y: the derivative with respect to c_y is minus the sum of the others."""
        grad *= scale
        flat = grad.reshape(-1)
        flat[own] = 0
        flat[own] = -grad.sum(axis=0)
