"""Search for test samples that are training samples too, by a fingerprint of each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from psmpi.data.compressed import Compressed
from psmpi.data.split import Dataset

Prints = npt.NDArray[np.uint64]

# Shares of test samples with a copy that need no warning: in collections with own test samples, and in samples that
# psmpi holds out.
FEW, HELD_OUT = 0.01, 0.1
# Samples with at most this many different values are taken for categories, whose rows can be equal by chance.
CATEGORIES = 16


def fingerprints(values: npt.NDArray[np.generic]) -> Prints:
    """Fingerprint of 64 bits of each row of values (k, features); equal rows have equal fingerprints. Returns (k,).

    It is the sum of a_i w_i modulo 2⁶⁴ over the row's words w_i of 32 bits, with random odd a_i: different rows have
    the same fingerprint with a probability of 2⁻³² at most.
    """
    rows = np.ascontiguousarray(values).view(np.uint8)
    if rows.shape[1] % 4:
        padded = np.zeros((len(rows), -(-rows.shape[1] // 4) * 4), np.uint8)
        padded[:, : rows.shape[1]] = rows
        rows = padded
    words = rows.view(np.uint32)
    factors = np.random.default_rng(0).integers(0, 2**64, words.shape[1], np.uint64) | np.uint64(1)
    sums: Prints = words.astype(np.uint64) @ factors
    return sums


def compressed_fingerprints(rows: Compressed) -> Prints:
    """Fingerprints (n,) of compressed rows, as `fingerprints`, with hashes of the columns (SplitMix64) as factors."""
    words = rows.values.view(np.uint32).reshape(len(rows.values), rows.dtype.itemsize // 4).astype(np.uint64)
    sums = np.zeros(len(rows.values) + 1, np.uint64)
    for k in range(words.shape[1]):
        factors = rows.columns.astype(np.uint64) * np.uint64(2) + np.uint64(k + 1)
        factors *= np.uint64(0x9E3779B97F4A7C15)
        for shift, odd in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            factors = (factors ^ (factors >> np.uint64(shift))) * np.uint64(odd)
        words[:, k] *= (factors ^ (factors >> np.uint64(31))) | np.uint64(1)
    np.cumsum(words.sum(axis=1, dtype=np.uint64), out=sums[1:])
    row_sums: Prints = sums[rows.starts[1:]] - sums[rows.starts[:-1]]
    return row_sums


def find_copies(dataset: Dataset, prints: Sequence[Prints], values: npt.NDArray[np.generic]) -> Iterator[str]:
    """Yield a phrase if more test samples are training samples too than chance and usual collections explain.

    prints: fingerprints of the training and of the test samples, of all or of some; values: some samples, whose number
    of different values tells categories.
    """
    train, test = prints
    # Samples of zeros, whose fingerprint is 0, have a warning in psmpi.data.doubts.
    distinct, counts = np.unique(train[train != 0], return_counts=True)
    again = float(counts[counts > 1].sum() / len(train))
    copied = int(np.isin(test, distinct).sum())
    share = copied / len(test)
    looked = "" if len(test) == dataset.test.n and len(train) == dataset.train.n else " looked at"
    if dataset.test.source is dataset.train.source:
        # Test samples drawn from x have a copy as often as the remaining ones do.
        if share > HELD_OUT and len(np.unique(values)) > CATEGORIES:
            yield (
                f"x has samples more than once, so that {copied:,} of the {len(test):,} test samples{looked}, which "
                "are drawn from it, are training samples too: save each sample once (np.unique(x, axis=0, "
                "return_index=True)[1]), or x_test and y_test of others"
            )
    # Rows that are equal by chance are so within x too.
    elif share > FEW + 2 * again or (share > 1 - FEW and again < 1 - HELD_OUT):
        yield (
            f"{copied:,} of the {len(test):,} test samples{looked} are training samples too, so that tests measure "
            "what is memorized: test on others, or take these out of the training samples"
        )
