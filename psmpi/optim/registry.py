"""Optimizers by name."""

from __future__ import annotations

import numpy as np

from psmpi.errors import UserError
from psmpi.optim.base import Hyper, Optimizer
from psmpi.optim.first_order import SGD, Adam, AdamW, Momentum, Nesterov, RMSprop
from psmpi.optim.lbfgs import LBFGS

OPTIMIZERS: dict[str, type] = {
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSprop,
    "lbfgs": LBFGS,
}


def make_optimizer(name: str, n: int, dtype: np.dtype, hyper: Hyper) -> Optimizer:
    """The optimizer called `name` for a shard of n elements; UserError for a name or a setting that makes none."""
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer {name!r} is unknown: choose one of {', '.join(OPTIMIZERS)}")
    for field in ("momentum", "beta1", "beta2", "alpha"):
        if not 0 <= getattr(hyper, field) < 1:
            raise UserError(f"--{field} {getattr(hyper, field)}: expected a number from 0 up to, not including, 1")
    if not hyper.eps > 0:
        raise UserError(f"--eps {hyper.eps}: expected a number above 0")
    if not hyper.weight_decay >= 0:
        raise UserError(f"--weight-decay {hyper.weight_decay}: expected 0 or more")
    if hyper.history < 1 or hyper.max_evals < 1:
        raise UserError(f"--history {hyper.history}, --max-evals {hyper.max_evals}: expected 1 or more")
    return OPTIMIZERS[name](n, dtype, hyper)
