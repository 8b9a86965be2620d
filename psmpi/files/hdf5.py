"""The objects of an HDF5 file that may be read: those in the file itself, found by its own names.

External links, external storage and virtual data sets make HDF5 open other files, whose names the file has; a digest of
the file says nothing of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import h5py

# Filters by their registered numbers whose results have a bound that is known before: shuffle and Fletcher-32 change no
# sizes, and what gzip packs `psmpi.files.packed` unpacks.
DEFLATE, SHUFFLE, FLETCHER = 1, 2, 3
KNOWN = (SHUFFLE, DEFLATE, FLETCHER)


class ForeignError(Exception):
    """A part of a file that is not as it should be; the text goes on after its name: "is a link to another file"."""


def is_hard(group: h5py.Group, name: str | bytes) -> bool:
    """Whether a name in a group is that of an object in this file, and no link to another name or file.

    name: bytes where it is not UTF-8, as h5py has it.
    """
    found = group.id.links.get_info(name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name)
    return bool(found.type == import_module("h5py").h5l.TYPE_HARD)


def check_own(dataset: h5py.Dataset) -> None:
    """Raise ForeignError for values that lie in other files."""
    if dataset.external:
        raise ForeignError(f"lies in another file, {dataset.external[0][0]}")
    if dataset.is_virtual:
        raise ForeignError(f"is put together from other files, as {dataset.virtual_sources()[0].file_name}")


def filters_of(dataset: h5py.Dataset) -> list[int]:
    """The numbers of the filters of a data set, in the order in which they were applied."""
    made = dataset.id.get_create_plist()
    return [made.get_filter(number)[0] for number in range(made.get_nfilters())]


class Chunk(NamedTuple):
    """A chunk of a data set: its first element, the filters that were left out (bits), and its bytes in the file."""

    offset: tuple[int, ...]
    mask: int
    size: int


def chunks_of(dataset: h5py.Dataset) -> Iterator[Chunk]:
    """The chunks of a data set that are in the file."""
    if hasattr(dataset.id, "chunk_iter"):
        found: list[Chunk] = []
        dataset.id.chunk_iter(lambda one: found.append(Chunk(one.chunk_offset, one.filter_mask, one.size)))
        yield from found
        return
    for number in range(dataset.id.get_num_chunks()):
        one = dataset.id.get_chunk_info(number)
        yield Chunk(one.chunk_offset, one.filter_mask, one.size)


def grid_of(dataset: h5py.Dataset) -> tuple[int, ...]:
    """The numbers of chunks along the axes of a data set in chunks."""
    return tuple(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))


def check_stored(dataset: h5py.Dataset, nbytes: int) -> None:
    """Raise ForeignError unless all values of a data set lie in its file, of `nbytes` bytes, each in one place."""
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
    # What is not packed is as long in the file, but for a checksum.
    if chunk > nbytes and not packed:
        raise ForeignError(f"has chunks of {chunk:,} bytes in a file of {nbytes:,}")
    wanted, grid = prod(grid_of(dataset)), zip(dataset.shape, dataset.chunks, strict=True)
    if wanted > nbytes or dataset.id.get_num_chunks() != wanted:
        raise ForeignError(f"has {dataset.id.get_num_chunks():,} of its {wanted:,} chunks")
    limits, places, total = [(size, step) for size, step in grid], set(), 0
    for one in chunks_of(dataset):
        inside = all(0 <= at < size and at % step == 0 for at, (size, step) in zip(one.offset, limits, strict=True))
        if not inside or one.offset in places or one.size < 1:
            raise ForeignError("has chunks in wrong places")
        places.add(one.offset)
        total += one.size
    if len(places) != wanted or total > nbytes:
        raise ForeignError(f"has {total:,} bytes of chunks in a file of {nbytes:,}")
