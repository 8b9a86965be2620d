"""Adam update rule."""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

import numpy as np

from psmpi.optim.first_order import FirstOrder


class Adam(FirstOrder):
    """Adam: m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; w -= lr m' / (sqrt(v') + eps).

    m' = m / (1 - beta1^t), v' = v / (1 - beta2^t), where t = 1, 2, ... is the number of the step (Kingma and Ba 2015,
    Algorithm 1).
    """

    summary = "moments of the gradient (Kingma and Ba 2015)"
    names: ClassVar[tuple[str, ...]] = ("m", "v")
    settings: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "eps", "weight_decay")
    operation = "adam"
    counts = True
    beta1: float
    beta2: float

    def arguments(self, lr: float) -> tuple[float, ...]:
        t = self.scalars["t"]
        rate, root = lr / (1 - self.beta1**t), 1 / sqrt(1 - self.beta2**t)
        return rate, root, self.beta1, self.beta2, self.eps, *self.weights.factors(lr)

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        m, v = state
        t = self.scalars["t"]
        self.move(m, v, g, a)
        np.sqrt(v, out=a)
        a *= 1 / sqrt(1 - self.beta2**t)
        a += self.eps
        np.divide(m, a, out=b)
        b *= lr / (1 - self.beta1**t)
        w -= b

    def move(self, m: np.ndarray, v: np.ndarray, g: np.ndarray, a: np.ndarray) -> None:
        """Update the moments m (k,) and v (k,) with g (k,), in place; a (k,) is scratch."""
        # m + (1 - beta1) (g - m) takes one multiplication fewer than the formula.
        np.subtract(g, m, out=a)
        a *= 1 - self.beta1
        m += a
        v *= self.beta2
        np.multiply(g, g, out=a)
        a *= 1 - self.beta2
        v += a
