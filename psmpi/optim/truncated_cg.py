"""Truncated conjugate gradients on the quadratic model of a partitioned quasi-Newton step.

Source: Raynaud, Orban, Bigeon, "PLSR1" (Cahiers du GERAD G-2023-41); Steihaug 1983 for the trust region. Vectors are
shards. Callables supply global sums and products, so that every rank takes the same decisions from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import Literal

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.optim.base import AllSum

# If ||r||^2 falls below this part of its value in an iteration, the difference formula has too few digits left.
CANCELLED = 1e-6
End = Literal["converged", "iterations", "boundary", "curvature"]


@dataclass(frozen=True)
class Direction:
    """Scalars of a result x of `truncated_cg`: iterations (products), x^T B x, ||x||, g^T x, and reason of the end."""

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

    product(p, q) fills the shard q = B p. follow(a) is called after x has become x + a p, with p of the last product.
    With a finite radius x stays inside the radius; along a direction p with p^T B p <= 0, x goes to the boundary.
    Without a radius such a direction ends the iteration at the present x, or at -g if it is the first direction.
    work: three (n,) arrays of the dtype of g, used for r, p, q. All arrays are of `ops`. Scalars are float64.
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
        # One sum over the ranks in each iteration. ||r||^2 is computed anew: an updated value would accumulate rounding
        # errors without bound.
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
        # ||r - a q||^2 by its expansion, unless the terms cancel.
        rr += a * (a * qq - 2 * rq)
        if not max(rr, stop * stop) > CANCELLED * before:
            (rr,) = allsum(ops.dots([(r, r)])).tolist()
        if rr <= stop * stop:
            end = "converged"
            break
        ops.combine(p, (rr / before, p), (1.0, r))
    # r = -g - B x gives x^T B x without another product.
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
    """Compute x += a p, r -= a q, and call follow(a), which repeats the same arithmetic elsewhere."""
    ops.combine(x, (1.0, x), (a, p))
    ops.combine(r, (1.0, r), (-a, q))
    follow(a)
