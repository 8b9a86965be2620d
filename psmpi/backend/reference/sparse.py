"""Products with sparse matrices in compressed rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Elements of the terms of sums that are made at a time.
TERMS = 1 << 18


@dataclass(frozen=True, eq=False)
class SparseIndex:
    """The places of the entries of a matrix (rows, inputs), and of their weights in a vector.

    starts (rows + 1,) int64, columns (entries,) int32: the entries of each row; places (rows,) int64: where the weights
    of a row begin; biases (rows,) int64: where its bias is, None where there are none. The entries by columns:
    back_starts (inputs + 1,) int64; back_rows, back_places (entries,) int32: the row of each, and where its weight is.
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
        """All of its arrays."""
        back = [self.back_starts, self.back_rows, self.back_places]
        return [self.starts, self.columns, self.places, *back, *([] if self.biases is None else [self.biases])]


class SparseProduct:
    """y = W x + b for one pattern of W, and its gradients.

    w, g (weights,): a vector that has the weights and the biases, and one for their gradient, in which nothing else is
    written; x, dx (inputs, b), y, dy (rows, b): contiguous, all of one dtype. Sums are made in the order of the
    entries.
    """

    def __init__(self, index: SparseIndex):
        self.index = index

    def arrays(self) -> list[np.ndarray]:
        """What it holds besides the index."""
        return []

    def forward(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """y[r] = w[biases[r]] + the sum over the entries k of row r of w_k x[columns[k]]."""
        one = self.index
        weights = w[_entries(one.starts, one.places)]
        y[...] = 0 if one.biases is None else w[one.biases][:, None]
        _add_products(one.starts, weights, one.columns, x, y)

    def backward(
        self, w: np.ndarray, x: np.ndarray, dy: np.ndarray, dx: np.ndarray | None, g: np.ndarray | None
    ) -> None:
        """dx[c] = the sum over the entries k of column c of w_k dy[row_k]; g_k = <dy[row_k], x[columns[k]]>.

        The gradient of a bias is the sum of dy[r]. dx, g: None where they are not wanted.
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
    """(entries,) int64: where the weight of each entry is."""
    entries: np.ndarray = np.arange(starts[-1]) + np.repeat(places - starts[:-1], np.diff(starts))
    return entries


def _add_products(starts: np.ndarray, weights: np.ndarray, columns: np.ndarray, x: np.ndarray, out: np.ndarray) -> None:
    """out[r] += the sum over the entries k of row r of weights[k] x[columns[k]], some rows at a time."""
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
