"""The global norm of a sharded gradient, in float64 whatever the dtype of the shards."""

from __future__ import annotations

from math import isfinite, sqrt

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.optim.base import AllSum


def clip_by_global_norm(g: np.ndarray, max_norm: float, allsum: AllSum, ops: NumpyOps | None = None) -> float:
    """Scale the shards g (n,) in place so that their global norm is at most max_norm; returns the norm
    before.

    max_norm 0 only measures. A norm that is not finite is returned too, and g stays as it is: what to do
    about it is the caller's decision. (Pascanu, Mikolov, Bengio 2013, Algorithm 1.) UserError for a negative
    max_norm.
    """
    if not max_norm >= 0:
        raise UserError(f"--clip {max_norm}: expected 0 (no clipping) or a number above it")
    ops = ops or NumpyOps()
    norm = sqrt(float(allsum(np.array([ops.squared_norm(g)]))[0]))
    if norm > max_norm > 0 and isfinite(norm):
        factor = float(max_norm) / norm
        if factor < float(np.finfo(g.dtype).tiny):
            # Below the normal numbers a factor has lost digits: its root, applied twice, has all of them.
            factor = sqrt(factor)
            ops.scale(g, factor)
        ops.scale(g, factor)
    return norm
