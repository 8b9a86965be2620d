"""Limited-memory quasi-Newton operators of many element functions at once.

Every element e has an operator B_e = sigma_e I + Z_e^T W_e Z_e. The rows of Z_e are the last pairs s and y. W_e is a
small symmetric matrix, computed from the scalar products of the pairs. A product with B_e reads each pair once, a new
pair changes no other vector, and the pairs are the only stored vectors. W follows the L-BFGS recursion (Nocedal and
Wright, Numerical Optimization, 2nd ed., procedure 7.6) or the L-SR1 recursion (eq. 6.24 applied pair after pair), both
from B_0 = sigma I, carried out on coefficients with respect to the pairs.

The update rules PLBFGS, PLSR1 and PLSE are from Raynaud, Orban, Bigeon, "PLSR1" (Cahiers du GERAD G-2023-41).
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
# s^T y must exceed this times ||s|| ||y|| to scale B_0, or to pass the relative curvature test.
FLAT = 1e-8
# Consecutive rejected pairs after which an element still keeps its operator; one more resets it.
PATIENCE = 4
# Bounds of Powell's damping, in the two-sided form that the authors use.
DAMP_LOW, DAMP_HIGH = 0.99, 10.0


class Outcome(IntEnum):
    """Effect of a pair on the operator of its element."""

    SKIPPED = 0
    UPDATED = 1
    REJECTED = 2
    RESET = 3


class ElementOperators:
    """`count` operators of `size` variables each; smaller elements are padded with zeros, which change no result.

    Vectors are (count, size) of `dtype`, float32 or float64, arrays of `ops`; scalars are float64, in host memory.
    Each operator keeps its last `memory` pairs. With `rescaled`, B_0 is (y^T y / s^T y) I of the newest pair of
    sufficiently positive s^T y; otherwise B_0 is the identity. With `relative`, the curvature test of L-BFGS is
    s^T y > 1e-8 ||s|| ||y||; otherwise it is s^T y > eps, the spacing of `dtype` at 1. UserError for an unknown rule
    and for a memory that is not positive.
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
            raise UserError(f"element update {rule!r} is unknown: choose one of {', '.join(RULES)}")
        if memory < 1:
            raise UserError(f"--memory {memory}: expected 1 or more pairs to remember")
        self.count, self.size, self.dtype, self.ops = count, size, np.dtype(dtype), ops
        self.curvature = curvature_ops(ops)
        self.rule, self.memory, self.relative, self.damping = rule, memory, relative, damping
        self.rescaled = rescaled
        m = memory
        # Slot k of an element: s in row k, y in row m + k.
        self.pairs = ops.zeros(count * 2 * m * size, self.dtype).reshape(count, 2 * m, size)
        self.gram = np.zeros((count, 2 * m, 2 * m))
        # Operands of a product besides the pairs, each with a copy on the device of `ops`.
        shapes = ((count, 2 * m, 2 * m), (count,), (count, 2 * m))
        self.small = [ops.mirror(ops.zeros(prod(shape), np.dtype(np.float64)).reshape(shape)) for shape in shapes]
        self.middle, self.sigma, self.coefficients = (mirror.host for mirror in self.small)
        # Number of the push that filled each slot; -1: the slot is empty.
        self.stamps = np.full((count, m), -1, np.int64)
        self.pushes = np.zeros(count, np.int64)
        self.middle.fill(0)
        self.sigma.fill(1)
        self.settled()
        self.failures = np.zeros(count, np.int64)
        self.indefinite = np.full(count, rule == "plsr1")

    def settled(self) -> None:
        """Copy middle and sigma from host memory to the device of `ops`; call this after every change of them."""
        for mirror in self.small[:2]:
            mirror.push()

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays of the state besides `pairs`, by name, one row for each element.

        To restore a state, fill these arrays and call `settled`.
        """
        names = ("gram", "middle", "stamps", "pushes", "sigma", "failures")
        return {name: getattr(self, name) for name in names} | {"indefinite": self.indefinite.view(np.uint8)}

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All arrays of the operators, in host memory and on the device; some of them are slices of others."""
        host = (value for value in vars(self).values() if isinstance(value, np.ndarray) and value is not self.pairs)
        return (self.pairs, *host, *(mirror.array for mirror in self.small))

    def product(self, v: np.ndarray, out: np.ndarray) -> None:
        """Compute out_e = B_e v_e for every element; v and out (count, size), not the same array."""
        middle, sigma, coefficients = (mirror.array for mirror in self.small)
        self.curvature.products(self.pairs, middle, sigma, coefficients, v, out)

    def restricted_product(self, elements: Restriction, p: np.ndarray, q: np.ndarray) -> None:
        """Compute q = sum_e U_e^T B_e U_e p; p, q: vectors that `elements` restricts."""
        middle, sigma, coefficients = (mirror.array for mirror in self.small)
        self.curvature.restricted_products(elements, self.pairs, middle, sigma, coefficients, p, q)

    # No warnings of numbers that are not finite: the pair is rejected below.
    @np.errstate(all="ignore")
    def push(self, s: np.ndarray, y: np.ndarray, seen: np.ndarray, work: np.ndarray | None = None) -> np.ndarray:
        """Update each operator with the step s and the change of gradient y of its element; return (count,) Outcome.

        s, y: (count, size). work: (count, size) scratch; with damping, y is overwritten as well.
        seen: (count,) bool, whether the minibatch has samples of the element. A pair is skipped if its element is not
        seen, if s = 0, and, for SR1, if the matrix fits the pair already. A pair with numbers that are not finite is
        rejected.
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
        # An SR1 matrix that fits the pair to rounding is skipped without counting a failure: an update would only add
        # rounding errors to the matrix.
        fitted = finite & (rr <= np.finfo(self.dtype).eps ** (4 / 3) * yy) & indefinite & (sy != 0)
        active &= ~fitted
        chosen = np.flatnonzero(active & wanted)
        outcome = np.where(active, Outcome.REJECTED, Outcome.SKIPPED)
        stored = self._store(chosen, s, y, (ss, sy, yy), with_s[chosen], indefinite)
        outcome[stored] = Outcome.UPDATED
        self.failures[stored] = 0
        failed = outcome == Outcome.REJECTED
        self.failures[failed] += 1
        hopeless = failed & (self.failures > PATIENCE)
        if hopeless.any():
            self.reset(hopeless, s, y)
        outcome[hopeless] = Outcome.RESET
        self.settled()
        return outcome

    def reset(self, hopeless: np.ndarray, s: np.ndarray, y: np.ndarray) -> None:
        """Set B_e = I for the elements that are `hopeless`, (count,) bool; s, y (count, size) are not stored."""
        self.stamps[hopeless] = -1
        self.sigma[hopeless] = 1.0
        self.failures[hopeless] = 0
        self.gram[hopeless] = 0
        self.middle[hopeless] = 0
        self.curvature.keep_pairs(self.pairs, np.full(self.count, -1), hopeless, s, y)

    def _store(
        self,
        chosen: np.ndarray,
        s: np.ndarray,
        y: np.ndarray,
        products: tuple[np.ndarray, np.ndarray, np.ndarray],
        with_s: np.ndarray,
        indefinite: np.ndarray,
    ) -> np.ndarray:
        """Store the pairs of the elements `chosen` whose operator stays sound, and return these elements.

        products: s^T s, s^T y, y^T y of all elements; with_s (chosen, 2m): products of s with the stored pairs.
        """
        m, rows = self.memory, np.arange(len(chosen))
        ss, sy, yy = (values[chosen] for values in products)
        turned = self.indefinite[chosen] != indefinite[chosen]
        stamps = np.where(turned[:, None], -1, self.stamps[chosen])
        slot = stamps.argmin(axis=1)
        stamps[rows, slot] = self.pushes[chosen]
        # Products of the pairs after the update: the new pair replaces the pair of its slot.
        gram = np.where(turned[:, None, None], 0.0, self.gram[chosen])
        with_y = self.curvature.pair_dots(self.pairs, y)[chosen]
        with_s[turned], with_y[turned] = 0, 0
        with_s[rows, slot], with_s[rows, m + slot] = ss, sy
        with_y[rows, slot], with_y[rows, m + slot] = sy, yy
        for at, values in ((slot, with_s), (m + slot, with_y)):
            gram[rows, at] = values
            gram[rows, :, at] = values
        scaled = (sy > FLAT * np.sqrt(ss * yy)) & (yy > 0) & self.rescaled
        unscaled = np.where(turned, 1.0, self.sigma[chosen])
        sigma = np.where(scaled, yy / sy, unscaled)
        middle, stamps, sound = recurse(gram, stamps, sigma, indefinite[chosen])
        sound &= stamps[rows, slot] >= 0
        stored: np.ndarray = chosen[sound]
        good = np.flatnonzero(sound)
        slots, fresh = np.full(self.count, -1), np.zeros(self.count, bool)
        slots[stored] = slot[good]
        # An operator that changes between L-BFGS and L-SR1 drops its old pairs.
        fresh[stored] = turned[good]
        self.curvature.keep_pairs(self.pairs, slots, fresh, s, y)
        self.gram[stored], self.middle[stored], self.stamps[stored] = gram[good], middle[good], stamps[good]
        self.sigma[stored] = sigma[good]
        self.indefinite[stored] = indefinite[stored]
        self.pushes[stored] += 1
        return stored

    def _damp(self, s: np.ndarray, y: np.ndarray, bs: np.ndarray) -> None:
        """Move y towards B s if s^T y is far below or far above s^T B s (Powell 1978, with an upper bound as well)."""
        sy, sbs = self.curvature.row_dots(s, y), self.curvature.row_dots(s, bs)
        low = np.where(sy < (1 - DAMP_LOW) * sbs, DAMP_LOW * sbs / (sbs - sy), 1.0)
        theta = np.where(sy > (1 + DAMP_HIGH) * sbs, DAMP_HIGH * sbs / (sy - sbs), low)
        theta = np.where(np.isfinite(theta) & (sbs > 0), theta, 1.0).astype(self.dtype)
        self.curvature.mix_rows((1 - theta).astype(np.float64), bs, theta.astype(np.float64), y)
