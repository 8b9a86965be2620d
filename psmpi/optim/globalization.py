"""Globalization of partitioned quasi-Newton steps, which else may be too long, and Nesterov's extrapolation of them.

Raynaud, Orban, Bigeon, "PLSR1" (Cahiers du GERAD G-2023-41). Everything here is plain numbers, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, sqrt

# Of the trust region: acceptance, what is a good step, how much of the radius it must use, growth, and bounds. A radius
# that cannot get below what float64 still resolves would reject the same step for ever.
ETA, ETA_GOOD, NEAR, GROWTH, SMALLEST, LARGEST = 1e-3, 0.75, 0.8, 2.0, 1e-10, 1e3
# Of the line search: Armijo's fraction, the factor between trials, the shortest step.
ARMIJO, SHRINK, SHORTEST = 0.05, 2 / 3, 1e-8
# Differences of values below this part of them are rounding (Conn, Gould, Toint, Trust-Region Methods, 17.4.2).
ROUNDING = 10 * 2.0**-52
# Of the adaptive Nesterov sequence.
GAMMA = 1e-5


@dataclass
class TrustRegion:
    """The radius, and its rule: accept where the ratio of actual to predicted decrease exceeds 1e-3."""

    radius: float = 1.0

    def judge(self, before: float, after: float, model_decrease: float, length: float) -> bool:
        """Whether the step is taken; changes the radius. A ratio that is not a number is a rejection."""
        slack = ROUNDING * abs(before)
        ratio = (before - after + slack) / (model_decrease + slack) if model_decrease > 0 else -inf
        taken = ratio > ETA
        if taken and ratio >= ETA_GOOD and length > NEAR * self.radius:
            self.radius = min(LARGEST, self.radius * GROWTH)
        elif not taken:
            self.radius = max(SMALLEST, self.radius / GROWTH)
        return taken


def armijo(
    value: Callable[[float], float], start: float, slope: float, *, extend: bool = True, first: float = 1.0
) -> tuple[float, float] | None:
    """A step length b with start - value(b) >= 0.05 b |slope|, and the value there; None where there is none.

    slope < 0 is the derivative at 0. From `first` the length is multiplied by 2/3 until the condition holds, down to
    1e-8 times `first`; with `extend`, if it holds at `first`, by 3/2 as long as it holds and the value falls. It does
    not hold for values that are not finite.
    """

    def holds(length: float, at: float) -> bool:
        return isfinite(at) and start - at >= ARMIJO * length * -slope - ROUNDING * abs(start)

    if not slope < 0:
        return None
    length, at = first, value(first)
    if holds(length, at):
        while extend and at < start:
            longer = length / SHRINK
            further = value(longer)
            if not (holds(longer, further) and further < at):
                break
            length, at = longer, further
        return length, at
    while length > SHORTEST * first:
        length *= SHRINK
        at = value(length)
        if holds(length, at):
            return length, at
    return None


@dataclass
class Extrapolation:
    """mu of Nesterov's extrapolation: constant, or adaptive with theta from step to step."""

    adaptive: bool
    mu: float = 0.9
    theta: float = 1.0

    def next(self) -> float:
        """The momentum of this step."""
        if not self.adaptive:
            return self.mu
        t2 = self.theta * self.theta
        b = t2 - GAMMA
        after = (-b + sqrt(b * b + 4 * t2)) / 2
        mu = self.theta * (1 - self.theta) / (t2 + after)
        self.theta = after
        return mu

    def fail(self) -> None:
        """After a line search that found nothing the adaptive sequence starts again."""
        self.theta = 1.0
