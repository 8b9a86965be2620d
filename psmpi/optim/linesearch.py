"""Line search along a direction of descent for a step length that satisfies the strong Wolfe conditions.

Source: Nocedal and Wright, Numerical Optimization (2nd ed.), Algorithms 3.5 (bracketing) and 3.6 (zoom), with the cubic
interpolation of eq. 3.59. All values are Python numbers, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, sqrt

# c1 and c2 of the conditions: the value decreases by at least c1 times length times |slope|, and the slope shrinks to
# c2 times its initial size or less.
DECREASE, CURVATURE = 1e-4, 0.9
# Width of a bracket, relative to its ends, at which the search stops.
NARROW = 1e-9


@dataclass(frozen=True)
class Point:
    """A length along the direction, with the value and the slope there; value inf stands for any non-finite value."""

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
    """Return a point of the strong Wolfe conditions, else the lowest point of sufficient decrease, else None.

    origin: the point of length 0, with negative slope; length: the first trial length; evals: most calls of `trial`.
    A length whose value is not finite counts as too long. `keep()` is called directly after each trial that may be
    returned although other trials follow.
    """
    # The length lies between `low`, the best point so far, and `high`, which is None until a bracket exists.
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
            # The function falls from `at` towards `high`, unless the slope at `at` points the other way.
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
    # A decrease below rounding leaves the value equal to the origin's: it does not count.
    return low if low.value < origin.value else None


def _cubic(a: Point, b: Point) -> float | None:
    """Return the minimiser of the cubic through two points with their slopes (eq. 3.59), or None if it has none."""
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
    """Return a length inside the bracket: the cubic's minimiser, at least a tenth of the width from the ends."""
    width = high.length - low.length
    if not isfinite(high.value):
        # The far end is much too long, and its value says nothing more.
        return low.length + 0.1 * width
    at = _cubic(low, high)
    if at is None:
        return low.length + 0.5 * width
    margin = 0.1 * abs(width)
    return min(max(at, min(low.length, high.length) + margin), max(low.length, high.length) - margin)


def _beyond(before: Point, low: Point) -> float:
    """Return a length beyond `low`, where the function still falls: the cubic's minimiser, 1.1 to 10 times as long."""
    at = _cubic(before, low)
    if at is None or at <= low.length:
        # The cubic has no minimum ahead, so it gives no length.
        return 4 * low.length
    return min(max(at, 1.1 * low.length), 10 * low.length)
