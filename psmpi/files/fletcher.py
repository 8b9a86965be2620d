"""HDF5's Fletcher-32 checksum, which follows the bytes of a chunk in a file.

Chunks with a checksum can be written to HDF5 directly. Otherwise HDF5 copies each chunk twice, and holds Python's
global lock while it computes the checksum.
"""

from __future__ import annotations

import numpy as np

# A chunk is summed as a table with COLUMNS numbers of 32 bits in a row, ROWS rows at a time.
COLUMNS, ROWS = 1024, 64
MODULUS = 65535
HALF = np.uint32(0xFFFF)


def fletcher32(data: np.ndarray) -> int:
    """HDF5's Fletcher-32 checksum of the bytes of `data`, (n,) little-endian uint32.

    For 16-bit words w[0], ..., w[m-1], most significant byte first, the lower half is the sum of w[i] and the upper
    half the sum of (m - i) w[i], both modulo 65535, with 65535 for 0 unless all words are 0 (Fletcher, 1982). Swapping
    the bytes of all words multiplies the sums by 256 modulo 65535.
    """
    padding = -len(data) % COLUMNS
    if padding:
        # Zeros in front do not change the sums.
        data = np.concatenate([np.zeros(padding, data.dtype), data])
    table = data.reshape(-1, COLUMNS)
    # Sums of the columns of lower and of upper halves, and of the rows of both.
    columns, rows = np.zeros((2, COLUMNS), np.uint64), np.empty(len(table), np.uint64)
    low, high = (np.empty((min(ROWS, len(table)), COLUMNS), np.uint32) for _ in range(2))
    for first in range(0, len(table), ROWS):
        some = table[first : first + ROWS]
        lower, upper = low[: len(some)], high[: len(some)]
        np.bitwise_and(some, HALF, out=lower)
        np.right_shift(some, np.uint32(16), out=upper)
        columns[0] += np.add.reduce(lower, axis=0, dtype=np.uint32)
        columns[1] += np.add.reduce(upper, axis=0, dtype=np.uint32)
        lower += upper
        rows[first : first + ROWS] = np.add.reduce(lower, axis=1, dtype=np.uint32)
    # m - i is the number of words from the beginning of the row on, minus the word's place in the row.
    left = np.arange(len(table), 0, -1, dtype=np.uint64) * np.uint64(2 * COLUMNS) % np.uint64(MODULUS)
    places = np.arange(2 * COLUMNS, dtype=np.uint64).reshape(COLUMNS, 2).T
    total = int(rows.sum())
    weighted = int((rows % MODULUS * left).sum()) - int((columns % MODULUS * places).sum())
    return _swapped(weighted) << 16 | _swapped(total) if total else 0


def _swapped(total: int) -> int:
    return total * 256 % MODULUS or MODULUS
