"""The source of sparse samples that are in memory as compressed rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.compressed import Compressed
from psmpi.data.files import rows_per_chunk
from psmpi.data.rows import InPieces, Rows, spread


@dataclass(frozen=True, eq=False)
class CompressedRows(InPieces):
    """Rows of compressed samples, which are in memory; dense ones are made some at a time.

    path: the file that they are of; numbers: (n,) of each row in there, None: they are in this order.
    """

    matrix: Compressed
    path: str = "the data set"
    numbers: Rows | None = None

    @property
    def n(self) -> int:
        return self.matrix.n

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.matrix.dtype

    def pieces(self, rows: Rows, features: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        step = rows_per_chunk(features * self.dtype.itemsize)
        for i in range(0, len(rows), step):
            yield i, self.matrix.take(rows[i : i + step]).dense()

    def glance(self, count: int) -> npt.NDArray[Any]:
        """Of the columns those with an entry in these rows, and one without: all of them may be too many."""
        few = self.matrix.take(spread(self.n, count))
        used, columns = np.unique(few.columns, return_inverse=True)
        return Compressed(few.starts, columns.reshape(-1).astype(np.int32), few.values, len(used) + 1).dense()

    def taken(self, rows: Rows) -> Compressed:
        return self.matrix.take(rows)

    def place(self, row: int) -> str:
        return f"{self.path}: sample {row if self.numbers is None else int(self.numbers[row])}"

    def apart(self, rows: Rows) -> CompressedRows:
        """A source of these rows alone, which has copies of them."""
        return CompressedRows(self.matrix.take(rows), self.path, rows if self.numbers is None else self.numbers[rows])
