"""Pairwise logistic loss."""

from __future__ import annotations

import numpy as np

from psmpi.nn.losses.base import PairwiseLoss


class PairwiseLogistic(PairwiseLoss):
    """Pairwise logistic loss sum_{j != y} log(1 + exp(kappa (c_j - c_y))): pairs as in PSL, derivatives below kappa."""

    name = "logistic"
    formula = "sum_{j != y} log(1 + exp(kappa (c_j - c_y)))"

    def of_margins(
        self,
        z: np.ndarray,
        values: np.ndarray,
        grad: np.ndarray | None,
        own: tuple[np.ndarray, np.ndarray],
        pairs: np.ndarray | None,
    ) -> float:
        np.logaddexp(0, z, out=values)
        values[own] = 0
        if pairs is not None:
            values *= pairs
        if grad is not None:
            # The logistic function as (1 + tanh(z / 2)) / 2 cannot overflow.
            np.multiply(z, 0.5, out=grad)
            np.tanh(grad, out=grad)
            grad += 1
            grad *= 0.5 * self.kappa
            if pairs is not None:
                grad *= pairs
        return float(values.sum())
