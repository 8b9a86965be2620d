"""The partially-separable loss."""

from __future__ import annotations

from math import exp

import numpy as np

from psmpi.nn.losses.base import HOPELESS, PairwiseLoss, largest_exponent, own_labels

# Of the terms of scores that are nothing but extreme, half grow beyond all bounds, and half vanish: half of these.
MOST = 0.25


class PSL(PairwiseLoss):
    """sum_j exp(kappa (c_j - c_y)), the term j = y counted as the constant 1 (Raynaud, Orban, Bigeon, G-2023-36).

    Where kappa (c_j - c_y) exceeds `limit` (by default `largest_exponent`: 88.7 in float32, 649.8 in float64) the
    exponential goes on as its tangent there, exp(limit) (1 + z - limit), so that value and derivative stay finite and
    continuous; `clipped` counts those terms. With limit None (clipping off) such a term is an error.
    """

    name, constant = "psl", 1.0
    formula = "sum_j exp(kappa (c_j - c_y))"
    settings = ("kappa", "exp_clip")

    def diverged(self, mean: float, clipped: float, size: float = 1.0) -> bool:
        """Whether more than MOST of the terms lie beyond what the dtype holds, or the loss is huge beside the tangent.

        Line searches count terms of their trials too, which then are not in the loss.
        """
        bend, own = exp(self.tangent), self.tangent == largest_exponent(self.dtype)
        hopeless = HOPELESS * max(1.0, self.kappa) * size * bend
        return (own and clipped > MOST and mean > MOST * bend) or mean > hopeless

    def check_rest(self, rest: np.ndarray) -> None:
        if not np.isfinite(rest).all():
            self.check(np.nan if np.isnan(rest).any() or self.limit is not None else np.finfo(np.float64).max)

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
        value = super().terms(scores, targets, scale, given, grad, rest, pairs)
        # The term j = y, of whoever has the label's score; it belongs to no pair.
        return value if pairs is not None else value + scale * len(own_labels(targets, len(scores)))

    def of_margins(
        self,
        z: np.ndarray,
        values: np.ndarray,
        grad: np.ndarray | None,
        own: tuple[np.ndarray, np.ndarray],
        pairs: np.ndarray | None,
    ) -> float:
        if pairs is not None:
            # The margins of other workers' pairs do not matter here, whatever they are.
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
            # Neither the tangent nor a sum of such terms may leave float64.
            with np.errstate(over="ignore"):
                value = float(np.minimum(values * (1 + tail), np.finfo(np.float64).max / (2 * values.size)).sum())
        else:
            value = float(values.sum())
        if grad is not None:
            np.multiply(values, self.kappa, out=grad)
        return value
