"""Nesterov momentum update rule."""

from __future__ import annotations

import numpy as np

from psmpi.optim.rules.momentum import Momentum


class Nesterov(Momentum):
    """Nesterov momentum: v = momentum v + g; w -= lr (g + momentum v) (Nesterov 1983, in PyTorch's form)."""

    summary = "gradient descent with Nesterov's momentum"
    nesterov = True

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        (v,) = state
        v *= self.momentum
        v += g
        np.multiply(v, self.momentum, out=a)
        a += g
        a *= lr
        w -= a
