"""Chunks of a data set as HDF5 has them in a file: their bytes, and the Fletcher-32 checksum behind them.

HDF5 takes them as they are. It copies each twice otherwise, and holds Python's lock while it sums.
"""

from __future__ import annotations

import numpy as np

# Numbers of 32 bits in a row of the table that a chunk is summed as, and rows that are summed at a time.
COLUMNS, ROWS = 1024, 64
MODULUS = 65535
HALF = np.uint32(0xFFFF)


def fletcher32(data: np.ndarray) -> int:
    """HDF5's Fletcher-32 checksum of the bytes of `data`, (n,) little-endian uint32.

    Of 16-bit words w[0], ..., w[m-1], most significant byte first, it is the sum of all w[i] and, in the upper half,
    that of all (m - i) w[i], modulo 65535, where 65535 stands for 0 unless all are 0 (Fletcher, 1982). Modulo 65535 the
    other order of the bytes is a factor of 256.
    """
    rest = -len(data) % COLUMNS
    if rest:
        # Zeros in front change nothing.
        data = np.concatenate([np.zeros(rest, data.dtype), data])
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
    # m - i is what is left from the beginning of the row on, less the place in the row.
    left = np.arange(len(table), 0, -1, dtype=np.uint64) * np.uint64(2 * COLUMNS) % np.uint64(MODULUS)
    places = np.arange(2 * COLUMNS, dtype=np.uint64).reshape(COLUMNS, 2).T
    total = int(rows.sum())
    weighted = int((rows % MODULUS * left).sum()) - int((columns % MODULUS * places).sum())
    return _swapped(weighted) << 16 | _swapped(total) if total else 0


def _swapped(total: int) -> int:
    return total * 256 % MODULUS or MODULUS
