"""Sparse samples in compressed sparse row (CSR) format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.errors import UserError

# Columns are int32.
MAX_FEATURES = (1 << 31) - 1
# Entries that are copied at a time; the index of each takes 8 bytes.
ENTRIES = 1 << 20


@dataclass(frozen=True, eq=False)
class Compressed:
    """Samples (n, features) as compressed rows: only entries that are not zero are stored, row by row.

    starts: (n + 1,) int64, ascending from 0 to the number of entries; row r has the entries starts[r] to
    starts[r + 1] - 1. columns: (entries,) int32 in 0..features-1, strictly increasing within a row. values: (entries,)
    float32 or float64.
    """

    starts: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int32]
    values: npt.NDArray[Any]
    features: int

    @property
    def n(self) -> int:
        """The number of rows."""
        return len(self.starts) - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of the three arrays."""
        return self.starts.nbytes + self.columns.nbytes + self.values.nbytes

    def row_of(self, entry: int) -> int:
        """The row that contains an entry."""
        return int(np.searchsorted(self.starts, entry, "right")) - 1

    def astype(self, dtype: npt.DTypeLike) -> Compressed:
        """The same samples with values of this dtype; a value beyond its range becomes infinite."""
        with np.errstate(over="ignore"):
            values = self.values.astype(dtype, copy=False)
        return Compressed(self.starts, self.columns, values, self.features)

    def take(self, rows: npt.NDArray[np.int64]) -> Compressed:
        """The `rows` (k,) int64 in 0..n-1, in their order: views if the rows are consecutive, else copies."""
        count = len(rows)
        if not count or (rows[-1] - rows[0] == count - 1 and (np.diff(rows) == 1).all()):
            first = int(rows[0]) if count else 0
            starts = self.starts[first : first + count + 1]
            entries = slice(int(starts[0]), int(starts[-1]))
            return Compressed(
                starts - starts[0] if starts[0] else starts, self.columns[entries], self.values[entries], self.features
            )
        lengths = self.starts[rows + 1] - self.starts[rows]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        columns, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], self.dtype)
        first = 0
        while first < count:
            stop = max(first + 1, int(np.searchsorted(starts, starts[first] + ENTRIES, "right")) - 1)
            part = slice(int(starts[first]), int(starts[stop]))
            shift = np.repeat(self.starts[rows[first:stop]] - starts[first:stop], lengths[first:stop])
            places = shift + np.arange(part.start, part.stop)
            columns[part], values[part] = self.columns[places], self.values[places]
            first = stop
        return Compressed(starts, columns, values, self.features)

    def some(self, features: npt.NDArray[np.int64]) -> Compressed:
        """All rows with the columns `features` (k,) only, ascending; the result numbers these columns from 0."""
        wanted = np.isin(self.columns, features)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(wanted)])[self.starts]
        columns = np.searchsorted(features, self.columns[wanted]).astype(np.int32)
        return Compressed(ends, columns, self.values[wanted], len(features))

    def dense(self) -> npt.NDArray[Any]:
        """All rows as a new array (n, features)."""
        out = np.zeros((self.n, self.features), self.dtype)
        out[np.repeat(np.arange(self.n), np.diff(self.starts)), self.columns] = self.values
        return out


def checked(
    where: str, starts: npt.NDArray[Any], columns: npt.NDArray[Any], values: npt.NDArray[Any], features: int
) -> Compressed:
    """Make compressed rows of arrays from a file. UserError, which names `where`, unless they fit `Compressed`.

    starts and columns may have any integer dtype. Integer values become float32 if that is exact, else float64. Rows
    whose columns are not in order are sorted.
    """
    if not 1 <= features <= MAX_FEATURES:
        raise UserError(f"{where}: {features:,} features; expected 1 to {MAX_FEATURES:,}: leave out those not used")
    for name, array, kinds in (("starts", starts, "iu"), ("columns", columns, "iu"), ("values", values, "iuf")):
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise UserError(
                f"{where}: the {name} of the rows are {array.dtype} of shape {array.shape}; expected a vector of "
                f"{'integers' if kinds == 'iu' else 'numbers'}: save a SciPy matrix's tocsr()"
            )
    if len(columns) != len(values):
        raise UserError(f"{where}: {len(columns):,} columns and {len(values):,} values; expected as many: save it anew")
    steps = np.diff(starts.astype(np.int64, copy=False))
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != len(values) or (steps < 0).any():
        raise UserError(
            f"{where}: the starts of {max(0, len(starts) - 1):,} rows with {len(values):,} entries; expected them to "
            "ascend from 0 to the number of entries: save a SciPy matrix's tocsr()"
        )
    starts = starts.astype(np.int64, copy=False)
    wrong = np.flatnonzero((columns < 0) | (columns >= features))
    if len(wrong):
        row = int(np.searchsorted(starts, wrong[0], "right")) - 1
        raise UserError(
            f"{where}: sample {row} has the column {columns[wrong[0]]}; expected 0 to {features - 1:,}, as there are "
            f"{features:,} features"
        )
    columns, values = columns.astype(np.int32, copy=False), _floats(values)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        row = int(np.searchsorted(starts, wrong[0], "right")) - 1
        raise UserError(f"{where}: sample {row} has values that are not finite numbers; correct or remove such samples")
    columns, values = _in_order(where, starts, columns, values)
    return Compressed(starts, columns, values, features)


def _floats(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if values.dtype.kind == "f":
        wide = values.dtype.itemsize > 4
        return values.astype(np.float64 if wide else np.float32, copy=False)
    exact = not len(values) or max(-int(values.min()), int(values.max())) <= 1 << 24
    return values.astype(np.float32 if exact else np.float64)


def _in_order(
    where: str, starts: npt.NDArray[np.int64], columns: npt.NDArray[np.int32], values: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """Sort the entries of each row by column; return columns and values. UserError if a row has a column twice."""
    inside = np.ones(max(0, len(columns) - 1), np.bool_)
    cuts = starts[1:-1]
    inside[cuts[(cuts > 0) & (cuts < len(columns))] - 1] = False
    if (inside & (columns[1:] < columns[:-1])).any():
        order = np.lexsort((columns, np.repeat(np.arange(len(starts) - 1), np.diff(starts))))
        columns, values = columns[order], values[order]
    twice = np.flatnonzero(inside & (columns[1:] == columns[:-1]))
    if len(twice):
        row = int(np.searchsorted(starts, twice[0], "right")) - 1
        raise UserError(
            f"{where}: sample {row} has the column {columns[twice[0]]} twice; add its values up: sum_duplicates() of a "
            "SciPy matrix"
        )
    return columns, values
