"""Heavy-ball momentum update rule."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from psmpi.optim.first_order import FirstOrder


class Momentum(FirstOrder):
    """Heavy-ball momentum: v = momentum v + g; w -= lr v.

    Source: Polyak 1964, in PyTorch's form (no dampening, lr outside v).
    """

    summary = "gradient descent with momentum (Polyak 1964)"
    names = ("v",)
    settings = ("momentum", "weight_decay")
    operation = "momentum"
    nesterov: ClassVar[bool] = False
    momentum: float

    def arguments(self, lr: float) -> tuple[float, ...]:
        return lr, self.momentum, self.weight_decay, self.nesterov

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        (v,) = state
        v *= self.momentum
        v += g
        np.multiply(v, lr, out=a)
        w -= a
