"""Unpacking of HDF5 chunks that gzip compressed, with a bound on the unpacked size, which HDF5 itself does not have."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from psmpi.files.fletcher import fletcher32
from psmpi.files.hdf5 import DEFLATE, FLETCHER, KNOWN, SHUFFLE, filters_of

if TYPE_CHECKING:
    import h5py

# Most bytes of rows that are read at a time.
PIECE = 16 << 20


def is_packed(dataset: h5py.Dataset) -> bool:
    """Whether gzip compresses a data set, with no other filters than shuffle and Fletcher-32."""
    # The bytes of objects are not in chunks.
    filters = filters_of(dataset) if dataset.chunks is not None and not dataset.dtype.hasobject else []
    return DEFLATE in filters and set(filters) <= set(KNOWN) and len(set(filters)) == len(filters)


class Unpacker:
    """Reader of a data set for which `is_packed` is True. OSError for a chunk with a wrong size or checksum."""

    def __init__(self, dataset: h5py.Dataset):
        self.dataset, self.filters = dataset, filters_of(dataset)
        self.shape, self.chunks, self.dtype = dataset.shape, dataset.chunks, dataset.dtype
        self.nbytes = prod(self.chunks) * self.dtype.itemsize

    def chunk(self, offset: tuple[int, ...]) -> npt.NDArray[Any]:
        """Unpack the chunk whose first element is at `offset`, in the shape of a chunk."""
        data: bytes
        mask, data = self.dataset.id.read_direct_chunk(offset)
        applied = [code for number, code in enumerate(self.filters) if not mask >> number & 1]
        for code in reversed(applied):
            if code == FLETCHER:
                data = self._checked(data, offset)
            elif code == DEFLATE:
                data = self._inflated(data, offset)
            elif code == SHUFFLE:
                data = self._unshuffled(data)
        if len(data) != self.nbytes:
            raise OSError(f"the chunk at {offset} has {len(data):,} bytes, and should have {self.nbytes:,}")
        values: npt.NDArray[Any] = np.frombuffer(data, self.dtype).reshape(self.chunks)
        return values

    def _checked(self, data: bytes, offset: tuple[int, ...]) -> bytes:
        if len(data) < 4 or _fletcher(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise OSError(f"the checksum of the chunk at {offset} is wrong")
        return data[:-4]

    def _inflated(self, data: bytes, offset: tuple[int, ...]) -> bytes:
        stream = zlib.decompressobj()
        # A checksum of 4 bytes may follow the values.
        most = self.nbytes + 4
        try:
            unpacked = stream.decompress(data, most + 1)
        except zlib.error as error:
            raise OSError(f"the chunk at {offset} cannot be unpacked: {error}") from None
        if len(unpacked) > most:
            raise OSError(f"the chunk at {offset} unpacks to more than its {self.nbytes:,} bytes")
        if not stream.eof:
            raise OSError(f"the chunk at {offset} cannot be unpacked: it ends early")
        return unpacked

    def _unshuffled(self, data: bytes) -> bytes:
        size = self.dtype.itemsize
        whole = len(data) // size * size
        return bytes(np.frombuffer(data[:whole], np.uint8).reshape(size, -1).T.tobytes() + data[whole:])

    def pieces(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield the ascending `rows` in pieces (i, values): values (k, ...) of rows[i : i + k].

        Each chunk is unpacked once, or once for each piece if its rows take more than `PIECE` bytes.
        """
        deep = self.chunks[0]
        most = max(1, PIECE // max(1, prod(self.shape[1:]) * self.dtype.itemsize))
        i = 0
        while i < len(rows):
            band = int(rows[i]) // deep
            j = min(int(np.searchsorted(rows, (band + 1) * deep)), i + most)
            yield i, self._band(band, rows[i:j] - band * deep)
            i = j

    def _band(self, band: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Rows of a band, which is the chunks with the same first row; rows: counted from that row."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        starts = [range(0, size, step) for size, step in zip(self.shape[1:], self.chunks[1:], strict=True)]
        for at in product(*starts):
            sizes = [min(step, size - a) for a, size, step in zip(at, self.shape[1:], self.chunks[1:], strict=True)]
            in_array = (slice(None), *(slice(a, a + size) for a, size in zip(at, sizes, strict=True)))
            in_chunk = (slice(None), *(slice(0, size) for size in sizes))
            out[in_array] = self.chunk((band * self.chunks[0], *at))[rows][in_chunk]
        return out

    def read(self) -> npt.NDArray[Any]:
        """Read the whole array."""
        out = np.empty(self.shape, self.dtype)
        for i, values in self.pieces(np.arange(self.shape[0], dtype=np.int64)):
            out[i : i + len(values)] = values
        return out


def _fletcher(data: bytes) -> int:
    """HDF5's Fletcher-32 checksum of bytes; an odd last byte is the upper half of a word."""
    return _short(data) if len(data) % 4 else fletcher32(np.frombuffer(data, "<u4"))


def _short(data: bytes) -> int:
    """As `_fletcher`, for bytes whose number is not a multiple of 4."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    total = int(words.sum())
    remaining = np.arange(len(words), 0, -1, dtype=np.uint64)
    weighted = int((words * remaining % np.uint64(65535)).sum())
    if not total:
        return 0
    return (weighted % 65535 or 65535) << 16 | (total % 65535 or 65535)
