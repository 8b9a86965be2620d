"""The quadratic model of a partitioned quasi-Newton step: truncated conjugate gradients, step lengths and radii.

Raynaud, Orban, Bigeon, "PLSR1" (Cahiers du GERAD G-2023-41); Steihaug 1983 for the trust region. Vectors here are
shards: what is global comes in through callables, and every rank takes the same decisions from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Literal

import numpy as np

# Of the trust region: acceptance, what is a good step, how much of the radius it must use, growth, and bounds.
ETA, ETA_GOOD, NEAR, GROWTH, SMALLEST, LARGEST = 1e-3, 0.75, 0.8, 2.0, 1e-6, 1e3
# Of the line search: Armijo's fraction, the factor between trials, the shortest step.
ARMIJO, SHRINK, SHORTEST = 0.05, 2 / 3, 1e-8
# Of the adaptive Nesterov sequence.
GAMMA = 1e-5

End = Literal["converged", "iterations", "boundary", "curvature"]


@dataclass(frozen=True)
class Direction:
    """What `truncated_cg` found: iterations (products), s^T B s, ||s||, g^T s, and why it ended."""

    iterations: int
    curvature: float
    length: float
    slope: float
    end: End


# Gives every rank's sums: (k,) float64 of this rank's shares in, the same array, summed, out.
AllSum = Callable[[np.ndarray], np.ndarray]


def truncated_cg(
    g: np.ndarray,
    x: np.ndarray,
    product: Callable[[np.ndarray, np.ndarray], float],
    follow: Callable[[float], None],
    allsum: AllSum,
    work: Sequence[np.ndarray],
    *,
    radius: float = inf,
    rtol: float = 1e-2,
    atol: float = 0.0,
    itmax: int = 30,
) -> Direction:
    """Minimise g^T x + x^T B x / 2 into the shard x (n,), from 0, until ||r|| <= atol + rtol ||g||.

    product(p, q) fills the shard q = B p and returns this rank's share of p^T B p; follow(a) is told that x has become
    x + a p, p that of the last product. With a finite radius x stays inside it, and goes to its boundary along a
    direction of curvature that is not positive; without one such a direction ends the iteration with the x before, or
    with -g if it is the first. work: three (n,) arrays of its dtype, r, p, q. Scalars are float64.
    """
    r, p, q = work
    np.negative(g, out=r)
    np.copyto(p, r)
    x.fill(0)
    eps = float(np.finfo(g.dtype).eps)
    (rr,) = _sums(allsum, (r, r))
    stop = atol + rtol * sqrt(rr) if isfinite(rr) else inf
    length, iterations, end = 0.0, 0, "iterations"
    if sqrt(rr) <= atol or rr == 0 or not isfinite(rr):
        return Direction(0, 0.0, 0.0, 0.0, "converged")
    while iterations < itmax:
        share = product(p, q)
        shares = _shares((p, p), (x, p), (x, x))
        pq, pp, xp, xx = allsum(np.array([share, *shares])).tolist()
        iterations += 1
        if isfinite(radius):
            room = max(0.0, radius * radius - xx)
            edge = (-xp + sqrt(xp * xp + pp * room)) / pp
            if not pq > 0 or rr / pq > edge:
                _advance(x, r, p, q, edge, follow)
                end = "boundary"
                break
        elif not pq > eps * pp:
            if iterations == 1:
                _advance(x, r, p, q, 1.0, follow)
            end = "curvature"
            break
        a = rr / pq
        _advance(x, r, p, q, a, follow)
        before = rr
        (rr,) = _sums(allsum, (r, r))
        if sqrt(rr) <= stop:
            end = "converged"
            break
        p *= rr / before
        p += r
    # r = -g - B x, so that s^T B s takes no further product.
    xx, xg, xr = _sums(allsum, (x, x), (x, g), (x, r))
    length = sqrt(xx)
    return Direction(iterations, -(xg + xr), length, xg, end)  # type: ignore[arg-type]


def _advance(
    x: np.ndarray, r: np.ndarray, p: np.ndarray, q: np.ndarray, a: float, follow: Callable[[float], None]
) -> None:
    """x += a p, r -= a q, in the same arithmetic as those who follow; q is used up."""
    add_scaled(x, p, a)
    q *= q.dtype.type(a)
    r -= q
    follow(a)


def add_scaled(x: np.ndarray, p: np.ndarray, a: float, chunk: int = 1 << 13) -> None:
    """x += a p (n,), chunk by chunk: the same bits wherever an element lies."""
    factor = x.dtype.type(a)
    for start in range(0, x.size, chunk):
        x[start : start + chunk] += factor * p[start : start + chunk]


def _shares(*pairs: tuple[np.ndarray, np.ndarray]) -> list[float]:
    return [float(np.dot(a, b)) if a.dtype == np.float64 else _wide_dot(a, b) for a, b in pairs]


def _wide_dot(a: np.ndarray, b: np.ndarray, chunk: int = 1 << 13) -> float:
    """The scalar product of float32 vectors, summed in float64 over chunks."""
    return float(sum(float(np.dot(a[k : k + chunk], b[k : k + chunk])) for k in range(0, a.size, chunk)))


def _sums(allsum: AllSum, *pairs: tuple[np.ndarray, np.ndarray]) -> list[float]:
    found: list[float] = allsum(np.array(_shares(*pairs))).tolist()
    return found


@dataclass
class TrustRegion:
    """The radius, and its rule: accept where the ratio of actual to predicted decrease exceeds 1e-3."""

    radius: float = 1.0

    def judge(self, before: float, after: float, model_decrease: float, length: float) -> bool:
        """Whether the step is taken; changes the radius. A ratio that is not a number is a rejection."""
        ratio = (before - after) / model_decrease if model_decrease > 0 else -inf
        taken = ratio > ETA
        if taken and ratio >= ETA_GOOD and length > NEAR * self.radius:
            self.radius = min(LARGEST, self.radius * GROWTH)
        elif not taken:
            self.radius = max(SMALLEST, self.radius / GROWTH)
        return taken


def armijo(
    value: Callable[[float], float], start: float, slope: float, *, extend: bool = True
) -> tuple[float, float] | None:
    """A step length b with start - value(b) >= 0.05 b |slope|, and the value there; None where there is none.

    slope < 0 is the derivative at 0. From 1 the length is multiplied by 2/3 until the condition holds; with `extend`,
    if it holds at 1, by 3/2 as long as it holds and the value falls. It does not hold for values that are not finite.
    """

    def holds(length: float, at: float) -> bool:
        return isfinite(at) and start - at >= ARMIJO * length * -slope

    if not slope < 0:
        return None
    length, at = 1.0, value(1.0)
    if holds(length, at) and at < start:
        while extend:
            longer = length / SHRINK
            further = value(longer)
            if not (holds(longer, further) and further < at):
                break
            length, at = longer, further
        return length, at
    while length > SHORTEST:
        length *= SHRINK
        at = value(length)
        if holds(length, at):
            return length, at
    return None


@dataclass
class Momentum:
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
