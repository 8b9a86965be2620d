"""Regularizers and constraint sets of the convex models of the rule `next`.

A regularizer r(x) is none, l2, lam |x|^2, or l1, lam |x|_1; a set is all vectors, a box |x_q| <= size, or a ball
|x| <= size. `nearest` minimises (t/2) |x - z|^2 + r(x) over a set, in closed form: for a box weight by weight; for a
ball first over all vectors and then by projection, which is exact for l2 and l1 (Yu, 2013).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.errors import UserError


@dataclass(frozen=True)
class Terms:
    """A regularizer with its factor lam, and a set, `kind` "", "box" or "ball", with its size."""

    regularizer: str = "none"
    lam: float = 0.0
    kind: str = ""
    size: float = 0.0

    def nearest(self, ops: NumpyOps, x: np.ndarray, t: float) -> None:
        """Replace x (n,) by the minimum of (t/2) |x' - x|^2 + r(x') over x' in the set."""
        if self.regularizer == "l2":
            ops.scale(x, t / (t + 2 * self.lam))
        elif self.regularizer == "l1":
            shrunk = ops.scratch("soft threshold", x.size, x.dtype)[: x.size]
            np.abs(x, out=shrunk)
            shrunk -= self.lam / t
            np.maximum(shrunk, 0, out=shrunk)
            np.copysign(shrunk, x, out=x)
        self.project(ops, x)

    def project(self, ops: NumpyOps, x: np.ndarray) -> None:
        """Replace x (n,) by the nearest vector of the set."""
        if self.kind == "box":
            np.minimum(x, self.size, out=x)
            np.maximum(x, -self.size, out=x)
        elif self.kind == "ball":
            norm = float(np.sqrt(ops.squared_norm(x)))
            if norm > self.size:
                ops.scale(x, self.size / norm)


def read_set(words: str) -> tuple[str, float]:
    """Return kind and size of none, box:SIZE or ball:SIZE; raise UserError for anything else."""
    kind, _, number = words.partition(":")
    if words == "none":
        return "", 0.0
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if kind not in ("box", "ball") or not (isfinite(size) and size > 0):
        raise UserError(
            f"--constraint {words}: expected none, box:B, each weight between -B and B, or ball:R, all weights "
            "together of length R at most, such as box:1 or ball:20"
        )
    return kind, size
