"""Sources of samples: in memory, in a file of fixed-size records, or in a compressed stream.

A source has its number of rows `n` and the native `dtype` of its values. It keeps a path and a layout but no open file,
so it can be copied, pickled and read by several processes at once.
"""

from __future__ import annotations

import gzip
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from psmpi.data.compressed import Compressed
from psmpi.data.files import fill, reading, rows_per_chunk
from psmpi.errors import UserError

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

# Bytes of rows in memory at a time when an array in Fortran order is read in pieces.
COLUMN_BYTES = 64 << 20


class RowSource(Protocol):
    """The source from which a Split reads its samples."""

    @property
    def n(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def card(self) -> bytes | None:
        """Text that all values follow from if they are generated when they are read; None for stored values."""

    def read_into(self, rows: Rows, where: Rows, out: Array) -> None:
        """Store row `rows[i]` in `out[where[i]]`; `rows` ascend and may repeat, `out` is (k, features)."""

    def pieces(self, rows: Rows, features: int) -> Iterator[tuple[int, Array]]:
        """Yield the ascending `rows` in pieces (i, values), in one pass: values (k, features) of rows[i : i + k].

        Values are valid until the next piece.
        """

    def glance(self, count: int) -> Array:
        """Up to `count` rows, (k, features), that can be read quickly; checksums need not be compared."""

    def taken(self, rows: Rows) -> Compressed | None:
        """The rows (k,) as compressed rows; None from a source of dense rows."""

    def place(self, row: int) -> str:
        """Text that names a row for people: its file, array and number, such as "a.npz, x_test: sample 3"."""


class InPieces(ABC):
    """Base class of sources that read rows in pieces; `read_into` stores the pieces."""

    @property
    def card(self) -> bytes | None:
        """See RowSource; None, since values are stored."""
        return None

    @abstractmethod
    def pieces(self, rows: Rows, features: int) -> Iterator[tuple[int, Array]]:
        """See RowSource."""

    def read_into(self, rows: Rows, where: Rows, out: Array) -> None:
        """See RowSource."""
        for i, values in self.pieces(rows, out.shape[1]):
            out[where[i : i + len(values)]] = values
            # Release the piece before the next one is made.
            del values

    def taken(self, rows: Rows) -> Compressed | None:
        """See RowSource; None, since rows are dense."""
        return None

    def place(self, row: int) -> str:
        """See RowSource; names the source's path, if it has one."""
        return f"{getattr(self, 'path', 'the data set')}: sample {row}"


def some_rows(source: RowSource, features: int, count: int) -> Array:
    """Read about `count` rows of a source, chosen by `spread`: (k, features)."""
    rows = spread(source.n, count)
    out = np.empty((len(rows), features), source.dtype)
    source.read_into(rows, np.arange(len(rows), dtype=np.int64), out)
    return out


def spread(n: int, count: int) -> Rows:
    """Numbers of about `count` of n rows, in four runs that are far apart, ascending."""
    each = -(-count // 4)
    starts = np.linspace(0, max(0, n - each), 4).astype(np.int64)
    return np.unique(np.minimum(starts[:, None] + np.arange(each), n - 1))


def windows(rows: Rows, width: int) -> Iterator[tuple[int, int]]:
    """Cut ascending `rows` into runs [i, j) that each span at most `width` consecutive row numbers."""
    i = 0
    while i < len(rows):
        j = int(np.searchsorted(rows, rows[i] + width))
        yield i, j
        i = j


@dataclass(frozen=True, eq=False)
class ArrayRows(InPieces):
    """Rows of an array (n, features) in memory."""

    values: Array

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    def pieces(self, rows: Rows, features: int) -> Iterator[tuple[int, Array]]:
        step = rows_per_chunk(features * self.dtype.itemsize)
        for i in range(0, len(rows), step):
            yield i, self.values[rows[i : i + step]]

    def glance(self, count: int) -> Array:
        return some_rows(self, self.values.shape[1], count)


@dataclass(frozen=True, eq=False)
class FileRows(InPieces):
    """Records in a plain file: `offset` bytes, then n records of `skip` bytes and `features` values `stored`."""

    path: Path
    offset: int
    n: int
    features: int
    stored: np.dtype[Any]
    skip: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        native: np.dtype[Any] = self.stored.newbyteorder("=")
        return native

    @property
    def record_bytes(self) -> int:
        return self.skip + self.features * self.stored.itemsize

    def _map(self, first: int, last: int) -> Array:
        """Records first..last as bytes, (last - first + 1, record_bytes)."""
        size = self.record_bytes
        shape = (last - first + 1, size)
        with reading(self.path):
            end = self.offset + (last + 1) * size
            # The file may have shrunk since it was opened, and access to a page beyond its end kills the process.
            if self.path.stat().st_size < end:
                raise EOFError(f"it ends before byte {end}")
            return np.memmap(self.path, np.uint8, "r", self.offset + first * size, shape)

    def pieces(self, rows: Rows, features: int) -> Iterator[tuple[int, Array]]:
        # A new map for each window, since pages count as memory of the process as long as their map exists.
        for i, j in windows(rows, rows_per_chunk(self.record_bytes)):
            records = self._map(int(rows[i]), int(rows[j - 1]))[rows[i:j] - rows[i]]
            yield i, np.ascontiguousarray(records[:, self.skip :]).view(self.stored)

    def glance(self, count: int) -> Array:
        return some_rows(self, self.features, count)

    def column(self, k: int) -> npt.NDArray[np.uint8]:
        """Byte `k` of every record, (n,) uint8."""
        out = np.empty(self.n, np.uint8)
        step = rows_per_chunk(self.record_bytes)
        for first in range(0, self.n, step):
            last = min(first + step, self.n) - 1
            out[first : last + 1] = self._map(first, last)[:, k]
        return out


@dataclass(frozen=True, eq=False)
class Concatenated(InPieces):
    """The rows of several sources of one dtype, one source after the other."""

    parts: Sequence[RowSource]

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.parts[0].dtype

    def pieces(self, rows: Rows, features: int) -> Iterator[tuple[int, Array]]:
        first = 0
        for part in self.parts:
            i, j = map(int, np.searchsorted(rows, (first, first + part.n)))
            if j > i:
                for k, values in part.pieces(rows[i:j] - first, features):
                    yield i + k, values
            first += part.n

    def glance(self, count: int) -> Array:
        return self.parts[0].glance(count)

    def place(self, row: int) -> str:
        for part in self.parts[:-1]:
            if row < part.n:
                return part.place(row)
            row -= part.n
        return self.parts[-1].place(row)


@dataclass(frozen=True, eq=False)
class StreamRows(InPieces):
    """Rows in a compressed stream: `offset` bytes, then `n` rows of `features` values of dtype `stored`.

    member: member of a zip file; None for a gzip file. columns: (features,), given if the array is in Fortran order:
    one run of n values for each feature, and the k-th run is feature columns[k].
    """

    path: Path
    member: str | None
    offset: int
    n: int
    features: int
    stored: np.dtype[Any]
    columns: npt.NDArray[np.int64] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        native: np.dtype[Any] = self.stored.newbyteorder("=")
        return native

    def read_into(self, rows: Rows, where: Rows, out: Array) -> None:
        if self.columns is None:
            super().read_into(rows, where, out)
            return
        with self._whole() as stream:
            run = np.empty(self.n, self.stored)
            for column in self.columns:
                self._exactly(stream, run)
                out[where, column] = run[rows]

    def pieces(self, rows: Rows, features: int) -> Iterator[tuple[int, Array]]:
        """See RowSource. An array in Fortran order is read once for each COLUMN_BYTES of the requested rows."""
        if self.columns is not None:
            step = max(1, COLUMN_BYTES // (features * self.dtype.itemsize))
            for i in range(0, len(rows), step):
                some = rows[i : i + step]
                values = np.empty((len(some), features), self.dtype)
                self.read_into(some, np.arange(len(some), dtype=np.int64), values)
                yield i, values
            return
        step = min(self.n, rows_per_chunk(features * self.stored.itemsize))
        chunk = np.empty((step, features), self.stored)
        with self._whole() as stream:
            for first in range(0, self.n, step):
                part = chunk[: self.n - first]
                self._exactly(stream, part)
                i, j = map(int, np.searchsorted(rows, (first, first + len(part))))
                if j > i:
                    yield i, part[rows[i:j] - first]

    def glance(self, count: int) -> Array:
        """The first rows; no rows of an array in Fortran order, which would have to be unpacked whole."""
        first = np.empty((0 if self.columns is not None else min(count, self.n), self.features), self.stored)
        if len(first):
            with self._stream() as stream:
                self._exactly(stream, np.empty(self.offset, np.uint8))
                self._exactly(stream, first)
        return first.astype(self.dtype)

    def place(self, row: int) -> str:
        array = f", {self.member.removesuffix('.npy')}" if self.member else ""
        return f"{self.path}{array}: sample {row}"

    @contextmanager
    def _stream(self) -> Iterator[BufferedIOBase]:
        """Open the unpacked stream at its first byte."""
        with reading(self.path):
            if self.member is None:
                with gzip.open(self.path, "rb") as stream:
                    yield stream
            else:
                with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as member:
                    yield cast(BufferedIOBase, member)

    @contextmanager
    def _whole(self) -> Iterator[BufferedIOBase]:
        """Open the unpacked stream at `offset`; a block has to read all bytes of the array."""
        with self._stream() as stream:
            self._exactly(stream, np.empty(self.offset, np.uint8))
            yield stream
            # gzip and zip compare their checksums only at the end of the stream, so all of it is read.
            if stream.read(1):
                raise UserError(f"{self.path}: there are more bytes than the header announces; fetch the file again")

    def _exactly(self, stream: BufferedIOBase, part: Array) -> None:
        got = fill(stream, memoryview(cast(Any, part.reshape(-1).view(np.uint8))))
        if got != part.nbytes:
            raise EOFError(f"the data end {part.nbytes - got} or more bytes early")


@dataclass(eq=False)
class CheckedRows(InPieces):
    """Rows of an uncompressed member of a zip file, whose checksum the first read compares.

    The first read goes through the whole member as a stream; later ones read the requested rows from the file.
    """

    stream: StreamRows
    file: FileRows
    checked: bool = False

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def n(self) -> int:
        return self.file.n

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.file.dtype

    def pieces(self, rows: Rows, features: int) -> Iterator[tuple[int, Array]]:
        source: RowSource = self.file if self.checked else self.stream
        yield from source.pieces(rows, features)
        self.checked = True

    def glance(self, count: int) -> Array:
        return self.file.glance(count)

    def place(self, row: int) -> str:
        return self.stream.place(row)
