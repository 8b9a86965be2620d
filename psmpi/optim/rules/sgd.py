"""Stochastic gradient descent update rule."""

from __future__ import annotations

import numpy as np

from psmpi.optim.first_order import FirstOrder


class SGD(FirstOrder):
    """Stochastic gradient descent: w -= lr g."""

    summary = "stochastic gradient descent"
    settings = ("weight_decay",)
    operation = "sgd"

    def arguments(self, lr: float) -> tuple[float, ...]:
        return lr, self.weight_decay

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        np.multiply(g, lr, out=a)
        w -= a
