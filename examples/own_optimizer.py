"""Adagrad, an optimizer outside the package: v += g^2; w -= lr g / (sqrt(v + start) + eps) (Duchi et al. 2011).

Run: mpirun -n 2 python examples/own_optimizer.py train --optimizer adagrad --colocate"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

import psmpi.command
from psmpi.errors import UserError
from psmpi.optim import OPTIMIZERS, FirstOrder


@dataclass(frozen=True)
class Settings:
    """Adagrad (adagrad)."""

    table: ClassVar[str] = "adagrad"
    results: ClassVar[bool] = True

    start: float = 0.0
    """Added to the sums of squares."""


@OPTIMIZERS.register("adagrad")
class Adagrad(FirstOrder):
    summary = "gradient over the root of the sum of its squares"
    names = ("v",)
    settings = ("eps", "weight_decay")
    options = Settings
    rates = (0.1, 0.03, 0.01)

    def __init__(self, n, dtype, **settings):
        super().__init__(n, dtype, **settings)
        if not self.own.start >= 0:
            raise UserError(f"--start {self.own.start}: expected 0 or a number above it")

    def update(self, w, g, lr, state, a, b):
        (v,) = state
        np.multiply(g, g, out=a)
        v += a
        np.add(v, self.own.start, out=a)
        np.sqrt(a, out=a)
        a += self.eps
        np.divide(g, a, out=b)
        b *= lr
        w -= b


if __name__ == "__main__":
    raise SystemExit(psmpi.command.main())
