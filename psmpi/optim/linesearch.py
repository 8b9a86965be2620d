"""A length that satisfies the strong Wolfe conditions, along a direction of descent.

Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithms 3.5 (bracketing) and 3.6 (zoom), with the
cubic interpolation of eq. 3.59. Everything here is plain numbers, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, sqrt

# c1 and c2 of the conditions: the decrease is c1 of what the slope promises, the slope shrinks to c2 of its
# size.
DECREASE, CURVATURE = 1e-4, 0.9
# The shortest bracket, relative to its ends, that is worth another evaluation.
NARROW = 1e-9


@dataclass(frozen=True)
class Point:
    """A length along the direction, the value and the slope there; value inf: not finite."""

    length: float
    value: float
    slope: float


def strong_wolfe(
    trial: Callable[[float], Point],
    keep: Callable[[], None],
    origin: Point,
    length: float,
    evals: int,
) -> Point | None:
    """A point of the strong Wolfe conditions, else the lowest seen of sufficient decrease, else None.

    origin: the point of length 0, of negative slope; length: the first to try; evals: calls of `trial` at
    most. Where `trial` gives a value that is not finite, the length counts as too long. `keep()` is called
    right after a trial that may be returned although others follow it.
    """
    # All lengths sought lie between `low`, the best so far, and `high`, which is not known before there is a
    # bracket.
    low, high = origin, None
    for _ in range(evals):
        at = trial(length)
        before = low
        if not at.value <= origin.value + DECREASE * length * origin.slope or (
            low is not origin and at.value >= low.value
        ):
            high = at
        elif abs(at.slope) <= -CURVATURE * origin.slope:
            return at
        else:
            # The function falls from `at` towards `high`, unless the slope says otherwise.
            if at.slope * ((inf if high is None else high.length) - low.length) >= 0:
                high = low
            low = at
            keep()
        if high is None:
            length = _beyond(before, low)
        elif abs(high.length - low.length) <= NARROW * max(high.length, low.length):
            break
        else:
            length = _between(low, high)
    # A decrease below the rounding of the values is none.
    return low if low.value < origin.value else None


def _cubic(a: Point, b: Point) -> float | None:
    """The minimiser of the cubic through two points and their slopes (eq. 3.59); None where there is none."""
    if not (isfinite(b.value) and isfinite(b.slope)):
        return None
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.length - b.length)
    square = d1 * d1 - a.slope * b.slope
    if not 0 <= square < inf:
        return None
    d2 = sqrt(square) if b.length > a.length else -sqrt(square)
    below = b.slope - a.slope + 2 * d2
    if below == 0:
        return None
    return b.length - (b.length - a.length) * (b.slope + d2 - d1) / below


def _between(low: Point, high: Point) -> float:
    """A length inside the bracket: the cubic's, kept off the ends: brackets shrink by a tenth at least."""
    width = high.length - low.length
    if not isfinite(high.value):
        # Nothing is known of that end but that it is far too long.
        return low.length + 0.1 * width
    at = _cubic(low, high)
    if at is None:
        return low.length + 0.5 * width
    margin = 0.1 * abs(width)
    return min(max(at, min(low.length, high.length) + margin), max(low.length, high.length) - margin)


def _beyond(before: Point, low: Point) -> float:
    """A longer length, where the function still falls at `low`: the cubic's, from 1.1 to 10 times as long."""
    at = _cubic(before, low)
    if at is None or at <= low.length:
        # A cubic without a minimum ahead says nothing about how far.
        return 4 * low.length
    return min(max(at, 1.1 * low.length), 10 * low.length)
