"""Learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi

from psmpi.errors import UserError

SCHEDULES = ("constant", "step", "cosine")


def make_schedule(
    kind: str,
    lr: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    step_size: int = 0,
    gamma: float = 0.1,
    min_lr: float = 0.0,
) -> Callable[[int], float]:
    """The learning rate of step t = 0, 1, ...

    constant: lr; step: lr gamma^floor(t / step_size); cosine: from lr to min_lr over the steps after the warm-up
    (Loshchilov and Hutter 2017, eq. 5 without restarts). In the first `warmup_steps` steps the rate rises linearly, as
    (t + 1) / warmup_steps of the schedule's first value. UserError for settings that make no schedule.
    """
    if kind not in SCHEDULES:
        raise UserError(f"--schedule {kind!r} is unknown: choose one of {', '.join(SCHEDULES)}")
    if kind == "step" and step_size < 1:
        raise UserError("--schedule step needs --step-size, the number of steps between two reductions")
    if warmup_steps < 0:
        raise UserError(f"--warmup-steps {warmup_steps}: expected 0 or more")
    if not 0 <= min_lr <= lr:
        raise UserError(f"--min-lr {min_lr}: expected a number from 0 to --lr {lr}")

    def rate(t: int) -> float:
        if t < warmup_steps:
            return lr * (t + 1) / warmup_steps
        if kind == "step":
            return lr * gamma ** (t // step_size)
        if kind == "cosine":
            done = min(1.0, (t - warmup_steps) / max(1, total_steps - warmup_steps))
            return min_lr + 0.5 * (lr - min_lr) * (1 + cos(pi * done))
        return lr

    return rate
