"""Check for settings that are set although neither the optimizer nor the schedule uses them."""

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
    """Unused setting, and the optimizers (--optimizer) or schedules (--schedule) that use it, by name."""

    setting: str
    choice: Literal["optimizer", "schedule"]
    users: tuple[str, ...]


def unused_settings(
    optimizer: str, schedule: str, values: Mapping[str, Any], explicit: Collection[str] = ()
) -> list[Unused]:
    """Return the settings of `values` that differ from their defaults although neither choice uses them, in order.

    values: settings by their names in `Hyper`, `NewtonSettings` and `ScheduleSettings`; other names are ignored.
    explicit: names of settings that count even with their default values. UserError for an unknown optimizer or
    schedule.
    """
    used = {*find_optimizer(optimizer).settings, *find_schedule(schedule).settings}
    unused = []
    for name, value in values.items():
        if name in used or name not in DEFAULTS:
            continue
        if name not in explicit and value in (DEFAULTS[name], USUAL.get(name, DEFAULTS[name])):
            continue
        optimizers = tuple(user for user, kind in ALL_OPTIMIZERS.items() if name in kind.settings)
        schedules = tuple(user for user, kind in SCHEDULES.items() if name in kind.settings)
        if optimizers:
            unused.append(Unused(name, "optimizer", optimizers))
        elif schedules:
            unused.append(Unused(name, "schedule", schedules))
    return unused
