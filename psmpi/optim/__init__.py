"""Optimizers over flat shards, learning-rate schedules and gradient clipping; no layers, no messages."""

from psmpi.optim.base import AllSum, Closure, Hyper, Optimizer
from psmpi.optim.first_order import SGD, Adam, AdamW, Momentum, Nesterov, RMSprop
from psmpi.optim.lbfgs import LBFGS
from psmpi.optim.norms import clip_by_global_norm
from psmpi.optim.registry import FIRST_ORDER, OPTIMIZERS, make_optimizer
from psmpi.optim.schedules import Schedule, make_schedule

__all__ = [
    "FIRST_ORDER",
    "LBFGS",
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "AdamW",
    "AllSum",
    "Closure",
    "Hyper",
    "Momentum",
    "Nesterov",
    "Optimizer",
    "RMSprop",
    "Schedule",
    "clip_by_global_norm",
    "make_optimizer",
    "make_schedule",
]
