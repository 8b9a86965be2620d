"""Generated tasks with a known solution: sparse samples of two classes, and entries of a matrix of low rank."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from psmpi.data.compressed import Compressed
from psmpi.data.compressed_rows import CompressedRows
from psmpi.data.rows import ArrayRows
from psmpi.data.split import Split, frozen

# Samples of `sparse` for training and for testing, and entries of each sample.
SPARSE_SAMPLES, SPARSE_TESTS, SPARSE_ENTRIES = 8_000, 2_000, 10
# Entries of a row of `ratings` for training and for testing, rank of the matrix, standard deviation of the noise.
RATED, RATED_TESTS, RANK, NOISE = 40, 4, 5, 0.1
# The k-th most frequent feature, k from 0, is drawn with a probability proportional to 1 / (k + OFFSET).
OFFSET = 10
# Key of these random numbers, which separates them from others drawn from the same seed.
_TAG = 0x706C616E


def sparse(features: int, seed: int) -> tuple[Split, Split]:
    """Training and test samples with ten standard normal entries each, labelled by a planted weight vector.

    P(class 1) = sigmoid(w x) with standard normal w (features,). The frequent features have random numbers.
    """
    rng = _rng(seed, 0)
    w, numbers = rng.standard_normal(features), rng.permutation(features)
    train, test = (_sparse(n, w, numbers, rng) for n in (SPARSE_SAMPLES, SPARSE_TESTS))
    return train, test


def _sparse(n: int, w: npt.NDArray[np.float64], numbers: npt.NDArray[np.int64], rng: np.random.Generator) -> Split:
    columns = np.sort(numbers[distinct(n, SPARSE_ENTRIES, len(w), rng)], axis=1)
    values = rng.standard_normal(columns.shape).astype(np.float32)
    margins = (w[columns] * values).sum(axis=1)
    labels = (rng.random(n) < 1 / (1 + np.exp(-margins))).astype(np.int64)
    starts = np.arange(n + 1, dtype=np.int64) * SPARSE_ENTRIES
    rows = Compressed(starts, columns.astype(np.int32).ravel(), values.ravel(), len(w))
    return Split(frozen(labels), (len(w),), 1.0, CompressedRows(rows))


def ratings(rows: int, seed: int) -> tuple[Split, Split]:
    """Noisy entries of a matrix (rows, rows / 2) of rank 5; a sample is the tokens row and rows + column.

    The entries of U V' have variance 1; the noise has standard deviation 0.1. 40 entries of each row are for training,
    4 others for testing; columns differ much in their numbers of entries. x: (n, 1, 2) int32; values: (n, 1) float64.
    """
    rng, columns = _rng(seed, 1), rows // 2
    u, v = rng.standard_normal((rows, RANK)), rng.standard_normal((columns, RANK)) / np.sqrt(RANK)
    drawn = rng.permutation(columns)[distinct(rows, RATED + RATED_TESTS, columns, rng)]
    splits = []
    for part in (drawn[:, :RATED], drawn[:, RATED:]):
        order = rng.permutation(part.size)
        row, column = np.repeat(np.arange(rows), part.shape[1])[order], part.ravel()[order]
        values = (u[row] * v[column]).sum(axis=1) + NOISE * rng.standard_normal(len(row))
        x = np.stack([row, rows + column], axis=1).astype(np.int32)
        splits.append(Split(frozen(values[:, None]), (1, 2), 1.0, ArrayRows(x), vocabulary=rows + columns))
    return splits[0], splits[1]


def distinct(n: int, count: int, among: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw `count` distinct numbers below `among` for each of n rows: (n, count) int64.

    The number k has a probability proportional to 1 / (k + OFFSET); numbers that a row has already are drawn again.
    """
    sums = np.cumsum(1 / (np.arange(among) + OFFSET))
    numbers = np.empty((n, count), np.int64)
    again = np.ones((n, count), np.bool_)
    while again.any():
        drawn = np.searchsorted(sums, rng.random(np.count_nonzero(again)) * sums[-1], "right")
        numbers[again] = np.minimum(drawn, among - 1)
        # Keep the first of equal numbers, and draw the others again.
        order = np.argsort(numbers, axis=1, kind="stable")
        ordered = np.take_along_axis(numbers, order, axis=1)
        again = np.zeros((n, count), np.bool_)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return numbers


def _rng(seed: int, task: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([max(seed, 0), _TAG, task])))
