"""Partially-separable loss."""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from typing import TYPE_CHECKING

import numpy as np

from psmpi.nn.losses.base import HOPELESS, PEAK, OverClasses, PairwiseLoss, own_labels

if TYPE_CHECKING:
    from psmpi.backend import NumpyOps

# Fraction of clipped terms above which a training has diverged. If all scores are extreme, about half of the terms
# overflow and half vanish; this is half of that.
MOST = 0.25
# Largest margins whose exponentials, and sums of exponentials, are in the dtype's range.
MARGIN = {np.dtype(np.float32): 60.0, np.dtype(np.float64): 600.0}


class PSL(PairwiseLoss):
    """Partially-separable loss sum_j exp(kappa (c_j - c_y)); the term j = y counts as the constant 1.

    Source: Raynaud, Orban, Bigeon, G-2023-36. If z = kappa (c_j - c_y) exceeds `limit` (by default `largest_exponent`:
    88.7 in float32, 649.8 in float64), the tangent exp(limit) (1 + z - limit) replaces the exponential, so that value
    and derivative stay finite and continuous; `clipped` counts these terms. With limit None (clipping off) such a term
    is an error.

    With `weights`, derivatives are those of cross-entropy, or close to them (derived: psl is the exponential of
    cross-entropy). S is the sum over j != y of the terms e_j, each cut off at `limit`.
    current: the derivatives of a sample are divided by 1 + S, and its loss is log(1 + S).
    remembered: the derivative of a term e_j is divided by max(1 + e_j, r), where r is the value of 1 + S at the last
    visit of the sample. The loss is the function with these derivatives that equals log(1 + S) for r = 1 + S.
    Otherwise the loss lies above log(1 + S): for e_j < r - 1 by the tangent of the logarithm at r. For r = 1 it is
    `logistic`. Derivatives of terms stay below kappa, so `limit` depends on float64 and not on the scores' dtype. In
    tests the loss is log(1 + S).

    divisors: (b,) r of the next minibatch's samples, None for 1; rests: (b,) float64, share of these classes, or pairs,
    in S for the last minibatch.
    """

    name, constant = "psl", 1.0
    formula = "partially-separable loss: sum_j exp(kappa (c_j - c_y))"
    settings = ("kappa", "exp_clip", "psl_weights")

    def diverged(self, mean: float, clipped: float, size: float = 1.0) -> bool:
        """Return whether more than MOST of the terms exceed the dtype's range, or the loss is far above the tangent's.

        `clipped` includes terms of line-search trials, which are not in the mean loss, so the mean is checked as well.
        """
        own = self.tangent == self.largest
        if self.weights != "none":
            return own and clipped > MOST
        bend = exp(self.tangent)
        hopeless = HOPELESS * max(1.0, self.kappa) * size * bend
        return (own and clipped > MOST and mean > MOST * bend) or mean > hopeless

    def check_rest(self, rest: np.ndarray) -> None:
        if not np.isfinite(rest).all():
            self.check(np.nan if np.isnan(rest).any() or self.limit is not None else np.finfo(np.float64).max)

    def suits(self, largest: float, scale: float, given: np.ndarray | None) -> bool:
        # No term needs the tangent. The largest derivative is compared by its logarithm, because it may overflow.
        small = largest <= min(MARGIN[self.dtype], self.tangent) and largest + log(self.kappa * scale) <= log(PEAK)
        return small and given is not None and bool(np.isfinite(given).all())

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
        self.rests = None
        value = super().terms(scores, targets, scale, given, grad, rest, pairs)
        own = own_labels(targets, len(scores))
        if grad is None or rest is None or self.weights == "none":
            # The rank that has the label's score adds the term j = y, which belongs to no pair.
            return value if pairs is not None else value + scale * len(own)
        if self.weights == "current":
            # `close` adds the value, which needs the sum over all ranks. Here a non-finite value stays visible as NaN.
            return 0.0 * value
        # `of_margins` leaves the terms e_j in the second buffer.
        z, e = self._buffers(scores, 2)
        self.rests = e.sum(axis=0)
        r = np.ones(len(rest)) if self.divisors is None else self.divisors.astype(np.float64)
        np.add(e, 1, out=z)
        np.maximum(z, r, out=z)
        grad /= z
        grad.sum(axis=0, out=rest)
        z /= r
        value = float((np.log(z) + np.minimum(e, r - 1) / r).sum())
        return scale * (value if pairs is not None else value + self.constants(r[own], len(own)))

    def constants(self, divisors: np.ndarray | None, b: int) -> float:
        if self.weights == "none":
            return super().constants(divisors, b)
        r = np.ones(b) if divisors is None else divisors.astype(np.float64)
        return float((np.log(r) + 1 / r - 1).sum())

    def close(self, grad: np.ndarray, labels: np.ndarray, rest: np.ndarray, scale: float) -> float:
        super().close(grad, labels, rest, scale)
        if self.weights != "current":
            return 0.0
        total = rest / (scale * self.kappa)
        with np.errstate(invalid="ignore"):
            grad /= 1 + total
        return scale * float(np.log1p(total[own_labels(labels, len(grad))]).sum())

    def __call__(
        self,
        scores: np.ndarray,
        targets: np.ndarray,
        scale: float,
        grad: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        if grad is None and pairs is None and self.weights != "none":
            return self.partial_value(scores, targets, scale, self.summarize(scores, targets), None)
        return super().__call__(scores, targets, scale, grad, pairs)

    def partial_value(
        self, scores: np.ndarray, targets: np.ndarray, scale: float, given: np.ndarray, over_classes: OverClasses | None
    ) -> float:
        if self.weights == "none":
            return super().partial_value(scores, targets, scale, given, over_classes)
        grad, rest = self._buffers(scores, 3)[2], np.full(len(targets), np.nan)
        try:
            super().terms(scores, targets, 1.0, given, grad, rest)
        finally:
            # Every rank takes part in the sum, even after an error, so that no other rank waits forever.
            if over_classes is not None:
                over_classes.add(rest)
        self.check_rest(rest)
        return scale * float(np.log1p(rest[own_labels(targets, len(scores))] / self.kappa).sum())

    def fused(self, ops: NumpyOps) -> Callable[..., None] | None:
        return super().fused(ops) if self.weights == "none" else None

    def of_margins(
        self,
        z: np.ndarray,
        values: np.ndarray,
        grad: np.ndarray | None,
        own: tuple[np.ndarray, np.ndarray],
        pairs: np.ndarray | None,
    ) -> float:
        if pairs is not None:
            # Margins of other workers' pairs do not count, even if they are not finite.
            np.copyto(z, -np.inf, where=~pairs)
        limit = self.tangent
        worst = float(z.max(initial=0.0))
        if not worst <= limit:
            self.check(worst)
            self.clipped += int(np.count_nonzero(z > limit))
        np.minimum(z, limit, out=values)
        np.exp(values, out=values)
        values[own] = 0
        if worst > limit:
            tail = np.maximum(z - limit, 0)
            # Bound the tangents so that their sum stays in float64's range.
            with np.errstate(over="ignore"):
                value = float(np.minimum(values * (1 + tail), np.finfo(np.float64).max / (2 * values.size)).sum())
        else:
            value = float(values.sum())
        if grad is not None:
            np.multiply(values, self.kappa, out=grad)
        return value
