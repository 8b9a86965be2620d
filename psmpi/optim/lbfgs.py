"""L-BFGS with a strong Wolfe line search, on shards: every scalar product is a global sum.

Nocedal and Wright, Numerical Optimization (2nd ed.): two-loop recursion, Algorithm 7.4; line search, Algorithms 3.5
and 3.6 with cubic interpolation (eq. 3.59).
"""

from __future__ import annotations

from math import isfinite, sqrt

import numpy as np

from psmpi.optim.base import AllSum, Closure, Hyper, Optimizer

SUFFICIENT, CURVATURE = 1e-4, 0.9


class LBFGS(Optimizer):
    """One step is one iteration: a direction from the last `history` pairs, then a line search on the closure.

    The closure must see one minibatch throughout a step; pairs are differences of gradients of that minibatch. Weight
    decay is an L2 penalty: 0.5 weight_decay ||w||^2 on the loss. `lr` is the first trial length (the very first step
    is shortened to lr min(1, 1 / ||g||_1)). A search that finds no lower point restores w and forgets all pairs;
    scalars["failed_searches"] counts these.
    """

    needs_closure = True

    def __init__(self, n: int, dtype: np.dtype, hyper: Hyper):
        names = [f"{kind}{k}" for k in range(hyper.history) for kind in "sy"]
        super().__init__(n, dtype, hyper, tuple(names))
        self.scalars.update(pairs=0, newest=-1, failed_searches=0)
        # g of the accepted point, the direction, where the search started, and scratch.
        self.kept, self.direction, self.start, self.work = (np.empty(n, dtype) for _ in range(4))

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        if closure is None:
            raise ValueError("lbfgs needs a closure that recomputes loss and gradient")
        decay = self.hyper.weight_decay

        def dots(*pairs: tuple[np.ndarray, np.ndarray]) -> list[float]:
            return allsum(np.array([_dot(a, b) for a, b in pairs])).tolist()

        def objective() -> float:
            value = closure()
            if decay:
                value += 0.5 * decay * dots((w, w))[0]
                np.multiply(w, decay, out=self.work)
                np.add(g, self.work, out=g)
            return value

        value = objective()
        self._direction(g, dots)
        np.abs(g, out=self.work)
        slope, size = allsum(np.array([_dot(g, self.direction), float(self.work.sum(dtype=np.float64))])).tolist()
        if not slope < 0:
            return
        np.copyto(self.start, w)
        np.copyto(self.kept, g)

        def trial(length: float) -> tuple[float, float]:
            """Loss and slope at start + length direction; w and g are there afterwards."""
            np.multiply(self.direction, length, out=w)
            np.add(w, self.start, out=w)
            at = objective()
            return (at, dots((g, self.direction))[0]) if isfinite(at) else (np.inf, np.nan)

        first = lr if self.scalars["pairs"] else lr * min(1.0, 1.0 / max(size, 1e-300))
        found = _search(trial, value, slope, first, self.hyper.max_evals)
        if found is None:
            np.copyto(w, self.start)
            self.scalars["pairs"] = 0
            self.scalars["failed_searches"] += 1
            return
        self._remember(w, g, dots)

    def _pair(self, age: int) -> tuple[np.ndarray, np.ndarray]:
        k = (int(self.scalars["newest"]) - age) % self.hyper.history
        return self.vectors[f"s{k}"], self.vectors[f"y{k}"]

    def _direction(self, g: np.ndarray, dots) -> None:
        """direction = -H g by the two-loop recursion."""
        d = self.direction
        np.negative(g, out=d)
        count = int(self.scalars["pairs"])
        factors = []
        for age in range(count):
            s, y = self._pair(age)
            sd, sy, yy = dots((s, d), (s, y), (y, y))
            factors.append((sd / sy, sy, yy))
            self._add(d, y, -sd / sy)
        if count:
            d *= factors[0][1] / factors[0][2]
        for age in reversed(range(count)):
            s, y = self._pair(age)
            alpha, sy, _ = factors[age]
            self._add(d, s, alpha - dots((y, d))[0] / sy)

    def _add(self, d: np.ndarray, v: np.ndarray, factor: float) -> None:
        np.multiply(v, factor, out=self.work)
        d += self.work

    def _remember(self, w: np.ndarray, g: np.ndarray, dots) -> None:
        """Keep s = w - start, y = g - kept, unless their curvature is too small to trust."""
        np.subtract(w, self.start, out=self.start)
        np.subtract(g, self.kept, out=self.kept)
        s, y = self.start, self.kept
        sy, ss, yy = dots((s, y), (s, s), (y, y))
        if sy <= 1e-10 * sqrt(ss * yy):
            return
        self.scalars["newest"] = (int(self.scalars["newest"]) + 1) % self.hyper.history
        self.scalars["pairs"] = min(int(self.scalars["pairs"]) + 1, self.hyper.history)
        into_s, into_y = self._pair(0)
        np.copyto(into_s, s)
        np.copyto(into_y, y)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a, b)) if a.dtype == np.float64 else float(np.einsum("i,i->", a, b, dtype=np.float64))


def _search(trial, value: float, slope: float, length: float, evals: int) -> float | None:
    """A length with the strong Wolfe conditions, else the lowest point of sufficient decrease seen, else None.

    `trial(length)` gives (value, slope) there; the last call made is the one returned.
    """
    low, low_value, low_slope = 0.0, value, slope
    high: tuple[float, float, float] | None = None
    last = None
    for _ in range(evals):
        at, at_slope = trial(length)
        last = length
        if not at <= value + SUFFICIENT * length * slope or (low > 0 and at >= low_value):
            high = (length, at, at_slope)
        elif abs(at_slope) <= -CURVATURE * slope:
            return length
        else:
            if at_slope * ((high[0] if high else np.inf) - low) >= 0:
                high = (low, low_value, low_slope)
            low, low_value, low_slope = length, at, at_slope
        if high is None:
            length *= 4
        else:
            length = _between(low, low_value, low_slope, *high)
            if abs(high[0] - low) <= 1e-9 * max(low, high[0]):
                break
    if low > 0:
        if last != low:
            trial(low)
        return low
    return None


def _between(a: float, fa: float, da: float, b: float, fb: float, db: float) -> float:
    """The minimiser of the cubic through two values and slopes, kept off the ends; the middle where there is none."""
    middle = 0.5 * (a + b)
    if not (isfinite(fb) and isfinite(db)):
        return a + 0.1 * (b - a)
    d1 = da + db - 3 * (fa - fb) / (a - b)
    square = d1 * d1 - da * db
    if square < 0:
        return middle
    d2 = (1 if b > a else -1) * sqrt(square)
    below = db - da + 2 * d2
    if below == 0:
        return middle
    at = b - (b - a) * (db + d2 - d1) / below
    margin = 0.1 * abs(b - a)
    return at if min(a, b) + margin <= at <= max(a, b) - margin else middle
