"""The multi-class hinge loss."""

from __future__ import annotations

import numpy as np

from psmpi.nn.losses.base import PairwiseLoss


class Hinge(PairwiseLoss):
    """sum_{j != y} max(0, 1 + kappa (c_j - c_y)) (Weston and Watkins, "Support vector machines for multi-class pattern
    recognition", 1999).
    """

    name = "hinge"
    formula = "sum_{j != y} max(0, 1 + kappa (c_j - c_y))"

    def __call__(
        self,
        scores: np.ndarray,
        labels: np.ndarray,
        scale: float,
        grad: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        (z,) = self._buffers(scores, 1)
        own = self._margins(scores, labels, z)
        z += 1
        np.maximum(z, 0, out=z)
        z.reshape(-1)[own] = 0
        if pairs is not None:
            np.copyto(z, 0, where=~pairs[:, labels])
        value = float(z.sum())
        if grad is not None:
            np.greater(z, 0, out=grad)
            grad *= self.kappa
            self._close(grad, own, scale)
        return value * scale
