"""The partially-separable loss."""

from __future__ import annotations

from math import exp

import numpy as np

from psmpi.nn.losses.base import HOPELESS, PairwiseLoss, largest_exponent

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

    def __call__(
        self,
        scores: np.ndarray,
        labels: np.ndarray,
        scale: float,
        grad: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        z, e = self._buffers(scores, 2)
        own = self._margins(scores, labels, z)
        if pairs is not None:
            # The margins of other workers' pairs do not matter here, whatever they are.
            np.copyto(z, -np.inf, where=~pairs[:, labels])
        limit = self.tangent
        worst = float(z.max(initial=0.0))
        if not worst <= limit:
            self.check(worst)
            self.clipped += int(np.count_nonzero(z > limit))
        np.minimum(z, limit, out=e)
        np.exp(e, out=e)
        e.reshape(-1)[own] = 0
        if worst > limit:
            tail = np.maximum(z - limit, 0)
            # Neither the tangent nor a sum of such terms may leave float64.
            with np.errstate(over="ignore"):
                value = float(np.minimum(e * (1 + tail), np.finfo(np.float64).max / (2 * e.size)).sum())
        else:
            value = float(e.sum())
        if pairs is None:
            value += len(labels)
        if grad is not None:
            np.multiply(e, self.kappa, out=grad)
            self._close(grad, own, scale)
        return value * scale
