"""RMSprop update rule."""

from __future__ import annotations

import numpy as np

from psmpi.optim.first_order import FirstOrder


class RMSprop(FirstOrder):
    """RMSprop: v = alpha v + (1 - alpha) g^2; w -= lr g / (sqrt(v) + eps).

    Source: Tieleman and Hinton 2012, in PyTorch's form.
    """

    summary = "gradient over its root mean square (Tieleman and Hinton 2012)"
    names = ("v",)
    settings = ("alpha", "eps", "weight_decay")
    operation = "rmsprop"
    alpha: float

    def arguments(self, lr: float) -> tuple[float, ...]:
        return lr, self.alpha, self.eps, self.weight_decay

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        (v,) = state
        v *= self.alpha
        np.multiply(g, g, out=a)
        a *= 1 - self.alpha
        v += a
        np.sqrt(v, out=a)
        a += self.eps
        np.divide(g, a, out=b)
        b *= lr
        w -= b
