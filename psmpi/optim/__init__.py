"""Optimizers over flat shards, learning-rate schedules and gradient clipping; no layers, no messages."""

from psmpi.optim.base import AllSum, Closure, Optimizer
from psmpi.optim.norms import clip_by_global_norm
from psmpi.optim.registry import FIRST_ORDER, OPTIMIZERS, make_optimizer
from psmpi.optim.schedules import Schedule, make_schedule
from psmpi.optim.settings import Hyper

__all__ = [
    "FIRST_ORDER",
    "OPTIMIZERS",
    "AllSum",
    "Closure",
    "Hyper",
    "Optimizer",
    "Schedule",
    "clip_by_global_norm",
    "make_optimizer",
    "make_schedule",
]
