"""Optimizers over flat shards, learning-rate schedules and gradient clipping; no layers, no messages."""

from psmpi.optim.base import AllSum, Closure, Optimizer
from psmpi.optim.curvature.settings import NewtonSettings
from psmpi.optim.norms import clip_by_global_norm
from psmpi.optim.registry import ALL_OPTIMIZERS, FIRST_ORDER, OPTIMIZERS, SUMMARIES, find_optimizer, make_optimizer
from psmpi.optim.schedules import SCHEDULES, Schedule, ScheduleSettings, make_schedule
from psmpi.optim.settings import Hyper, given
from psmpi.optim.unused import Unused, unused_settings

__all__ = [
    "ALL_OPTIMIZERS",
    "FIRST_ORDER",
    "OPTIMIZERS",
    "SCHEDULES",
    "SUMMARIES",
    "AllSum",
    "Closure",
    "Hyper",
    "NewtonSettings",
    "Optimizer",
    "Schedule",
    "ScheduleSettings",
    "Unused",
    "clip_by_global_norm",
    "find_optimizer",
    "given",
    "make_optimizer",
    "make_schedule",
    "unused_settings",
]
