"""Settings that are given although neither the optimizer nor the schedule uses them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from psmpi.optim.curvature.settings import NewtonSettings
from psmpi.optim.registry import ALL_OPTIMIZERS, find_optimizer
from psmpi.optim.schedules import SCHEDULES, ScheduleSettings, find_schedule
from psmpi.optim.settings import USUAL, Hyper

DEFAULTS = {f.name: f.default for kind in (Hyper, NewtonSettings, ScheduleSettings) for f in fields(kind)}


@dataclass(frozen=True)
class Unused:
    """Setting that is not used, and what uses it: the names of optimizers (--optimizer) or schedules (--schedule)."""

    setting: str
    choice: Literal["optimizer", "schedule"]
    users: tuple[str, ...]


def unused_settings(
    optimizer: str, schedule: str, values: Mapping[str, Any], said: Collection[str] = ()
) -> list[Unused]:
    """The settings of `values` that differ from their defaults and that neither of the two uses, in their order.

    values: settings by their names in `Hyper`, `NewtonSettings` and `ScheduleSettings`; other names are passed over.
    said: names of settings that count whatever their values. UserError for an unknown optimizer or schedule.
    """
    used = {*find_optimizer(optimizer).settings, *find_schedule(schedule).settings}
    found = []
    for name, value in values.items():
        if name in used or name not in DEFAULTS:
            continue
        if name not in said and value in (DEFAULTS[name], USUAL.get(name, DEFAULTS[name])):
            continue
        optimizers = tuple(known for known, kind in ALL_OPTIMIZERS.items() if name in kind.settings)
        schedules = tuple(known for known, kind in SCHEDULES.items() if name in kind.settings)
        if optimizers:
            found.append(Unused(name, "optimizer", optimizers))
        elif schedules:
            found.append(Unused(name, "schedule", schedules))
    return found
