"""Adam with a step count for each weight, for weights that are not stepped in every step."""

from __future__ import annotations

from math import inf, log
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from psmpi.optim.decay import Decoupled
from psmpi.optim.rules.adam import Adam


class CountedAdam(Adam):
    """Adam with a step count for each weight, for weights that are not all stepped together.

    vectors: "m", "v", and the counts "t"; there are no scalars.
    """

    names = ("m", "v", "t")
    operation = "counted_adam"
    counts = False

    def __init__(self, n: int, dtype: DTypeLike, **settings: Any) -> None:
        super().__init__(n, dtype, **settings)
        self.logs = [log(beta) if beta else -inf for beta in (self.beta1, self.beta2)]

    def arguments(self, lr: float) -> tuple[float, ...]:
        return lr, self.beta1, self.beta2, self.eps, *self.weights.factors(lr)

    def update(
        self, w: np.ndarray, g: np.ndarray, lr: float, state: list[np.ndarray], a: np.ndarray, b: np.ndarray
    ) -> None:
        m, v, t = state
        t += 1
        self.move(m, v, g, a)
        # expm1 gives -(1 - beta^t): v is negated below, and the negative sign of m makes the step w += b.
        np.multiply(t, self.logs[0], out=a)
        np.expm1(a, out=a)
        np.divide(m, a, out=b)
        np.multiply(t, self.logs[1], out=a)
        np.expm1(a, out=a)
        np.divide(v, a, out=a)
        np.negative(a, out=a)
        np.sqrt(a, out=a)
        a += self.eps
        b /= a
        b *= lr
        w += b


class CountedAdamW(CountedAdam):
    """AdamW with per-weight step counts."""

    decay = Decoupled
