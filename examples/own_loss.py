"""The squared hinge, a loss outside the package: sum_{j != y} max(0, gap + kappa (c_j - c_y))^2 (Tang 2013).

Run: mpirun -n 2 python examples/own_loss.py train --loss squared_hinge --gap 2 --colocate     (10 s)"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

import psmpi.command
from psmpi.errors import UserError
from psmpi.nn.losses import LOSSES, PairwiseLoss


@dataclass(frozen=True)
class Settings:
    """Squared hinge (squared_hinge)."""

    table: ClassVar[str] = "squared_hinge"
    results: ClassVar[bool] = True

    gap: float = 1.0
    """Margin: the loss is 0 if kappa times the lead of the label's score is at least this."""


@LOSSES.register("squared_hinge")
class SquaredHinge(PairwiseLoss):
    formula = "sum_{j != y} max(0, gap + kappa (c_j - c_y))^2"
    options = Settings

    def __init__(self, dtype, **settings):
        super().__init__(dtype, **settings)
        if not self.own.gap > 0:
            raise UserError(f"--gap {self.own.gap}: expected a number above 0")

    def of_margins(self, z, values, grad, own, pairs):
        z += self.own.gap
        np.maximum(z, 0, out=z)
        z[own] = 0
        if pairs is not None:
            np.copyto(z, 0, where=~pairs)
        if grad is not None:
            np.multiply(z, 2 * self.kappa, out=grad)
        return float(np.vdot(z, z))


if __name__ == "__main__":
    raise SystemExit(psmpi.command.main())
