"""Limited-memory quasi-Newton operators of many element functions at once.

Every element e has its own B_e = sigma_e I + Z_e^T W_e Z_e. The rows of Z_e are the last pairs s and y, W_e is
a small symmetric matrix that follows from their scalar products: so a product with B_e reads each pair once, a new pair
changes no other vector, and nothing but the pairs is stored. W is that of the L-BFGS recursion (Nocedal and Wright,
Numerical Optimization, 2nd ed., procedure 7.6) or of the L-SR1 recursion (eq. 6.24 applied pair after pair), both from
B_0 = sigma I, carried out on coefficients with respect to the pairs.

The update rules PLBFGS, PLSR1 and PLSE are those of Raynaud, Orban, Bigeon, "PLSR1" (Cahiers du GERAD G-2023-41).
"""

from __future__ import annotations

from enum import IntEnum
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.optim.curvature.recursion import OMEGA, recurse
from psmpi.optim.curvature.registry import curvature_ops
from psmpi.optim.curvature.restriction import Restriction

Rule = Literal["plbfgs", "plsr1", "plse"]
RULES: tuple[Rule, ...] = ("plbfgs", "plsr1", "plse")
# What s^T y has to exceed, times ||s|| ||y||, to scale B_0 or to pass the relative curvature test.
FLAT = 1e-8
# Failures in a row that an element survives with its operator.
PATIENCE = 4
# Powell's damping in the two-sided form of the authors' operator.
DAMP_LOW, DAMP_HIGH = 0.99, 10.0


class Outcome(IntEnum):
    """The effect of a pair on its element."""

    SKIPPED = 0
    UPDATED = 1
    REJECTED = 2
    RESET = 3


class ElementOperators:
    """`count` operators of `size` variables each; smaller elements are filled up with zeros, which change nothing.

    Vectors are (count, size) of `dtype`, float32 or float64, where `ops` computes; scalars are float64, in host memory.
    `memory` pairs are kept of each. With `rescaled`, B_0 is y^T y / s^T y times the identity, of the newest pair with
    which that makes sense, else it is the identity. With `relative`, the curvature test of L-BFGS is
    s^T y > 1e-8 ||s|| ||y||, else s^T y > eps, the spacing of `dtype` at 1.
    UserError for an unknown rule and for a memory that is not positive.
    """

    def __init__(
        self,
        count: int,
        size: int,
        dtype: DTypeLike,
        rule: Rule,
        ops: NumpyOps,
        *,
        memory: int = 5,
        relative: bool = False,
        damping: bool = False,
        rescaled: bool = True,
    ) -> None:
        if rule not in RULES:
            raise UserError(f"{rule!r} is no element update: choose one of {', '.join(RULES)}")
        if memory < 1:
            raise UserError(f"--memory {memory}: expected 1 or more pairs to remember")
        self.count, self.size, self.dtype, self.ops = count, size, np.dtype(dtype), ops
        self.curvature = curvature_ops(ops)
        self.rule, self.memory, self.relative, self.damping = rule, memory, relative, damping
        self.rescaled = rescaled
        m = memory
        # Rows 0..m-1 of an element are its s, rows m..2m-1 its y, in slots.
        self.pairs = ops.zeros(count * 2 * m * size, self.dtype).reshape(count, 2 * m, size)
        self.gram = np.zeros((count, 2 * m, 2 * m))
        # What a product takes beside the pairs, also where it is computed.
        shapes = ((count, 2 * m, 2 * m), (count,), (count, 2 * m))
        self.small = [ops.mirror(ops.zeros(prod(shape), np.dtype(np.float64)).reshape(shape)) for shape in shapes]
        self.middle, self.sigma, self.coefficients = (mirror.host for mirror in self.small)
        # When the pair of a slot came; -1: the slot is empty.
        self.stamps = np.full((count, m), -1, np.int64)
        self.pushes = np.zeros(count, np.int64)
        self.middle.fill(0)
        self.sigma.fill(1)
        self.settled()
        self.failures = np.zeros(count, np.int64)
        self.indefinite = np.full(count, rule == "plsr1")

    def settled(self) -> None:
        """Bring middle and sigma, which were changed in host memory, to where products are computed."""
        for mirror in self.small[:2]:
            mirror.push()

    def state(self) -> dict[str, np.ndarray]:
        """The state to be remembered besides `pairs`, a row an element: its own arrays, to be filled from elsewhere.

        `settled` has to follow.
        """
        names = ("gram", "middle", "stamps", "pushes", "sigma", "failures")
        return {name: getattr(self, name) for name in names} | {"indefinite": self.indefinite.view(np.uint8)}

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All that it keeps, in host memory and where products are computed; some are slices of others."""
        host = (value for value in vars(self).values() if isinstance(value, np.ndarray) and value is not self.pairs)
        return (self.pairs, *host, *(mirror.array for mirror in self.small))

    def product(self, v: np.ndarray, out: np.ndarray) -> None:
        """out = B_e v_e for every element; v and out (count, size), not the same array."""
        middle, sigma, coefficients = (mirror.array for mirror in self.small)
        self.curvature.products(self.pairs, middle, sigma, coefficients, v, out)

    def restricted_product(self, elements: Restriction, p: np.ndarray, q: np.ndarray) -> None:
        """q = sum_e U_e^T B_e U_e p, vectors that `elements` restrict."""
        middle, sigma, coefficients = (mirror.array for mirror in self.small)
        self.curvature.restricted_products(elements, self.pairs, middle, sigma, coefficients, p, q)

    # What is not finite is rejected below, not warned of.
    @np.errstate(all="ignore")
    def push(self, s: np.ndarray, y: np.ndarray, seen: np.ndarray, work: np.ndarray | None = None) -> np.ndarray:
        """Give every element the pair of its step s and change of gradient y, (count, size) each; (count,) Outcome.

        work: (count, size), overwritten; and so is y, with damping.
        seen: (count,) bool, whether the minibatch had samples of the element: others are skipped, as is s = 0, and as
        are, for SR1, pairs that the matrix fits already. Numbers that are not finite are a pair that is rejected.
        """
        r = self.ops.empty(s.size, self.dtype).reshape(s.shape) if work is None else work
        self.product(s, r)
        self.small[2].fetch()
        self.small[2].wait()
        with_s = self.coefficients.copy()
        if self.damping:
            self._damp(s, y, r)
        flat = r.reshape(-1)
        self.ops.combine(flat, (-1.0, flat), (1.0, y.reshape(-1)))
        ss, sy, yy, sr, rr = (self.curvature.row_dots(a, b) for a, b in ((s, s), (s, y), (y, y), (s, r), (r, r)))
        finite = np.isfinite(ss + sy + yy + sr + rr)
        active = seen & ~(ss == 0)
        positive = finite & (sy > (FLAT * np.sqrt(ss * yy) if self.relative else np.finfo(self.dtype).eps))
        secant = finite & (abs(sr) > OMEGA * np.sqrt(ss * rr))
        if self.rule == "plbfgs":
            wanted, indefinite = positive, np.zeros(self.count, bool)
        elif self.rule == "plsr1":
            wanted, indefinite = secant, np.ones(self.count, bool)
        else:
            wanted, indefinite = positive | secant, ~positive
        # What an SR1 matrix says already to rounding is no failure, and an update would bring in that rounding.
        known = finite & (rr <= np.finfo(self.dtype).eps ** (4 / 3) * yy) & indefinite & (sy != 0)
        active &= ~known
        chosen = np.flatnonzero(active & wanted)
        outcome = np.where(active, Outcome.REJECTED, Outcome.SKIPPED)
        done = self._take(chosen, s, y, (ss, sy, yy), with_s[chosen], indefinite)
        outcome[done] = Outcome.UPDATED
        self.failures[done] = 0
        failed = outcome == Outcome.REJECTED
        self.failures[failed] += 1
        hopeless = failed & (self.failures > PATIENCE)
        if hopeless.any():
            self.reset(hopeless, s, y)
        outcome[hopeless] = Outcome.RESET
        self.settled()
        return outcome

    def reset(self, hopeless: np.ndarray, s: np.ndarray, y: np.ndarray) -> None:
        """B_e = I for the elements that are `hopeless` (count,) bool; s and y, of a push, are not kept."""
        self.stamps[hopeless] = -1
        self.sigma[hopeless] = 1.0
        self.failures[hopeless] = 0
        self.gram[hopeless] = 0
        self.middle[hopeless] = 0
        self.curvature.keep_pairs(self.pairs, np.full(self.count, -1), hopeless, s, y)

    def _take(
        self,
        chosen: np.ndarray,
        s: np.ndarray,
        y: np.ndarray,
        products: tuple[np.ndarray, np.ndarray, np.ndarray],
        with_s: np.ndarray,
        indefinite: np.ndarray,
    ) -> np.ndarray:
        """Store the pairs of the elements `chosen` where the operator they make is sound; these elements.

        products: s^T s, s^T y, y^T y of all elements; with_s (chosen, 2m): those of s and the pairs there are.
        """
        m, rows = self.memory, np.arange(len(chosen))
        ss, sy, yy = (values[chosen] for values in products)
        turned = self.indefinite[chosen] != indefinite[chosen]
        stamps = np.where(turned[:, None], -1, self.stamps[chosen])
        slot = stamps.argmin(axis=1)
        stamps[rows, slot] = self.pushes[chosen]
        # The products of the pairs as they will be: those with the new one, in place of its slot's.
        gram = np.where(turned[:, None, None], 0.0, self.gram[chosen])
        with_y = self.curvature.pair_dots(self.pairs, y)[chosen]
        with_s[turned], with_y[turned] = 0, 0
        with_s[rows, slot], with_s[rows, m + slot] = ss, sy
        with_y[rows, slot], with_y[rows, m + slot] = sy, yy
        for at, values in ((slot, with_s), (m + slot, with_y)):
            gram[rows, at] = values
            gram[rows, :, at] = values
        scaled = (sy > FLAT * np.sqrt(ss * yy)) & (yy > 0) & self.rescaled
        kept = np.where(turned, 1.0, self.sigma[chosen])
        sigma = np.where(scaled, yy / sy, kept)
        middle, stamps, sound = recurse(gram, stamps, sigma, indefinite[chosen])
        sound &= stamps[rows, slot] >= 0
        done: np.ndarray = chosen[sound]
        good = np.flatnonzero(sound)
        slots, fresh = np.full(self.count, -1), np.zeros(self.count, bool)
        slots[done] = slot[good]
        # A fresh operator has nothing of the old one.
        fresh[done] = turned[good]
        self.curvature.keep_pairs(self.pairs, slots, fresh, s, y)
        self.gram[done], self.middle[done], self.stamps[done] = gram[good], middle[good], stamps[good]
        self.sigma[done] = sigma[good]
        self.indefinite[done] = indefinite[done]
        self.pushes[done] += 1
        return done

    def _damp(self, s: np.ndarray, y: np.ndarray, bs: np.ndarray) -> None:
        """Move y towards B s where s^T y is far from s^T B s (Powell 1978, with a bound above as well)."""
        sy, sbs = self.curvature.row_dots(s, y), self.curvature.row_dots(s, bs)
        low = np.where(sy < (1 - DAMP_LOW) * sbs, DAMP_LOW * sbs / (sbs - sy), 1.0)
        theta = np.where(sy > (1 + DAMP_HIGH) * sbs, DAMP_HIGH * sbs / (sy - sbs), low)
        theta = np.where(np.isfinite(theta) & (sbs > 0), theta, 1.0).astype(self.dtype)
        self.curvature.mix_rows((1 - theta).astype(np.float64), bs, theta.astype(np.float64), y)
