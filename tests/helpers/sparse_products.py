"""Patterns with rows and columns that have nothing, and weights whose rows lie in any order."""

import numpy as np
from scipy import sparse

from psmpi.backend import SparseIndex
from psmpi.layout import Pattern


def some_pattern(rows, inputs, density, seed=0):
    """A pattern with rows and columns that have nothing."""
    there = np.random.default_rng(seed).random((rows, inputs)) < density
    there[rows // 2], there[:, inputs // 3], there[0, 0] = False, False, True
    matrix = sparse.csr_array(there)
    return Pattern.of(matrix.indptr, matrix.indices, inputs)


def index_of(pattern, rng, bias):
    """The index of weights whose rows lie in any order, and the size of their vector."""
    order = rng.permutation(pattern.rows)
    places = np.empty(pattern.rows, np.int64)
    # Three numbers that are of nothing before each row.
    places[order] = np.cumsum(pattern.fan_in[order] + 3) - pattern.fan_in[order]
    end = int((places + pattern.fan_in).max())
    biases = end + rng.permutation(pattern.rows) if bias else None
    back = pattern.transposed
    back_places = (places - pattern.starts[:-1])[back.rows] + back.entries
    one = SparseIndex(
        pattern.inputs, pattern.starts, pattern.columns, places, biases, back.starts, back.rows,
        back_places.astype(np.int32),
    )  # fmt: skip
    return one, end + pattern.rows * bias
