"""The middle matrices of limited-memory quasi-Newton operators, from the scalar products of their pairs.

That of L-BFGS is Nocedal and Wright, Numerical Optimization, 2nd ed., procedure 7.6, that of L-SR1 their eq. 6.24, pair
after pair.
"""

from __future__ import annotations

import numpy as np

# An SR1 pair is useful where |s^T r| is more than this times ||s|| ||r||.
OMEGA = 1e-6


def recurse(
    gram: np.ndarray, stamps: np.ndarray, sigma: np.ndarray, indefinite: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The middle matrices W (count, 2m, 2m) of operators whose pairs have the scalar products `gram` (count, 2m, 2m).

    stamps (count, m): age of the pairs by slot, -1 where there is none; sigma (count,): B_0 = sigma I; indefinite
    (count,) bool: L-SR1, else L-BFGS. Returns W, the stamps without the pairs that had to be dropped because their
    denominator is too small, and (count,) bool: whether the newest pair is still there and all numbers are finite.
    """
    count, m = stamps.shape
    rows = np.arange(count)[:, None]
    # Slots by age, the oldest first and empty ones last; all below is in this order.
    order = np.argsort(np.where(stamps < 0, np.iinfo(np.int64).max, stamps), axis=1, kind="stable")
    index = np.concatenate([order, m + order], axis=1)
    g = gram[rows[:, :, None], index[:, :, None], index[:, None, :]]
    used = np.take_along_axis(stamps, order, axis=1) >= 0
    newest = used.sum(axis=1) - 1
    vectors = np.zeros((count, m, 2 * m))
    weights = np.zeros((count, m))
    gains = np.zeros((count, m))
    # Of L-BFGS the old vectors are subtracted, and so are their weights; of L-SR1 neither.
    sign = np.where(indefinite, -1.0, 1.0)[:, None]
    with np.errstate(all="ignore"):
        for k in range(m):
            c = np.zeros((count, 2 * m))
            c[:, k] = np.where(indefinite, -sigma, sigma)
            c[:, m + k] = indefinite
            # Products of s_k with the y of older pairs, and with their a.
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
