"""Learning rate as a function of the step."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

from psmpi.errors import UserError

SCHEDULES = ("constant", "step", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The learning rate of step t = 0, 1, ...; made, and its settings checked, by `make_schedule`."""

    kind: str
    lr: float
    total_steps: int
    warmup_steps: int = 0
    step_size: int = 0
    gamma: float = 0.1
    min_lr: float = 0.0

    def __call__(self, t: int) -> float:
        rate = self.lr
        if self.kind == "step":
            rate *= self.gamma ** (t // self.step_size)
        elif self.kind == "cosine":
            if t >= self.total_steps:
                rate = self.min_lr
            else:
                done = max(0, t - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
                rate = self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + cos(pi * done))
        if t < self.warmup_steps:
            rate *= (t + 1) / self.warmup_steps
        return rate


def make_schedule(
    kind: str,
    lr: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    step_size: int = 0,
    gamma: float = 0.1,
    min_lr: float = 0.0,
) -> Schedule:
    """The learning rate of step t = 0, 1, ... as a function of t.

    constant: lr. step: lr gamma^floor(t / step_size). cosine: from lr, over the steps after the warm-up, to
    min_lr at total_steps and ever after (Loshchilov and Hutter 2017, eq. 5 without restarts). Over the first
    `warmup_steps` steps any of them is multiplied by (t + 1) / warmup_steps.

    UserError for an unknown kind and for settings out of their range.
    """
    if kind not in SCHEDULES:
        raise UserError(f"--schedule {kind!r} is unknown: choose one of {', '.join(SCHEDULES)}")
    if total_steps < 1:
        raise UserError(f"{total_steps} steps in all: a schedule needs 1 or more")
    if warmup_steps < 0:
        raise UserError(f"--warmup-steps {warmup_steps}: expected 0 or more")
    if kind == "step":
        if step_size < 1:
            raise UserError(
                f"--step-size {step_size}: --schedule step needs 1 or more, the steps between two reductions"
            )
        if not 0 < gamma <= 1:
            raise UserError(f"--gamma {gamma}: expected a number above 0, up to 1")
    if not 0 <= min_lr <= lr:
        raise UserError(f"--min-lr {min_lr}: expected a number from 0 to --lr {lr}")
    return Schedule(kind, float(lr), total_steps, warmup_steps, step_size, float(gamma), float(min_lr))
