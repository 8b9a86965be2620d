"""Middle matrices of limited-memory quasi-Newton operators, from the scalar products of their pairs.

L-BFGS follows Nocedal and Wright, Numerical Optimization, 2nd ed., procedure 7.6; L-SR1 follows their eq. 6.24, applied
pair after pair.
"""

from __future__ import annotations

import numpy as np

# An SR1 update needs |s^T r| to exceed this times ||s|| ||r||.
OMEGA = 1e-6


def recurse(
    gram: np.ndarray, stamps: np.ndarray, sigma: np.ndarray, indefinite: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return middle matrices W of operators whose pairs have the scalar products `gram`, both (count, 2m, 2m) float64.

    stamps (count, m): order of the pairs by slot, older pairs lower, -1 for an empty slot; sigma (count,):
    B_0 = sigma I; indefinite (count,) bool: L-SR1, else L-BFGS. Returns W, the stamps without the pairs that were
    dropped because their denominator is too small, and sound (count,) bool: whether the newest pair was kept and W is
    finite.
    """
    count, m = stamps.shape
    rows = np.arange(count)[:, None]
    # Slots by age, the oldest first and empty slots last. The arrays below are in this order.
    order = np.argsort(np.where(stamps < 0, np.iinfo(np.int64).max, stamps), axis=1, kind="stable")
    index = np.concatenate([order, m + order], axis=1)
    g = gram[rows[:, :, None], index[:, :, None], index[:, None, :]]
    used = np.take_along_axis(stamps, order, axis=1) >= 0
    newest = used.sum(axis=1) - 1
    vectors = np.zeros((count, m, 2 * m))
    weights = np.zeros((count, m))
    gains = np.zeros((count, m))
    # The new vector c is B s for L-BFGS and y - B s for L-SR1, so that older vectors enter it with opposite signs.
    sign = np.where(indefinite, -1.0, 1.0)[:, None]
    with np.errstate(all="ignore"):
        for k in range(m):
            c = np.zeros((count, 2 * m))
            c[:, k] = np.where(indefinite, -sigma, sigma)
            c[:, m + k] = indefinite
            # Products of s_k with the vectors of older pairs.
            along = np.einsum("eij,ej->ei", vectors[:, :k], g[:, :, k])
            c += sign * np.einsum("ei,eij->ej", along * weights[:, :k], vectors[:, :k])
            c[:, m : m + k] += g[:, m : m + k, k] * gains[:, :k]
            d = np.einsum("ej,ej->e", c, g[:, :, k])
            size = np.sqrt(np.maximum(np.einsum("ei,eij,ej->e", c, g, c), 0) * g[:, k, k])
            good = used[:, k] & np.where(indefinite, abs(d) > OMEGA * size, (d > 0) & (g[:, m + k, k] > 0))
            good &= np.isfinite(d)
            used[:, k] = good
            vectors[:, k] = np.where(good[:, None], c, 0.0)
            weights[:, k] = np.where(good, np.where(indefinite, 1.0, -1.0) / d, 0.0)
            gains[:, k] = np.where(good & ~indefinite, 1 / g[:, m + k, k], 0.0)
        w = np.einsum("ek,eki,ekj->eij", weights, vectors, vectors)
    diagonal = np.arange(m)
    w[:, m + diagonal, m + diagonal] += gains
    middle = np.zeros_like(w)
    middle[rows[:, :, None], index[:, :, None], index[:, None, :]] = w
    left = np.full_like(stamps, -1)
    np.put_along_axis(left, order, np.where(used, np.take_along_axis(stamps, order, axis=1), -1), axis=1)
    sound = used[np.arange(count), np.maximum(newest, 0)] & np.isfinite(w).all(axis=(1, 2))
    return middle, left, sound
