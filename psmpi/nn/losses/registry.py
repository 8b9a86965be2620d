"""The losses by name: a new one is a file beside this one and a line here, or a class of another package or program.

docs/own_loss.md describes the latter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.errors import UserError
from psmpi.nn.losses.base import Loss, largest_exponent
from psmpi.nn.losses.bce import BinaryCrossEntropy
from psmpi.nn.losses.hinge import Hinge
from psmpi.nn.losses.logistic import PairwiseLogistic
from psmpi.nn.losses.nll import CrossEntropy
from psmpi.nn.losses.psl import PSL
from psmpi.nn.losses.squared import SquaredError
from psmpi.registry import Registry

OWN: dict[str, type[Loss]] = {
    "psl": PSL,
    "logistic": PairwiseLogistic,
    "nll": CrossEntropy,
    "squared": SquaredError,
    "hinge": Hinge,
    "bce": BinaryCrossEntropy,
}
LOSSES: Registry[type[Loss]] = Registry("loss", "--loss {!r}", "psmpi.nn.losses.base:Loss", OWN, named=True)


def formulas() -> dict[str, str]:
    """The formula of each loss in one line, by name."""
    return {name: loss.formula for name, loss in LOSSES.items()}


def make_loss(
    name: str,
    dtype: np.dtype,
    *,
    kappa: float = 1.0,
    exp_clip: str = "auto",
    task: str = "classes",
    outputs: int = 0,
    weights: str = "none",
    own: Any = None,
) -> Loss:
    """Make the loss called `name`.

    exp_clip: auto, off, or the exponent from which psl continues as its tangent; outputs: number of scores of a sample,
    on all ranks together; weights: see `PSL`; own: an object of the loss's `options`, the defaults if None.

    UserError for an unknown name, a task that the loss cannot learn (see `Loss`), a kappa that is not positive, and
    another exp_clip.
    """
    kind = LOSSES.find(name)
    if task not in kind.tasks:
        fit = " or ".join(f"--loss {other}" for other, loss in LOSSES.items() if task in loss.tasks)
        raise UserError(
            f"--loss {name} needs labels, and the targets are floating point numbers, values to learn: use {fit}, or "
            "save labels as integers, y.astype(np.int64), of one-hot rows y.argmax(axis=1)"
        )
    if not 0 < kappa <= 1e6:
        raise UserError(f"--kappa {kappa}: expected a number above 0 and up to 1e6, usually 1 or 2")
    try:
        limit = {"auto": 0.0, "off": None}[exp_clip] if exp_clip in ("auto", "off") else float(exp_clip)
    except ValueError:
        limit = -1.0
    if limit is not None and not 0 <= limit <= largest_exponent(dtype):
        raise UserError(
            f"--exp-clip {exp_clip}: expected auto, off, or an exponent from 0 to {largest_exponent(dtype):.1f} "
            f"(the largest one for {np.dtype(dtype)})"
        )
    return kind(dtype, kappa=kappa, exp_clip=limit, task=task, outputs=outputs, weights=weights, own=own)
