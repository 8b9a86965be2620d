"""Products with sparse matrices in compressed rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Largest number of elements of products that are computed before they are summed.
TERMS = 1 << 18


@dataclass(frozen=True, eq=False)
class SparseIndex:
    """The pattern of a sparse matrix (rows, inputs), and the positions of its weights in a flat vector.

    By rows: starts (rows + 1,) int64 and columns (entries,) int32 of compressed rows; places (rows,) int64, the
    position of a row's first weight (the others follow); biases (rows,) int64, the position of a row's bias, or None.
    By columns: back_starts (inputs + 1,) int64; back_rows, back_places (entries,) int32, the row of an entry and the
    position of its weight.
    """

    inputs: int
    starts: np.ndarray
    columns: np.ndarray
    places: np.ndarray
    biases: np.ndarray | None
    back_starts: np.ndarray
    back_rows: np.ndarray
    back_places: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    @property
    def arrays(self) -> list[np.ndarray]:
        """All arrays of the index."""
        back = [self.back_starts, self.back_rows, self.back_places]
        return [self.starts, self.columns, self.places, *back, *([] if self.biases is None else [self.biases])]


class SparseProduct:
    """y = W x + b for one pattern of W, and its gradients.

    w, g: (weights,), a vector with the weights and biases, and a vector for their gradient, of which other elements are
    not written. x, dx: (inputs, b). y, dy: (rows, b). All arrays are contiguous and of one dtype. Sums follow the order
    of the entries.
    """

    def __init__(self, index: SparseIndex):
        self.index = index

    def arrays(self) -> list[np.ndarray]:
        """The buffers of the product besides the index, for the account of memory."""
        return []

    def forward(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """y[r] = w[biases[r]] + sum of w_k x[columns[k]] over the entries k of row r."""
        one = self.index
        weights = w[_entries(one.starts, one.places)]
        y[...] = 0 if one.biases is None else w[one.biases][:, None]
        _add_products(one.starts, weights, one.columns, x, y)

    def backward(
        self, w: np.ndarray, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, g: np.ndarray | None
    ) -> None:
        """dx[c] = sum of w_k dy[row_k] over the entries k of column c; g_k = <dy[row_k], x[columns[k]]>.

        The gradient of the bias of row r is the sum of dy[r]. dx, g: None if not wanted.
        """
        one = self.index
        if dx is not None:
            dx.fill(0)
            _add_products(one.back_starts, w[one.back_places], one.back_rows, dy, dx)
        if g is None:
            return
        if one.biases is not None:
            g[one.biases] = dy.sum(axis=1)
        step, entries = max(1, TERMS // max(1, x.shape[1])), _entries(one.starts, one.places)
        rows = np.repeat(np.arange(one.rows), np.diff(one.starts))
        for k in range(0, len(entries), step):
            some = slice(k, k + step)
            g[entries[some]] = np.einsum("kb,kb->k", dy[rows[some]], x[one.columns[some]])


def _entries(starts: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Positions (entries,) int64 of the weights of the entries."""
    entries: np.ndarray = np.arange(starts[-1]) + np.repeat(places - starts[:-1], np.diff(starts))
    return entries


def _add_products(starts: np.ndarray, weights: np.ndarray, columns: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """out[r] += sum of weights[k] x[columns[k]] over the entries k of row r, for some rows at a time."""
    rows = np.flatnonzero(np.diff(starts))
    first, most = 0, max(1, TERMS // max(1, x.shape[1]))
    while first < len(rows):
        begin = starts[rows[first]]
        # At least one row.
        last = max(first + 1, int(np.searchsorted(starts[rows + 1], begin + most, side="right")))
        some, end = rows[first:last], starts[rows[last - 1] + 1]
        terms = weights[begin:end, None] * x[columns[begin:end]]
        out[some] += np.add.reduceat(terms, starts[some] - begin, axis=0)
        first = last
