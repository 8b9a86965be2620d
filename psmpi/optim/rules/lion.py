"""Lion update rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from psmpi.optim.decay import Decoupled
from psmpi.optim.first_order import FirstOrder


class Lion(FirstOrder):
    """Lion: w -= lr sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2. sign(0) is 0. Each weight
    moves by lr in a step, so a suitable lr is 3 to 10 times smaller than for Adam.
    """

    summary = "sign of a momentum (Chen et al. 2023)"
    names = ("m",)
    settings = ("beta1", "beta2", "weight_decay")
    usual: ClassVar[Mapping[str, float]] = {"beta2": 0.99}
    operation = "lion"
    decay = Decoupled
    beta1: float
    beta2: float

    def arguments(self, lr: float) -> tuple[float, ...]:
        return lr, self.beta1, self.beta2, *self.weights.factors(lr)

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        (m,) = state
        np.multiply(m, self.beta1, out=a)
        np.multiply(g, 1 - self.beta1, out=b)
        a += b
        np.sign(a, out=a)
        a *= lr
        w -= a
        m *= self.beta2
        np.multiply(g, 1 - self.beta2, out=b)
        m += b
