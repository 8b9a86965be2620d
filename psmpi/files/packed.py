"""Chunks of HDF5 data sets that gzip packs, with a bound on what comes out: HDF5 itself unpacks however much it is."""

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

# Bytes of rows that are put together at a time.
PIECE = 16 << 20


def is_packed(dataset: h5py.Dataset) -> bool:
    """Whether gzip packs a data set, and no filter but shuffle and Fletcher-32 is beside it."""
    # Objects are no bytes in chunks.
    found = filters_of(dataset) if dataset.chunks is not None and not dataset.dtype.hasobject else []
    return DEFLATE in found and set(found) <= set(KNOWN) and len(set(found)) == len(found)


class Unpacker:
    """Reads a data set that `is_packed`. OSError for chunks that are not what they should be."""

    def __init__(self, dataset: h5py.Dataset):
        self.dataset, self.filters = dataset, filters_of(dataset)
        self.shape, self.chunks, self.dtype = dataset.shape, dataset.chunks, dataset.dtype
        self.nbytes = prod(self.chunks) * self.dtype.itemsize

    def chunk(self, offset: tuple[int, ...]) -> npt.NDArray[Any]:
        """The chunk that begins at an element, in the chunk's shape."""
        data: bytes
        mask, data = self.dataset.id.read_direct_chunk(offset)
        done = [code for number, code in enumerate(self.filters) if not mask >> number & 1]
        for code in reversed(done):
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
        # Behind the values there may be a checksum.
        most = self.nbytes + 4
        try:
            found = stream.decompress(data, most + 1)
        except zlib.error as error:
            raise OSError(f"the chunk at {offset} cannot be unpacked: {error}") from None
        if len(found) > most:
            raise OSError(f"the chunk at {offset} unpacks to more than its {self.nbytes:,} bytes")
        if not stream.eof:
            raise OSError(f"the chunk at {offset} cannot be unpacked: it ends early")
        return found

    def _unshuffled(self, data: bytes) -> bytes:
        size = self.dtype.itemsize
        whole = len(data) // size * size
        return bytes(np.frombuffer(data[:whole], np.uint8).reshape(size, -1).T.tobytes() + data[whole:])

    def pieces(self, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Ascending `rows` some at a time, (i, values (k, ...)) with rows[i : i + k]; each chunk is unpacked once.

        But for chunks of so many rows that these are more than `PIECE` bytes.
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
        """Rows of the chunks that lie beside one another, counted from their first."""
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        starts = [range(0, size, step) for size, step in zip(self.shape[1:], self.chunks[1:], strict=True)]
        for at in product(*starts):
            sizes = [min(step, size - a) for a, size, step in zip(at, self.shape[1:], self.chunks[1:], strict=True)]
            there = (slice(None), *(slice(a, a + size) for a, size in zip(at, sizes, strict=True)))
            here = (slice(None), *(slice(0, size) for size in sizes))
            out[there] = self.chunk((band * self.chunks[0], *at))[rows][here]
        return out

    def read(self) -> npt.NDArray[Any]:
        """The whole array."""
        out = np.empty(self.shape, self.dtype)
        for i, values in self.pieces(np.arange(self.shape[0], dtype=np.int64)):
            out[i : i + len(values)] = values
        return out


def _fletcher(data: bytes) -> int:
    """HDF5's Fletcher-32 checksum of bytes, of which it takes an odd one at the end as the upper half of a word."""
    rest = -len(data) % 4
    return fletcher32(np.frombuffer(data + bytes(rest), "<u4")) if not rest else _short(data)


def _short(data: bytes) -> int:
    """As `_fletcher`, of bytes that are no whole number of pairs of words."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    total = int(words.sum())
    left = np.arange(len(words), 0, -1, dtype=np.uint64)
    weighted = int((words * left % np.uint64(65535)).sum())
    if not total:
        return 0
    return (weighted % 65535 or 65535) << 16 | (total % 65535 or 65535)
