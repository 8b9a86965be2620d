"""Checks that the values of an HDF5 array are there: HDF5 itself reads what never was written as zeros.

They look at headers and indices of chunks alone, and read no values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from psmpi.data.files import check_unpacked
from psmpi.errors import UserError

# Virtual arrays of virtual arrays, and so on: deeper ones are likely in a circle.
DEPTH = 8
# Filters by their registered numbers, for people; hdf5plugin has these.
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


def check_stored(path: Path, key: str, array: Any, depth: int = 0) -> None:
    """Raise UserError unless all values of the h5py data set `array`, the array `key` of `path`, can be read.

    Refused are arrays in a raw file beside the HDF5 file, filters that are not installed, chunks that were never
    written, and virtual arrays of which a source is missing, too short or itself not all there.
    """
    where = f"{path}: {key}"
    # Behind a link it lies in another file, which its own sources are beside.
    path = Path(array.file.filename)
    if array.external:
        raise UserError(
            f"{where} lies in another file, {array.external[0][0]}, which psmpi does not read; put the values into "
            f"the file itself: h5repack -l {key}:CONTI OLD NEW"
        )
    if array.is_virtual:
        _check_virtual(path, key, array, depth)
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
    wanted = prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True))
    written = array.id.get_num_chunks()
    if written < wanted:
        raise UserError(
            f"{where} is not all there: {written:,} of {wanted:,} chunks were written, and the others would be read as "
            f"zeros; write the file anew to its end, or save the samples that are there"
        )
    check_unpacked(where, array.id.get_storage_size(), array.nbytes, "save it without compression")


def _check_filters(where: str, array: Any) -> None:
    h5z, made = import_module("h5py").h5z, array.id.get_create_plist()
    for number in range(made.get_nfilters()):
        code, _, _, name = made.get_filter(number)
        if h5z.filter_avail(code) or _skipped(array, number):
            continue
        # Importing this package is what makes its filters known to HDF5.
        with suppress(ImportError):
            import_module("hdf5plugin")
        if not h5z.filter_avail(code):
            called = FILTERS.get(code) or name.decode(errors="replace") or "of no name"
            raise UserError(
                f"{where} is packed by the HDF5 filter {code} ({called}), which is not installed here: pip install "
                "hdf5plugin, or where it can be read write the file anew with gzip (h5repack -f GZIP=4 OLD NEW)"
            )


def _skipped(array: Any, number: int) -> bool:
    """Whether the first chunk was written without the filter, as optional ones may be."""
    return bool(array.id.get_num_chunks() and array.id.get_chunk_info(0).filter_mask >> number & 1)


def _check_virtual(path: Path, key: str, array: Any, depth: int) -> None:
    h5py, where = import_module("h5py"), f"{path}: {key}"
    if depth == DEPTH:
        raise UserError(f"{where} is virtual, of virtual arrays without end; save the values themselves as {key}")
    sources = array.virtual_sources()
    names = {one.file_name: _find(path, one.file_name) for one in sources}
    missing = [name for name, found in names.items() if found is None]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{where} is put together from {len(names)} other files, and {missing[0]}{more} is not there, so that its "
            f"part would be read as zeros; bring it back beside {path.name}, or name its folder in HDF5_VDS_PREFIX"
        )
    covered = _covered(array, sources)
    if covered < array.size:
        raise UserError(
            f"{where} is put together from other arrays, which have {covered:,} of its {array.size:,} values, so that "
            f"the others would be read as zeros; make it anew of all its parts, or save the values themselves as {key}"
        )
    by_file: dict[str, dict[str, list[Any]]] = {}
    for one in sources:
        by_file.setdefault(one.file_name, {}).setdefault(one.dset_name, []).append(one)
    for name, arrays in by_file.items():
        found = names[name]
        assert found is not None
        with h5py.File(found, "r", locking="best-effort") as file:
            for inner, parts in arrays.items():
                source = file.get(inner)
                if not isinstance(source, h5py.Dataset):
                    raise UserError(
                        f"{where} is put together from other arrays, and {found} has no array {inner}, so that its "
                        f"part would be read as zeros; make {key} anew of all its parts"
                    )
                if not all(_long_enough(one, source) for one in parts):
                    raise UserError(
                        f"{where} takes more from {inner} in {found} than this has, with its shape {source.shape}, so "
                        f"that the rest would be read as zeros; make {key} anew of the parts that are there"
                    )
                check_stored(found, inner, source, depth + 1)


def _covered(array: Any, sources: Any) -> int:
    """How many values of a virtual array its sources have, those that two have once; along the first axis exactly."""
    points = sum(one.vspace.get_select_npoints() for one in sources)
    bounds = [one.vspace.get_select_bounds() for one in sources]
    # Blocks of whole rows, which is how files are put together.
    rows = [(first[0], last[0] + 1) for first, last in bounds]
    width = array.size // max(1, array.shape[0])
    if any(one.vspace.get_select_npoints() != (b - a) * width for one, (a, b) in zip(sources, rows, strict=True)):
        return int(points)
    count, at = 0, 0
    for a, b in sorted(rows):
        count += max(0, b - max(a, at))
        at = max(at, b)
    return int(count * width)


def _long_enough(one: Any, source: Any) -> bool:
    """Whether a source array has all that a virtual array maps of it."""
    h5s = import_module("h5py").h5s
    if one.src_space.get_select_type() == h5s.SEL_ALL:
        return bool(one.vspace.get_select_npoints() <= source.size)
    last = one.src_space.get_select_bounds()[1]
    return len(last) == source.ndim and all(end < size for end, size in zip(last, source.shape, strict=True))


def _find(path: Path, name: str) -> Path | None:
    """The source file called `name` of the virtual arrays in `path`, where HDF5 would find it; None where it is not."""
    if name == ".":
        return path
    if re.search(r"(?<!%)(%%)*%\d*b", name):
        raise UserError(
            f"{path}: its virtual arrays are of files named by the pattern {name}, whose number is not known; save the "
            "values themselves"
        )
    return next((place for place in _places(path, Path(name.replace("%%", "%"))) if place.is_file()), None)


def _places(path: Path, name: Path) -> Iterator[Path]:
    if name.is_absolute():
        yield name
        name = Path(name.name)
    for prefix in filter(None, os.environ.get("HDF5_VDS_PREFIX", "").split(":")):
        yield Path(prefix.replace("${ORIGIN}", str(path.absolute().parent))) / name
    yield path.parent / name
    yield name
    yield path.resolve().parent / name
