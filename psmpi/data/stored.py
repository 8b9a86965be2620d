"""Checks that all values of an HDF5 array were written: HDF5 itself reads missing values as zeros.

The checks read headers and indices of chunks only, no values.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from psmpi.data.files import check_unpacked
from psmpi.data.virtual import check_virtual
from psmpi.errors import UserError
from psmpi.files.hdf5 import KNOWN, filters_of, grid_of

# Most levels of virtual arrays of virtual arrays; deeper ones are probably circular.
DEPTH = 8
# Names of the filters in hdf5plugin by their registered numbers.
FILTERS = {
    307: "bzip2",
    32000: "lzf",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32017: "sz",
    32018: "fcidecomp",
    32024: "sz3",
    32026: "blosc2",
}


def check_stored(path: Path, key: str, array: Any, external: bool = False, depth: int = 0) -> None:
    """Raise UserError unless all values of the h5py data set `array`, the array `key` of `path`, can be read.

    UserError for an array in a raw file outside the HDF5 file, for a virtual array unless `external` allows it and all
    of its sources exist and are long enough, for filters that are not installed, and for chunks that were never
    written. depth: number of virtual arrays that led to this one.
    """
    where = f"{path}: {key}"
    # An external link leads to another file; the sources of the array are looked up beside that file.
    path = Path(array.file.filename)
    if array.external:
        raise UserError(
            f"{where} lies in another file, {array.external[0][0]}, which psmpi does not read; put the values into "
            f"the file itself: h5repack -l {key}:CONTI OLD NEW"
        )
    if array.is_virtual:
        if not external:
            raise UserError(
                f"{where} is put together from other files, as {array.virtual_sources()[0].file_name}, which a file of "
                "a stranger could choose: if this one is yours, add --allow-external"
            )
        if depth == DEPTH:
            raise UserError(f"{where} is virtual, of virtual arrays without end; save the values themselves as {key}")
        check_virtual(path, key, array, partial(check_stored, external=True, depth=depth + 1))
        return
    _check_filters(where, array)
    if not array.size:
        return
    if array.chunks is None:
        if array.id.get_storage_size() == 0:
            raise UserError(
                f"{where} was made and never written, and would be read as zeros; write its values, or the file anew"
            )
        return
    wanted = prod(grid_of(array))
    written = array.id.get_num_chunks()
    if written < wanted:
        raise UserError(
            f"{where} is not all there: {written:,} of {wanted:,} chunks were written, and the others would be read as "
            f"zeros; write the file anew to its end, or save the samples that are there"
        )
    check_unpacked(where, array.id.get_storage_size(), array.nbytes, "save it without compression")


def is_unusual(array: Any) -> bool:
    """Whether an array has filters whose unpacked size psmpi cannot bound before it unpacks them."""
    return not set(filters_of(array)) <= set(KNOWN)


def _check_filters(where: str, array: Any) -> None:
    h5z, plist = import_module("h5py").h5z, array.id.get_create_plist()
    for number in range(plist.get_nfilters()):
        code, _, _, name = plist.get_filter(number)
        if h5z.filter_avail(code) or _skipped(array, number):
            continue
        # The import registers the package's filters with HDF5.
        with suppress(ImportError):
            import_module("hdf5plugin")
        if not h5z.filter_avail(code):
            called = FILTERS.get(code) or name.decode(errors="replace") or "of no name"
            raise UserError(
                f"{where} is packed by the HDF5 filter {code} ({called}), which is not installed here: pip install "
                "hdf5plugin, or where it can be read write the file anew with gzip (h5repack -f GZIP=4 OLD NEW)"
            )


def _skipped(array: Any, number: int) -> bool:
    """Whether the first chunk was written without filter `number`; HDF5 may skip optional filters."""
    return bool(array.id.get_num_chunks() and array.id.get_chunk_info(0).filter_mask >> number & 1)
