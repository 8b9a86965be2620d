"""Squared error loss."""

from __future__ import annotations

import numpy as np

from psmpi.nn.losses.base import HOPELESS, PEAK, Loss, own_labels


class SquaredError(Loss):
    """Squared error sum_j (c_j - t_j)^2, with t_j = [j = y] for a label y, or given values t_j in a regression."""

    name, formula = "squared", "sum_j (c_j - t_j)^2 with targets t, or t_j = [j = y]"
    tasks = ("classes", "regression")

    def diverged(self, mean: float, clipped: float, size: float = 1.0) -> bool:
        # Labels stand for values 0 and 1, and initial weights give outputs of about 1.
        return mean > HOPELESS * (max(1.0, size) if self.task == "regression" else 1.0)

    def suits(self, largest: float, scale: float, given: np.ndarray | None) -> bool:
        return 2 * scale * (1 + largest) <= PEAK

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
        (z,) = self._buffers(scores, 1)
        np.copyto(z, scores)
        if self.task == "regression":
            z -= targets
        else:
            own = own_labels(targets, len(scores))
            z[targets[own], own] -= 1
        value = float(np.vdot(z, z))
        if grad is not None:
            np.multiply(z, 2 * scale, out=grad)
        return value * scale
