"""L-BFGS with a strong Wolfe line search, on shards: every scalar product is a global sum.

The two-loop recursion (Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithm 7.4) is carried out on the
coefficients of the direction in the basis of all s, y and g, from the products of these vectors with each other (Chen,
Wang, Zhou 2014, "Large-scale L-BFGS using MapReduce"). A direction therefore takes one global sum, for any history.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, sqrt

import numpy as np
from numpy.typing import DTypeLike

from psmpi.backend import NumpyOps
from psmpi.optim.base import AllSum, Closure, Optimizer, check_settings
from psmpi.optim.linesearch import Point, strong_wolfe
from psmpi.optim.twoloop import two_loop

# A pair is skipped if s^T y is at most this times ||s|| ||y||: it would spoil the next directions.
FLAT = 1e-10


class LBFGS(Optimizer):
    """L-BFGS; one step is one iteration: a direction from the last `history` pairs, then a line search.

    The step calls the closure first at the initial w, so g need not be filled on entry. The closure must use the same
    minibatch throughout a step, because pairs are differences of gradients of one minibatch; the next step may use
    another minibatch. Products are accumulated in float64. `lr` is the first trial length; without any pairs the first
    trial length is lr min(1, 1 / ||g||_1). Weight decay is an L2 penalty: 0.5 weight_decay ||w||^2 on the closure's
    loss.

    A trial whose loss or slope is not finite counts as too long. The search fails if it finds no sufficient decrease
    in `max_evals` evaluations (the first one, at w, included), or if the loss or gradient at w is not finite. A failed
    search leaves w exactly as it was, drops the pairs and adds 1 to scalars["failed_searches"]. If the evaluations run
    out after a sufficient decrease, the step takes the lowest such point.

    vectors: "s0", "y0", "s1", ...: pairs s = change of w, y = change of g, in a ring of `history` slots.
    scalars: "count", number of pairs; "head", slot of the next pair; "pairs_taken", pairs stored so far; "curvature",
    s^T y of the newest pair.

    UserError for history < 1, max_evals < 2 or a negative weight_decay; ValueError for a step without closure.
    """

    summary = "L-BFGS with a line search"
    needs_closure = True
    settings = ("history", "max_evals", "weight_decay")

    def __init__(
        self,
        n: int,
        dtype: DTypeLike,
        *,
        history: int = 10,
        max_evals: int = 20,
        weight_decay: float = 0.0,
        ops: NumpyOps | None = None,
    ) -> None:
        check_settings(history=history, max_evals=max_evals, weight_decay=weight_decay)
        super().__init__(n, dtype, names=tuple(f"{kind}{k}" for k in range(history) for kind in "sy"), ops=ops)
        self.history, self.max_evals, self.weight_decay = history, max_evals, float(weight_decay)
        self.scalars.update(count=0, head=0, pairs_taken=0, curvature=0.0, failed_searches=0)
        self.ranges.update(count=(0, history), head=(0, history - 1))
        # w and g at the start of the search, the direction, and g at the best point so far.
        self.work = tuple(self.ops.empty(n, self.dtype) for _ in range(4))
        self.start, self.start_g, self.direction, self.best_g = self.work
        # s_i^T y_j and y_i^T y_j by slot. These products follow from the vectors, so checkpoints do not hold them:
        # `products_of` has the scalars for which they were computed. Other scalars (a restored state) make the step
        # compute them again.
        self.sy, self.yy = np.zeros((2, history, history))
        self.products_of = self._generation()

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        """Make one iteration; it leaves w (n,) at the accepted point, or as it was. See `Optimizer.step`."""
        if closure is None:
            raise ValueError("L-BFGS needs a closure that recomputes the loss and fills the gradient")
        self.check_shard(w, g)
        value = closure()
        slots = self._newest_first()
        self._ensure_products(slots, allsum)
        size, gg, ww, sg, yg = self._with_gradient(w, g, slots, allsum)
        value += 0.5 * self.weight_decay * ww
        if not (isfinite(value) and isfinite(gg)):
            self._fail()
            return
        if gg == 0:
            return
        self._combine(g, slots, *two_loop(sg, yg, self.sy[np.ix_(slots, slots)], self.yy[np.ix_(slots, slots)]))
        slope = self._products([(g, self.direction)], allsum)[0]
        if not -inf < slope < 0:
            # Rounding spoiled the pairs; the negative gradient always descends.
            self._forget()
            self.ops.combine(self.direction, (-1.0, g))
            slope = -gg
        self.start[...] = w
        self.start_g[...] = g

        last = 0.0

        def trial(length: float) -> Point:
            nonlocal last
            last = length
            self._move(w, length)
            value = closure()
            if self.weight_decay:
                self._decay(w, g)
                slope, ww = self._products([(g, self.direction), (w, w)], allsum)
                value += 0.5 * self.weight_decay * ww
            else:
                (slope,) = self._products([(g, self.direction)], allsum)
            if not (isfinite(value) and isfinite(slope)):
                return Point(length, inf, inf)
            return Point(length, value, slope)

        def keep() -> None:
            self.best_g[...] = g

        first = float(lr) if self.scalars["count"] else float(lr) * min(1.0, 1.0 / size)
        accepted = strong_wolfe(trial, keep, Point(0.0, value, slope), first, self.max_evals - 1)
        if accepted is None:
            w[...] = self.start
            self._fail()
            return
        if accepted.length == last:
            keep()
        else:
            # The last trial was another point: the same operations give the same w as at the accepted trial.
            self._move(w, accepted.length)
        self._remember(w, allsum)

    def _newest_first(self) -> list[int]:
        """Return the slots of the pairs, the newest first."""
        return [int(self.scalars["head"] - 1 - age) % self.history for age in range(int(self.scalars["count"]))]

    def _pair(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        return self.vectors[f"s{slot}"], self.vectors[f"y{slot}"]

    def _generation(self) -> tuple[float | int, ...]:
        return tuple(self.scalars[key] for key in ("count", "head", "pairs_taken", "curvature"))

    def _ensure_products(self, slots: list[int], allsum: AllSum) -> None:
        """Compute `sy` and `yy` of the stored pairs if the state was restored; otherwise they are up to date."""
        if self.products_of == self._generation():
            return
        pairs = []
        for i in slots:
            s, y = self._pair(i)
            for j in slots:
                pairs += [(s, self._pair(j)[1]), (y, self._pair(j)[1])]
        if pairs:
            products = self._products(pairs, allsum)
            block = np.reshape(products, (len(slots), len(slots), 2))
            self.sy[np.ix_(slots, slots)], self.yy[np.ix_(slots, slots)] = block[..., 0], block[..., 1]
        self.products_of = self._generation()

    def _with_gradient(
        self, w: np.ndarray, g: np.ndarray, slots: list[int], allsum: AllSum
    ) -> tuple[float, float, float, list[float], list[float]]:
        """Add weight decay to g; return ||g||_1, g^T g, w^T w, and s^T g, y^T g of the pairs, newest first.

        w^T w is 0 without weight decay.
        """
        if self.weight_decay:
            self._decay(w, g)
        pairs = [(g, g)] + [(g, self._pair(k)[0]) for k in slots] + [(g, self._pair(k)[1]) for k in slots]
        if self.weight_decay:
            pairs.append((w, w))
        partial = np.zeros(2 * len(slots) + 3)
        partial[: len(pairs)], partial[-1] = self.ops.dots(pairs), self.ops.abs_sum(g)
        products = allsum(partial).tolist()
        count = len(slots)
        return products[-1], products[0], products[-2], products[1 : count + 1], products[count + 1 : -2]

    def _products(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], allsum: AllSum) -> list[float]:
        """Return the global scalar products of pairs of shards, by one call of `allsum`."""
        sums: list[float] = allsum(self.ops.dots(pairs)).tolist()
        return sums

    def _decay(self, w: np.ndarray, g: np.ndarray) -> None:
        """Add weight_decay w to g."""
        self.ops.combine(g, (1.0, g), (self.weight_decay, w))

    def _move(self, w: np.ndarray, length: float) -> None:
        """Set w = start + length direction."""
        self.ops.combine(w, (1.0, self.start), (length, self.direction))

    def _combine(self, g: np.ndarray, slots: list[int], of_g: float, of_y: list[float], of_s: list[float]) -> None:
        """Set direction = of_g g + sum_k of_y[k] y_k + sum_k of_s[k] s_k."""
        terms = [(of_g, g)]
        for slot, y_factor, s_factor in zip(slots, of_y, of_s, strict=True):
            s, y = self._pair(slot)
            terms += [(y_factor, y), (s_factor, s)]
        self.ops.combine(self.direction, *terms)

    def _remember(self, w: np.ndarray, allsum: AllSum) -> None:
        """Store the pair s = w - start and y = best_g - start_g, unless its curvature s^T y is too small."""
        s, y = self.start, self.start_g
        self.ops.combine(s, (-1.0, s), (1.0, w))
        self.ops.combine(y, (-1.0, y), (1.0, self.best_g))
        slot, older = int(self.scalars["head"]), self._newest_first()
        # The new pair replaces the oldest pair of a full ring. Products of a new s with an old y are never used.
        older = [k for k in older if k != slot]
        pairs = [(y, y), (y, s), (s, s)]
        for k in older:
            pairs += [(y, self._pair(k)[0]), (y, self._pair(k)[1])]
        products = self._products(pairs, allsum)
        yy, sy, ss = products[:3]
        if not (isfinite(yy) and sy > FLAT * sqrt(ss * yy)):
            return
        for into, new in zip(self._pair(slot), (s, y), strict=True):
            into[...] = new
        self.sy[slot, slot], self.yy[slot, slot] = sy, yy
        for i, k in enumerate(older):
            self.sy[k, slot] = products[3 + 2 * i]
            self.yy[k, slot] = self.yy[slot, k] = products[4 + 2 * i]
        self.scalars["head"] = (slot + 1) % self.history
        self.scalars["count"] = len(older) + 1
        self.scalars["pairs_taken"] += 1
        self.scalars["curvature"] = sy
        self.products_of = self._generation()

    def _forget(self) -> None:
        self.scalars.update(count=0, head=0)

    def _fail(self) -> None:
        self._forget()
        self.scalars["failed_searches"] += 1
