"""Source of sparse samples that are in memory as compressed rows."""

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
    """Compressed rows in memory. Reads make dense rows, some at a time.

    path: the file that the rows come from; numbers: (n,), the number of each row in that file; None: 0..n-1.
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
        """Some rows, with the columns that have an entry in them and one column of zeros: all may be too many."""
        few = self.matrix.take(spread(self.n, count))
        used, columns = np.unique(few.columns, return_inverse=True)
        return Compressed(few.starts, columns.reshape(-1).astype(np.int32), few.values, len(used) + 1).dense()

    def taken(self, rows: Rows) -> Compressed:
        return self.matrix.take(rows)

    def place(self, row: int) -> str:
        return f"{self.path}: sample {row if self.numbers is None else int(self.numbers[row])}"

    def apart(self, rows: Rows) -> CompressedRows:
        """A source with copies of these rows only."""
        return CompressedRows(self.matrix.take(rows), self.path, rows if self.numbers is None else self.numbers[rows])
