"""The pairwise logistic loss."""

from __future__ import annotations

import numpy as np

from psmpi.nn.losses.base import PairwiseLoss


class PairwiseLogistic(PairwiseLoss):
    """sum_{j != y} log(1 + exp(kappa (c_j - c_y))): pair terms as in PSL, with derivatives bounded by kappa."""

    name = "logistic"
    formula = "sum_{j != y} log(1 + exp(kappa (c_j - c_y)))"

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
        np.logaddexp(0, z, out=e)
        e.reshape(-1)[own] = 0
        if pairs is not None:
            e *= pairs[:, labels]
        value = float(e.sum())
        if grad is not None:
            # The logistic function by tanh, which cannot overflow.
            np.multiply(z, 0.5, out=grad)
            np.tanh(grad, out=grad)
            grad += 1
            grad *= 0.5 * self.kappa
            if pairs is not None:
                grad *= pairs[:, labels]
            self._close(grad, own, scale)
        return value * scale
