"""Truncated conjugate gradients on the quadratic model of a partitioned quasi-Newton step.

Raynaud, Orban, Bigeon, "PLSR1" (Cahiers du GERAD G-2023-41); Steihaug 1983 for the trust region. Vectors here are
shards: what is global comes in through callables, and every rank takes the same decisions from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Literal

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.optim.base import AllSum

# Where ||r||^2 may fall below this part of itself in an iteration, too few digits of a difference are left.
CANCELLED = 1e-6
End = Literal["converged", "iterations", "boundary", "curvature"]


@dataclass(frozen=True)
class Direction:
    """The result of `truncated_cg`: iterations (products), s^T B s, ||s||, g^T s, and why it ended."""

    iterations: int
    curvature: float
    length: float
    slope: float
    end: End


def truncated_cg(
    g: np.ndarray,
    x: np.ndarray,
    product: Callable[[np.ndarray, np.ndarray], None],
    follow: Callable[[float], None],
    allsum: AllSum,
    work: Sequence[np.ndarray],
    *,
    ops: NumpyOps | None = None,
    radius: float = inf,
    rtol: float = 1e-2,
    atol: float = 0.0,
    itmax: int = 30,
) -> Direction:
    """Minimise g^T x + x^T B x / 2 into the shard x (n,), from 0, until ||r|| <= atol + rtol ||g||.

    product(p, q) fills the shard q = B p; follow(a) is told that x has become
    x + a p, p that of the last product. With a finite radius x stays inside it, and goes to its boundary along a
    direction of curvature that is not positive; without one such a direction ends the iteration with the x before, or
    with -g if it is the first. work: three (n,) arrays of its dtype, r, p, q. All arrays are of `ops`. Scalars are
    float64.
    """
    ops = ops or NumpyOps()
    r, p, q = work
    ops.combine(r, (-1.0, g))
    p[...] = r
    x.fill(0)
    eps = float(np.finfo(g.dtype).eps)
    (rr,) = allsum(ops.dots([(r, r)])).tolist()
    stop = atol + rtol * sqrt(rr) if isfinite(rr) else inf
    length, iterations, end = 0.0, 0, "iterations"
    if sqrt(rr) <= atol or rr == 0 or not isfinite(rr):
        return Direction(0, 0.0, 0.0, 0.0, "converged")
    while iterations < itmax:
        product(p, q)
        # One sum over the ranks an iteration. ||r||^2 is made anew: carried on, its rounding would grow without bounds.
        bounded = ((p, x), (x, x)) if isfinite(radius) else ()
        sums = ops.dots([(p, q), (p, p), *bounded, (r, r), (r, q), (q, q)])
        pq, pp, *inside, rr, rq, qq = allsum(sums).tolist()
        iterations += 1
        if isfinite(radius):
            xp, xx = inside
            room = max(0.0, radius * radius - xx)
            edge = (-xp + sqrt(xp * xp + pp * room)) / pp
            if not pq > 0 or rr / pq > edge:
                _advance(ops, x, r, p, q, edge, follow)
                end = "boundary"
                break
        elif not pq > eps * pp:
            if iterations == 1:
                _advance(ops, x, r, p, q, 1.0, follow)
            end = "curvature"
            break
        a = rr / pq
        _advance(ops, x, r, p, q, a, follow)
        before = rr
        # ||r - a q||^2, unless it cancels.
        rr += a * (a * qq - 2 * rq)
        if not max(rr, stop * stop) > CANCELLED * before:
            (rr,) = allsum(ops.dots([(r, r)])).tolist()
        if rr <= stop * stop:
            end = "converged"
            break
        ops.combine(p, (rr / before, p), (1.0, r))
    # r = -g - B x, so that s^T B s takes no further product.
    xx, xg, xr = allsum(ops.dots([(x, x), (x, g), (x, r)])).tolist()
    length = sqrt(xx)
    return Direction(iterations, -(xg + xr), length, xg, end)  # type: ignore[arg-type]


def _advance(
    ops: NumpyOps,
    x: np.ndarray,
    r: np.ndarray,
    p: np.ndarray,
    q: np.ndarray,
    a: float,
    follow: Callable[[float], None],
) -> None:
    """x += a p, r -= a q, in the same arithmetic as those who follow."""
    ops.combine(x, (1.0, x), (a, p))
    ops.combine(r, (1.0, r), (-a, q))
    follow(a)
