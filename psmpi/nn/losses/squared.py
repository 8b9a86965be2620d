"""The squared error."""

from __future__ import annotations

import numpy as np

from psmpi.nn.losses.base import Loss


class SquaredError(Loss):
    """sum_j (c_j - [j = y])^2."""

    name, formula = "squared", "sum_j (c_j - [j = y])^2"

    def __call__(self, scores, labels, scale, grad=None, pairs=None):
        (z,) = self._buffers(scores, 1)
        np.copyto(z, scores)
        z.reshape(-1)[labels * scores.shape[1] + np.arange(scores.shape[1])] -= 1
        value = float(np.vdot(z, z))
        if grad is not None:
            np.multiply(z, 2 * scale, out=grad)
        return value * scale
