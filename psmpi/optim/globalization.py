"""Globalization of partitioned quasi-Newton steps, which limits their length, and Nesterov's extrapolation of steps.

Source: Raynaud, Orban, Bigeon, "PLSR1" (Cahiers du GERAD G-2023-41). All values are Python numbers, the same on every
rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, sqrt

# Trust region: the ratio above which a step is accepted, the ratio of a good step, the part of the radius that a good
# step must use to enlarge the radius, the factor of growth, and the bounds of the radius. The lower bound is small
# enough that a rejected step is not tried forever with the same radius.
ETA, ETA_GOOD, NEAR, GROWTH, SMALLEST, LARGEST = 1e-3, 0.75, 0.8, 2.0, 1e-10, 1e3
# Line search: Armijo's constant, the factor between trials, and the shortest step relative to the first.
ARMIJO, SHRINK, SHORTEST = 0.05, 2 / 3, 1e-8
# Relative difference of values that still counts as rounding (Conn, Gould, Toint, Trust-Region Methods, 17.4.2).
ROUNDING = 10 * 2.0**-52
# Constant of the adaptive Nesterov sequence.
GAMMA = 1e-5


@dataclass
class TrustRegion:
    """Radius of a trust region, and its rule: accept if the ratio of actual to predicted decrease exceeds 1e-3."""

    radius: float = 1.0

    def judge(self, before: float, after: float, model_decrease: float, length: float) -> bool:
        """Return whether the step is accepted, and adapt the radius. A ratio that is NaN rejects the step."""
        slack = ROUNDING * abs(before)
        ratio = (before - after + slack) / (model_decrease + slack) if model_decrease > 0 else -inf
        accepted = ratio > ETA
        if accepted and ratio >= ETA_GOOD and length > NEAR * self.radius:
            self.radius = min(LARGEST, self.radius * GROWTH)
        elif not accepted:
            self.radius = max(SMALLEST, self.radius / GROWTH)
        return accepted


def armijo(
    value: Callable[[float], float], start: float, slope: float, *, extend: bool = True, first: float = 1.0
) -> tuple[float, float] | None:
    """Return a step length b with start - value(b) >= 0.05 b |slope|, and value(b); None if the search finds none.

    slope: the derivative at 0; None is returned unless it is negative. From `first` the length is multiplied by 2/3
    until the condition holds, down to 1e-8 times `first`. With `extend`, if the condition holds at `first`, the length
    is multiplied by 3/2 as long as the condition holds and the value falls. The condition fails for values that are
    not finite.
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
    """Momentum mu of Nesterov's extrapolation: constant, or adaptive, computed from theta at each step."""

    adaptive: bool
    mu: float = 0.9
    theta: float = 1.0

    def next(self) -> float:
        """Return the momentum of the current step, and advance the adaptive sequence."""
        if not self.adaptive:
            return self.mu
        t2 = self.theta * self.theta
        b = t2 - GAMMA
        after = (-b + sqrt(b * b + 4 * t2)) / 2
        mu = self.theta * (1 - self.theta) / (t2 + after)
        self.theta = after
        return mu

    def fail(self) -> None:
        """Restart the adaptive sequence after a line search without a result."""
        self.theta = 1.0
