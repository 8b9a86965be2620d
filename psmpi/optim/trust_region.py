"""Quasi-Newton trust-region methods on the whole vector: L-BFGS and L-SR1, with one matrix for all weights.

These methods are the baseline of partitioned quasi-Newton methods: the same model, conjugate gradients, radius and
safeguards, but a single element of all weights. The matrix is sigma I + Z^T W Z as in `curvature.operators`. The
vectors are shards, so a product takes one global sum of 2 `history` numbers and moves no vector.
"""

from __future__ import annotations

from math import isfinite, sqrt

import numpy as np
from numpy.typing import DTypeLike

from psmpi.backend import NumpyOps
from psmpi.optim.base import AllSum, Closure, Optimizer, check_settings
from psmpi.optim.curvature.operators import FLAT, PATIENCE
from psmpi.optim.curvature.recursion import OMEGA, recurse
from psmpi.optim.globalization import TrustRegion
from psmpi.optim.truncated_cg import truncated_cg

# Bounds of positive scalars in a checkpoint.
POSITIVE = (5e-324, 1e300)


class TrustRegionQuasiNewton(Optimizer):
    """Quasi-Newton method whose step minimises the model inside a radius, and moves w if the loss falls enough.

    Conjugate gradients minimise the model. The step calls the closure first at the initial w, so g need not be filled
    on entry; the closure must use one minibatch throughout a step. Only an accepted step gives a pair, and the pair is
    stored if it passes the test of the update. The fifth failing pair in a row resets the matrix to the identity. A
    loss that is not finite rejects the step. `lr` is not used. Weight decay is an L2 penalty on the loss.

    vectors: "s0", "y0", ...: pairs in a ring of `history` slots. scalars: "count", number of pairs; "head", slot of the
    next pair; "radius"; "sigma"; "failures", failing pairs in a row; "failed_steps"; "products" with the matrix so far.

    UserError for history < 1 or a negative weight_decay; ValueError for a step without closure.
    """

    needs_closure = True
    rated = False
    settings = ("history", "weight_decay")
    indefinite = False

    def __init__(
        self, n: int, dtype: DTypeLike, *, history: int = 10, weight_decay: float = 0.0, ops: NumpyOps | None = None
    ) -> None:
        check_settings(history=history, weight_decay=weight_decay)
        super().__init__(n, dtype, names=tuple(f"{kind}{k}" for k in range(history) for kind in "sy"), ops=ops)
        self.history, self.weight_decay = history, float(weight_decay)
        self.scalars.update(count=0, head=0, radius=1.0, sigma=1.0, failures=0, failed_steps=0, products=0)
        self.ranges.update(count=(0, history), head=(0, history - 1), radius=POSITIVE, sigma=POSITIVE)
        self.work = tuple(self.ops.empty(n, self.dtype) for _ in range(6))
        self.start, self.start_g, self.x, self.r, self.p, self.q = self.work
        # The rows are the s by slot, then the y by slot; `gram` has their products with each other, `middle` is W. Both
        # follow from the vectors, so checkpoints do not hold them: `products_of` has the scalars of the state for which
        # they were computed.
        self.rows = [self.vectors[f"{kind}{k}"] for kind in "sy" for k in range(history)]
        self.gram, self.middle = np.zeros((2, 2 * history, 2 * history))
        self.products_of: tuple[float | int, ...] = ()

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        """Make one iteration; it leaves w (n,) at the accepted point, or as it was. See `Optimizer.step`."""
        if closure is None:
            raise ValueError("a trust region needs a closure that recomputes the loss and fills the gradient")
        self.check_shard(w, g)
        self._ensure_products(allsum)
        value = self._evaluate(w, g, allsum, closure)
        self.start[...] = w
        self.start_g[...] = g
        region = TrustRegion(float(self.scalars["radius"]))
        direction = truncated_cg(
            self.start_g, self.x, lambda p, q: self._product(p, q, allsum), lambda a: None, allsum,
            (self.r, self.p, self.q), ops=self.ops, radius=region.radius,
        )  # fmt: skip
        self.scalars["products"] += direction.iterations
        if not direction.iterations:
            self.scalars["failed_steps"] += 1
            return
        self.ops.combine(w, (1.0, w), (1.0, self.x))
        after = self._evaluate(w, g, allsum, closure)
        accepted = isfinite(value) and region.judge(
            value, after, -(direction.slope + direction.curvature / 2), direction.length
        )
        self.scalars["radius"] = region.radius
        if accepted:
            self.ops.combine(self.start_g, (-1.0, self.start_g), (1.0, g))
            self._remember(self.x, self.start_g, allsum)
        else:
            w[...] = self.start
            self.scalars["failed_steps"] += 1

    def _evaluate(self, w: np.ndarray, g: np.ndarray, allsum: AllSum, closure: Closure) -> float:
        value = closure()
        if self.weight_decay:
            self.ops.combine(g, (1.0, g), (self.weight_decay, w))
            value += 0.5 * self.weight_decay * self._products([(w, w)], allsum)[0]
        return value

    def _product(self, p: np.ndarray, q: np.ndarray, allsum: AllSum) -> None:
        """Compute q = B p."""
        terms = [(float(self.scalars["sigma"]), p)]
        if self.scalars["count"]:
            weights = self.middle @ np.array(self._products([(p, row) for row in self.rows], allsum))
            terms += zip(weights.tolist(), self.rows, strict=True)
        self.ops.combine(q, *terms)

    def _products(self, pairs: list[tuple[np.ndarray, np.ndarray]], allsum: AllSum) -> list[float]:
        """Return the global scalar products of pairs of shards, by one call of `allsum`."""
        sums: list[float] = allsum(self.ops.dots(pairs)).tolist()
        return sums

    def _state(self) -> tuple[float | int, ...]:
        return tuple(self.scalars[key] for key in ("count", "head", "sigma"))

    def _ensure_products(self, allsum: AllSum) -> None:
        """Compute `gram` and `middle` of the stored pairs if the state was restored; otherwise they are up to date."""
        if self.products_of == self._state():
            return
        if self.scalars["count"]:
            for gram, row in zip(self.gram, self.rows, strict=True):
                gram[:] = self._products([(row, other) for other in self.rows], allsum)
        self._settle(self.gram, float(self.scalars["sigma"]), int(self.scalars["head"]), int(self.scalars["count"]))

    def _settle(self, gram: np.ndarray, sigma: float, head: int, count: int) -> bool:
        """Use `gram` if its newest pair gives a sound matrix; return whether it does.

        gram: (2 history, 2 history) products of `count` pairs, the newest of which is in the slot before `head`.
        """
        ages = (np.arange(self.history) - head) % self.history
        stamps = np.where(ages >= self.history - count, ages, -1)
        middle, left, sound = recurse(gram[None], stamps[None], np.array([sigma]), np.array([self.indefinite]))
        if count and not (sound[0] and left[0, (head - 1) % self.history] >= 0):
            return False
        self.gram, self.middle = gram, middle[0]
        self.scalars.update(head=head, count=count, sigma=sigma)
        self.products_of = self._state()
        return True

    def _remember(self, s: np.ndarray, y: np.ndarray, allsum: AllSum) -> None:
        """Store a pair that passes the test of the update; reset the matrix after too many failing pairs in a row."""
        self._product(s, self.q, allsum)
        r = self.q
        self.ops.combine(r, (-1.0, r), (1.0, y))
        products = self._products(
            [
                (s, s),
                (s, y),
                (s, r),
                (y, y),
                (r, r),
                *((s, row) for row in self.rows),
                *((y, row) for row in self.rows),
            ],
            allsum,
        )
        ss, sy, sr, yy, rr = products[:5]
        if self.indefinite and rr <= np.finfo(self.dtype).eps ** (4 / 3) * yy:
            # The matrix fits the pair already: an update would only add rounding errors.
            return
        if self.indefinite:
            good = isfinite(ss + yy + rr) and abs(sr) > OMEGA * sqrt(ss * rr)
        else:
            good = isfinite(ss + yy + rr) and sy > FLAT * sqrt(ss * yy)
        if good and self._keep(s, y, (ss, sy, yy), np.reshape(products[5:], (2, -1))):
            self.scalars["failures"] = 0
            return
        self.scalars["failures"] += 1
        if self.scalars["failures"] > PATIENCE:
            for row in self.rows:
                row.fill(0)
            self._settle(np.zeros_like(self.gram), 1.0, 0, 0)
            self.scalars["failures"] = 0

    def _keep(self, s: np.ndarray, y: np.ndarray, own: tuple[float, float, float], others: np.ndarray) -> bool:
        """Store the pair s, y (n,) in slot "head" if the matrix stays sound; return whether it does.

        own: s^T s, s^T y, y^T y; others: (2, 2 history), products of s and of y with the rows, changed in place.
        """
        ss, sy, yy = own
        slot, m = int(self.scalars["head"]), self.history
        gram = self.gram.copy()
        others[0, [slot, m + slot]], others[1, [slot, m + slot]] = (ss, sy), (sy, yy)
        for at, values in ((slot, others[0]), (m + slot, others[1])):
            gram[at], gram[:, at] = values, values
        sigma = yy / sy if sy > FLAT * sqrt(ss * yy) else float(self.scalars["sigma"])
        if not self._settle(gram, sigma, (slot + 1) % m, min(m, int(self.scalars["count"]) + 1)):
            return False
        self.rows[slot][...] = s
        self.rows[m + slot][...] = y
        return True


class LSR1(TrustRegionQuasiNewton):
    """L-SR1 in a trust region (Nocedal and Wright, Numerical Optimization, 2nd ed., eq. 6.24 and algorithm 6.2)."""

    summary = "L-SR1 in a trust region"
    indefinite = True


class LBFGSTrustRegion(TrustRegionQuasiNewton):
    """L-BFGS in a trust region (Nocedal and Wright, Numerical Optimization, 2nd ed., procedure 7.6 for the matrix)."""

    summary = "L-BFGS in a trust region"
