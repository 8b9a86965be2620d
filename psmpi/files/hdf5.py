"""Checks that an object of an HDF5 file lies in the file itself, so that reading it is safe.

External links, external storage and virtual data sets make HDF5 open other files, which the file names; a digest of the
file does not cover them.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import h5py

# Registered numbers of filters with a known bound on the unpacked size: shuffle and Fletcher-32 keep sizes, and
# `psmpi.files.packed` unpacks gzip with a bound.
DEFLATE, SHUFFLE, FLETCHER = 1, 2, 3
KNOWN = (SHUFFLE, DEFLATE, FLETCHER)


class ForeignError(Exception):
    """An object of a file that is not allowed. The text continues the object's name: "is a link to another file"."""


def is_hard(group: h5py.Group, name: str | bytes) -> bool:
    """Whether a name in a group is an object of this file (a hard link), not a link to another name or file.

    name: str, or bytes if the name is not UTF-8, as in h5py.
    """
    link = group.id.links.get_info(name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name)
    return bool(link.type == import_module("h5py").h5l.TYPE_HARD)


def check_own(dataset: h5py.Dataset) -> None:
    """Raise ForeignError for a data set whose values are in other files."""
    if dataset.external:
        raise ForeignError(f"lies in another file, {dataset.external[0][0]}")
    if dataset.is_virtual:
        raise ForeignError(f"is put together from other files, as {dataset.virtual_sources()[0].file_name}")


def filters_of(dataset: h5py.Dataset) -> list[int]:
    """Numbers of the filters of a data set, in the order in which writing applies them."""
    plist = dataset.id.get_create_plist()
    return [plist.get_filter(number)[0] for number in range(plist.get_nfilters())]


class Chunk(NamedTuple):
    """A chunk of a data set: offset of its first element, mask of skipped filters (bits), size in bytes in the file."""

    offset: tuple[int, ...]
    mask: int
    size: int


def chunks_of(dataset: h5py.Dataset) -> Iterator[Chunk]:
    """Yield the chunks of a data set that exist in the file."""
    if hasattr(dataset.id, "chunk_iter"):
        chunks: list[Chunk] = []
        dataset.id.chunk_iter(lambda info: chunks.append(Chunk(info.chunk_offset, info.filter_mask, info.size)))
        yield from chunks
        return
    for number in range(dataset.id.get_num_chunks()):
        info = dataset.id.get_chunk_info(number)
        yield Chunk(info.chunk_offset, info.filter_mask, info.size)


def grid_of(dataset: h5py.Dataset) -> tuple[int, ...]:
    """Number of chunks along each axis of a chunked data set."""
    return tuple(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))


def check_stored(dataset: h5py.Dataset, nbytes: int) -> None:
    """Raise ForeignError unless all values of a data set are in its file, each once; nbytes: size of the file."""
    check_own(dataset)
    if not dataset.size:
        return
    if dataset.chunks is None:
        if dataset.id.get_storage_size() != dataset.nbytes or dataset.nbytes > nbytes:
            raise ForeignError(
                f"has {dataset.nbytes:,} bytes by its shape and {dataset.id.get_storage_size():,} stored"
            )
        return
    chunk = prod(dataset.chunks) * dataset.dtype.itemsize
    packed = DEFLATE in filters_of(dataset)
    # A chunk that is not compressed has the same size in the file, except for a checksum.
    if chunk > nbytes and not packed:
        raise ForeignError(f"has chunks of {chunk:,} bytes in a file of {nbytes:,}")
    wanted, grid = prod(grid_of(dataset)), zip(dataset.shape, dataset.chunks, strict=True)
    if wanted > nbytes or dataset.id.get_num_chunks() != wanted:
        raise ForeignError(f"has {dataset.id.get_num_chunks():,} of its {wanted:,} chunks")
    limits, places, total = [(size, step) for size, step in grid], set(), 0
    for stored in chunks_of(dataset):
        inside = all(0 <= at < size and at % step == 0 for at, (size, step) in zip(stored.offset, limits, strict=True))
        if not inside or stored.offset in places or stored.size < 1:
            raise ForeignError("has chunks in wrong places")
        places.add(stored.offset)
        total += stored.size
    if len(places) != wanted or total > nbytes:
        raise ForeignError(f"has {total:,} bytes of chunks in a file of {nbytes:,}")
