"""The global norm of a sharded gradient, in float64 whatever the dtype of the shards."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.optim.base import AllSum, chunks


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


def add_products(pairs: Sequence[tuple[np.ndarray, np.ndarray]], into: np.ndarray, scratch: np.ndarray) -> None:
    """Add the scalar products of pairs of shards to the first elements of `into` (k,) float64, in float64.

    All shards are (n,) of one dtype, float32 or float64; scratch: (2, min(n, CHUNK)) float64. Pairs that
    share their first array should follow each other: it is then converted, and brought to the cache, once a
    chunk.
    """
    for at in chunks(pairs[0][0].size):
        left, right = scratch[0, : at.stop - at.start], scratch[1, : at.stop - at.start]
        last: np.ndarray | None = None
        for k, (a, b) in enumerate(pairs):
            if a.dtype == np.float64:
                into[k] += np.dot(a[at], b[at])
                continue
            if a is not last:
                np.copyto(left, a[at])
                last = a
            np.copyto(right, b[at])
            into[k] += np.dot(left, right)
