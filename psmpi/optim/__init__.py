"""Optimizers over flat shards, learning-rate schedules and gradient clipping; no layers, no messages."""

from psmpi.optim.base import AllSum, Closure, Optimizer
from psmpi.optim.curvature.settings import NewtonSettings
from psmpi.optim.first_order import FirstOrder
from psmpi.optim.norms import clip_by_global_norm
from psmpi.optim.registry import (
    ALL_OPTIMIZERS,
    OPTIMIZERS,
    find_optimizer,
    is_first_order,
    make_optimizer,
    optimizer_names,
    optimizer_summaries,
)
from psmpi.optim.schedules import SCHEDULES, Schedule, ScheduleSettings, make_schedule
from psmpi.optim.settings import Hyper, given
from psmpi.optim.unused import Unused, unused_settings

__all__ = [
    "ALL_OPTIMIZERS",
    "OPTIMIZERS",
    "SCHEDULES",
    "AllSum",
    "Closure",
    "FirstOrder",
    "Hyper",
    "NewtonSettings",
    "Optimizer",
    "Schedule",
    "ScheduleSettings",
    "Unused",
    "clip_by_global_norm",
    "find_optimizer",
    "given",
    "is_first_order",
    "make_optimizer",
    "make_schedule",
    "optimizer_names",
    "optimizer_summaries",
    "unused_settings",
]
