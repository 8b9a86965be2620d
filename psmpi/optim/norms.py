"""Global norm of a sharded gradient, in float64 for any dtype of the shards."""

from __future__ import annotations

from math import isfinite, sqrt

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.optim.base import AllSum


def clip_by_global_norm(g: np.ndarray, max_norm: float, allsum: AllSum, ops: NumpyOps | None = None) -> float:
    """Scale the shards g (n,) in place to a global norm of at most max_norm, and return the norm before scaling.

    max_norm 0 only measures. If the norm is not finite, g stays as it is and the caller decides (Pascanu, Mikolov,
    Bengio 2013, Algorithm 1). UserError for a negative max_norm.
    """
    if not max_norm >= 0:
        raise UserError(f"--clip {max_norm}: expected 0 (no clipping) or a number above it")
    ops = ops or NumpyOps()
    norm = sqrt(float(allsum(np.array([ops.squared_norm(g)]))[0]))
    if norm > max_norm > 0 and isfinite(norm):
        factor = float(max_norm) / norm
        if factor < float(np.finfo(g.dtype).tiny):
            # A subnormal factor has lost digits. Its square root has all digits and is applied twice.
            factor = sqrt(factor)
            ops.scale(g, factor)
        ops.scale(g, factor)
    return norm
