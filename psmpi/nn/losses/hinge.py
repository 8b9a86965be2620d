"""Multi-class hinge loss."""

from __future__ import annotations

import numpy as np

from psmpi.nn.losses.base import PairwiseLoss


class Hinge(PairwiseLoss):
    """Multi-class hinge loss sum_{j != y} max(0, 1 + kappa (c_j - c_y)).

    Source: Weston and Watkins, "Support vector machines for multi-class pattern recognition", 1999.
    """

    name = "hinge"
    formula = "sum_{j != y} max(0, 1 + kappa (c_j - c_y))"

    def of_margins(
        self,
        z: np.ndarray,
        values: np.ndarray,
        grad: np.ndarray | None,
        own: tuple[np.ndarray, np.ndarray],
        pairs: np.ndarray | None,
    ) -> float:
        z += 1
        np.maximum(z, 0, out=z)
        z[own] = 0
        if pairs is not None:
            np.copyto(z, 0, where=~pairs)
        if grad is not None:
            np.greater(z, 0, out=grad)
            grad *= self.kappa
        return float(z.sum())
