"""Binary cross-entropy: a separate binary problem for each class."""

from __future__ import annotations

from math import log

import numpy as np

from psmpi.nn.losses.base import HOPELESS, Loss, own_labels


class BinaryCrossEntropy(Loss):
    """Binary cross-entropy sum_j log(1 + exp(z_j)) - z_y with z = c - log(C - 1): is class j the label's?

    The offset gives a score of 0 the probability 1/C, that of a random label among C classes (derived). Scores that are
    s times cosines are further reduced by s/2, so that a cosine of 1/2 has the probability 1/C. No class needs the
    score of another class (Zhai et al. 2023, "Sigmoid loss for language image pre-training").
    """

    name = "bce"
    formula = "binary cross-entropy of each class against the others"

    immediate = True

    def offset(self, classes: int) -> float:
        return -log(max(1, (self.outputs or classes) - 1)) - self.scale / 2

    def diverged(self, mean: float, clipped: float, size: float = 1.0) -> bool:
        return mean > HOPELESS * max(1.0, size)

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
        z, values = self._buffers(scores, 2)
        np.add(scores, self.offset(len(scores)), out=z, dtype=np.float64)
        own = own_labels(targets, len(scores))
        labels = targets[own], own
        np.logaddexp(0, z, out=values)
        # log(1 + exp(z)) - z = log(1 + exp(-z)), without a difference of large numbers.
        values[labels] = np.logaddexp(0, -z[labels])
        if grad is not None:
            # The logistic function as (1 + tanh(z / 2)) / 2 cannot overflow.
            np.multiply(z, 0.5, out=grad)
            np.tanh(grad, out=grad)
            grad += 1
            grad *= 0.5
            grad[labels] -= 1
            grad *= scale
        return float(values.sum()) * scale
