"""Sparsity of updates: Omega, Delta and rho of Niu et al., "Hogwild!" (2011), section 2.

An update is a hyperedge over the weights that it changes. Omega: the size of the largest hyperedge; Delta: the largest
share of all updates that change one weight; rho: the largest share of all updates that one update intersects.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Most updates of which rho takes the maximum; of more, a random sample.
SAMPLED = 200


class Sparsity(NamedTuple):
    """Omega, Delta and rho; sampled: the number of updates of which rho is the maximum, 0 for all."""

    omega: int
    delta: float
    rho: float
    sampled: int

    def __str__(self) -> str:
        suffix = f" of {self.sampled} updates drawn" if self.sampled else ""
        return f"Omega {self.omega:,}, Delta {self.delta:.3g}, rho {self.rho:.3g}{suffix}"


def of_rows(starts: np.ndarray, columns: np.ndarray, features: int, seed: int, most: int = SAMPLED) -> Sparsity:
    """Return the sparsity of samples in compressed rows, each of which updates its columns.

    starts: (n + 1,), columns: (entries,). seed: of the random sample of `most` updates for rho.
    """
    n, sizes = len(starts) - 1, np.diff(starts)
    counts = np.bincount(columns, minlength=features)
    order = np.argsort(columns, kind="stable")
    rows = np.repeat(np.arange(n), sizes)[order]
    begins = np.concatenate([[0], np.cumsum(counts)])
    chosen = np.arange(n) if n <= most else np.random.default_rng([seed, n]).choice(n, most, replace=False)
    met, meets = np.zeros(n, np.bool_), 0
    for sample in chosen:
        met.fill(False)
        for column in columns[starts[sample] : starts[sample + 1]]:
            met[rows[begins[column] : begins[column + 1]]] = True
        meets = max(meets, int(np.count_nonzero(met)))
    return Sparsity(int(sizes.max(initial=0)), counts.max(initial=0) / n, meets / n, 0 if n <= most else most)


def of_all(weights: int) -> Sparsity:
    """Return the sparsity of updates each of which may change all weights."""
    return Sparsity(weights, 1.0, 1.0, 0)
