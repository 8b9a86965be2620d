"""Two-loop recursion of L-BFGS on coefficients, see `lbfgs`; all values are the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


# No warnings: extreme products may give coefficients that are not finite, and the caller checks the direction's slope.
@np.errstate(all="ignore")
def two_loop(
    sg: Sequence[float], yg: Sequence[float], sy: np.ndarray, yy: np.ndarray
) -> tuple[float, list[float], list[float]]:
    """Return coefficients of the L-BFGS direction -H g: of g, of the y (k,), of the s (k,); newest pair first.

    sg, yg (k,): s_i^T g and y_i^T g; sy, yy (k, k): s_i^T y_j and y_i^T y_j. H_0 = (s^T y / y^T y) I with s and y of
    the newest pair. Source: Nocedal and Wright, Numerical Optimization, 2nd ed., Algorithm 7.4.
    """
    count = len(sg)
    # First loop: -g - sum of alpha_j y_j.
    alpha = np.zeros(count)
    for i in range(count):
        alpha[i] = (-sg[i] - alpha[:i] @ sy[i, :i]) / sy[i, i]
    gamma = sy[0, 0] / yy[0, 0] if count else 1.0
    # Second loop: gamma times the result of the first loop, + sum of change_j s_j.
    change = np.zeros(count)
    for i in reversed(range(count)):
        beta = (gamma * (-yg[i] - alpha @ yy[i]) + change @ sy[:, i]) / sy[i, i]
        change[i] = alpha[i] - beta
    return -float(gamma), (-gamma * alpha).tolist(), change.tolist()
