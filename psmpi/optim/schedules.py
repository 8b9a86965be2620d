"""Learning-rate schedules: the learning rate as a function of the step, one class for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import cos, pi
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from psmpi.errors import UserError


@dataclass(frozen=True)
class Schedule(ABC):
    """Learning rate of step t = 0, 1, ...; `make_schedule` makes a schedule and checks its settings.

    In the first `warmup_steps` steps, the learning rate of any schedule is multiplied by (t + 1) / warmup_steps.
    """

    lr: float
    total_steps: int
    warmup_steps: int = 0
    # Fields of `ScheduleSettings` that the schedule uses, by name.
    settings: ClassVar[tuple[str, ...]] = ("warmup_steps",)

    def __call__(self, t: int) -> float:
        rate = self.rate(t)
        if t < self.warmup_steps:
            rate *= (t + 1) / self.warmup_steps
        return rate

    @abstractmethod
    def rate(self, t: int) -> float:
        """Return the learning rate of step t without the warm-up factor."""

    def check(self) -> None:
        """Raise UserError for settings out of their range."""
        if self.total_steps < 1:
            raise UserError(f"{self.total_steps} steps in all: a schedule needs 1 or more")
        if self.warmup_steps < 0:
            raise UserError(f"--warmup-steps {self.warmup_steps}: expected 0 or more")


@dataclass(frozen=True)
class Constant(Schedule):
    """Constant schedule: lr."""

    def rate(self, t: int) -> float:
        return self.lr


@dataclass(frozen=True)
class Step(Schedule):
    """Step schedule: lr gamma^floor(t / step_size)."""

    step_size: int = 0
    gamma: float = 0.1
    settings = ("warmup_steps", "step_size", "gamma")

    def rate(self, t: int) -> float:
        return self.lr * self.gamma ** (t // self.step_size)

    def check(self) -> None:
        super().check()
        if self.step_size < 1:
            raise UserError(
                f"--step-size {self.step_size}: --schedule step needs 1 or more, the steps between two reductions"
            )
        if not 0 < self.gamma <= 1:
            raise UserError(f"--gamma {self.gamma}: expected a number above 0, up to 1")


@dataclass(frozen=True)
class Cosine(Schedule):
    """Cosine schedule from lr, after the warm-up, to min_lr at total_steps and from there on.

    Source: Loshchilov and Hutter 2017, eq. 5 without restarts.
    """

    min_lr: float = 0.0
    settings = ("warmup_steps", "min_lr")

    def rate(self, t: int) -> float:
        if t >= self.total_steps:
            return self.min_lr
        progress = max(0, t - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + cos(pi * progress))


SCHEDULES: dict[str, type[Schedule]] = {"constant": Constant, "step": Step, "cosine": Cosine}


if TYPE_CHECKING:
    ScheduleName = str
else:
    # The registry's names, for the command line, TOML files and the help.
    ScheduleName = Literal[tuple(SCHEDULES)]


@dataclass(frozen=True)
class ScheduleSettings:
    """The course of the learning rate."""

    schedule: ScheduleName = "constant"
    """Learning rate schedule.

    constant: --lr throughout
    step: multiply by --gamma every --step-size steps
    cosine: fall from --lr to --min-lr over all --epochs
    """
    warmup_steps: int = 0
    """Steps of a linear rise of the learning rate from 0, before the schedule; 0: no rise."""
    step_size: int = 0
    """Steps between two reductions by --schedule step, which needs 1 or more."""
    gamma: float = 0.1
    """Factor of each reduction by --schedule step."""
    min_lr: float = 0.0
    """Learning rate at the end of --schedule cosine."""


def find_schedule(kind: str) -> type[Schedule]:
    """Return the schedule called `kind`; raise UserError for an unknown name."""
    if kind not in SCHEDULES:
        raise UserError(f"--schedule {kind!r} is unknown: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[kind]


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
    """Return the schedule called `kind`: the learning rate as a function of the step t = 0, 1, ...

    The schedule ignores settings that it does not use. UserError for an unknown kind, for used settings out of their
    range, and for a min_lr outside [0, lr], used or not.
    """
    schedule_class = find_schedule(kind)
    settings: dict[str, Any] = {
        "warmup_steps": warmup_steps,
        "step_size": step_size,
        "gamma": float(gamma),
        "min_lr": float(min_lr),
    }
    schedule = schedule_class(float(lr), total_steps, **{name: settings[name] for name in schedule_class.settings})
    schedule.check()
    if not 0 <= min_lr <= lr:
        raise UserError(f"--min-lr {min_lr}: expected a number from 0 to --lr {lr}")
    return schedule
