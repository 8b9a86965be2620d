"""Sparse patterns with empty rows and columns, and vectors that hold the rows of weights in random order."""

import numpy as np
from scipy import sparse

from psmpi.backend import SparseIndex
from psmpi.layout import Pattern


def some_pattern(rows, inputs, density, seed=0):
    """A random pattern with an empty row and an empty column."""
    mask = np.random.default_rng(seed).random((rows, inputs)) < density
    mask[rows // 2], mask[:, inputs // 3], mask[0, 0] = False, False, True
    matrix = sparse.csr_array(mask)
    return Pattern.of(matrix.indptr, matrix.indices, inputs)


def index_of(pattern, rng, bias):
    """Return the index of weights whose rows are in random order in a vector, and the size of the vector."""
    order = rng.permutation(pattern.rows)
    places = np.empty(pattern.rows, np.int64)
    # Leave three unused elements before each row.
    places[order] = np.cumsum(pattern.fan_in[order] + 3) - pattern.fan_in[order]
    end = int((places + pattern.fan_in).max())
    biases = end + rng.permutation(pattern.rows) if bias else None
    transposed = pattern.transposed
    transposed_places = (places - pattern.starts[:-1])[transposed.rows] + transposed.entries
    index = SparseIndex(
        pattern.inputs, pattern.starts, pattern.columns, places, biases, transposed.starts, transposed.rows,
        transposed_places.astype(np.int32),
    )  # fmt: skip
    return index, end + pattern.rows * bias
