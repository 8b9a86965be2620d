"""Checks that all sources of a virtual HDF5 array, which is composed of other arrays, exist."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from psmpi.errors import UserError

# HDF5's value for a number of blocks, or length of a block, that grows with the array.
UNLIMITED = (1 << 64) - 1
# Placeholders in the names of files and arrays: %b for the number of a block, %% for a percent sign.
NUMBERED = re.compile("%(%|b)")


@dataclass(frozen=True)
class Piece:
    """A part of a virtual array: its source (file and array), number of values, and rows (first, stop).

    space: the selection of the source array, an object of h5py.
    """

    file: str
    array: str
    values: int
    rows: tuple[int, int]
    space: Any


def check_virtual(path: Path, key: str, array: Any, check: Callable[[Path, str, Any], None]) -> None:
    """Raise UserError unless the sources of the virtual `array`, the array `key` of `path`, have all of its values.

    check: function that raises UserError for a source array with missing values.
    """
    h5py, where = import_module("h5py"), f"{path}: {key}"
    pieces = [piece for source in array.virtual_sources() for piece in _pieces(source, array.shape)]
    names = {name: _find(path, name) for name in dict.fromkeys(piece.file for piece in pieces)}
    missing = [name for name, place in names.items() if place is None]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{where} is put together from {len(names)} other files, and {missing[0]}{more} is not there, so that its "
            f"part would be read as zeros; bring it back beside {path.name}, or name its folder in HDF5_VDS_PREFIX"
        )
    for source in array.virtual_sources():
        _check_numbers(path, key, source, array.shape)
    covered = _covered(array, pieces)
    if covered < array.size:
        raise UserError(
            f"{where} is put together from other arrays, which have {covered:,} of its {array.size:,} values, so that "
            f"the others would be read as zeros; make it anew of all its parts, or save the values themselves as {key}"
        )
    by_file: dict[str, dict[str, list[Piece]]] = {}
    for piece in pieces:
        by_file.setdefault(piece.file, {}).setdefault(piece.array, []).append(piece)
    for name, arrays in by_file.items():
        place = names[name]
        assert place is not None
        with h5py.File(place, "r", locking="best-effort") as file:
            for inner, parts in arrays.items():
                source = file.get(inner)
                if not isinstance(source, h5py.Dataset):
                    raise UserError(
                        f"{where} is put together from other arrays, and {place} has no array {inner}, so that its "
                        f"part would be read as zeros; make {key} anew of all its parts"
                    )
                if not all(_long_enough(part, source) for part in parts):
                    raise UserError(
                        f"{where} takes more from {inner} in {place} than this has, with its shape {source.shape}, so "
                        f"that the rest would be read as zeros; make {key} anew of the parts that are there"
                    )
                check(place, inner, source)


def _pieces(source: Any, shape: tuple[int, ...]) -> Iterator[Piece]:
    """Yield the parts that a source gives a virtual array of this shape: one, or one for each file of a pattern."""
    space, of = source.vspace, source.src_space
    file, array = (_numbered(name, None) for name in (source.file_name, source.dset_name))
    if not _unlimited(space):
        first, last = space.get_select_bounds()
        yield Piece(file, array, int(space.get_select_npoints()), (first[0], last[0] + 1), of)
        return
    starts, strides, counts, blocks = space.get_regular_hyperslab()
    if _unlimited(of):
        lengths, ends = _clipped(space, shape)
        yield Piece(file, array, prod(lengths), (starts[0], ends[0]), of)
        return
    axis = counts.index(UNLIMITED)
    # Without any block, check for the first file.
    for number in range(max(1, _blocks(space, shape))):
        file, array = (_numbered(name, number) for name in (source.file_name, source.dset_name))
        each = [1 if k == axis else count for k, count in enumerate(counts)]
        at = starts[0] + (number * strides[0] if axis == 0 else 0)
        rows = (at, at + (each[0] - 1) * strides[0] + blocks[0])
        yield Piece(file, array, prod(each) * prod(blocks), rows, of)


def _check_numbers(path: Path, key: str, source: Any, shape: tuple[int, ...]) -> None:
    """Raise UserError if more files of a pattern exist than are read: HDF5 stops at the first missing or bad file."""
    pattern = source.file_name
    if not _unlimited(source.vspace) or _unlimited(source.src_space) or _numbered(pattern, 0) == _numbered(pattern, 1):
        return
    first = _find(path, _numbered(pattern, 0))
    assert first is not None
    count = _blocks(source.vspace, shape)
    parts = re.findall("%%|%b|[^%]+|%", Path(pattern).name)
    text = "".join("([0-9]+)" if part == "%b" else re.escape(part.replace("%%", "%")) for part in parts)
    matches = [re.fullmatch(text, name) for name in os.listdir(first.parent)]
    later = [int(match[1]) for match in matches if match and match.groups() and int(match[1]) >= count]
    if count in later:
        raise UserError(
            f"{path}: {key} is put together from files named {pattern}, and ends before {_numbered(pattern, count)}, "
            f"which has no array {_numbered(source.dset_name, count)} that can be read; make that file anew, or take "
            "it away"
        )
    if later:
        raise UserError(
            f"{path}: {key} is put together from files named {pattern}, and ends before {_numbered(pattern, count)}, "
            f"which is missing, though {_numbered(pattern, max(later))} exists; bring it back beside {path.name}"
        )


def _unlimited(space: Any) -> bool:
    """Whether a selection grows with its array."""
    if space.get_select_type() != import_module("h5py").h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        return False
    _, _, counts, blocks = space.get_regular_hyperslab()
    return UNLIMITED in (*counts, *blocks)


def _blocks(space: Any, shape: tuple[int, ...]) -> int:
    """Number of blocks of an unlimited selection that begin inside an array of this shape."""
    starts, strides, counts, _ = space.get_regular_hyperslab()
    axis = counts.index(UNLIMITED)
    return max(0, -(-(int(shape[axis]) - int(starts[axis])) // int(strides[axis])))


def _clipped(space: Any, shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Size and stop along each axis of an unlimited selection, clipped to an array of this shape."""
    lengths, ends = [], []
    for size, start, stride, count, block in zip(shape, *space.get_regular_hyperslab(), strict=True):
        room = max(0, size - start)
        if block == UNLIMITED:
            length, end = room, start + room
        elif count == UNLIMITED:
            blocks = -(-room // stride)
            last = min(block, room - (blocks - 1) * stride) if blocks else 0
            length, end = max(0, blocks - 1) * block + last, start + max(0, blocks - 1) * stride + last
        else:
            length, end = count * block, start + (count - 1) * stride + block
        lengths.append(length)
        ends.append(end)
    return lengths, ends


def _covered(array: Any, pieces: list[Piece]) -> int:
    """Number of values of a virtual array that its sources have.

    Values of overlapping sources count once if all sources are blocks of whole rows, else as often as they occur.
    """
    # Virtual arrays are usually composed of blocks of whole rows.
    width = array.size // max(1, array.shape[0])
    if any(piece.values != (piece.rows[1] - piece.rows[0]) * width for piece in pieces):
        return sum(piece.values for piece in pieces)
    count, at = 0, 0
    for a, b in sorted(piece.rows for piece in pieces):
        count += max(0, b - max(a, at))
        at = max(at, b)
    return int(count * width)


def _long_enough(piece: Piece, source: Any) -> bool:
    """Whether a source array has all values that a virtual array selects from it."""
    if piece.space.get_select_type() == import_module("h5py").h5s.SEL_ALL:
        return bool(piece.values <= source.size)
    if len(piece.space.shape) != source.ndim:
        return False
    if _unlimited(piece.space):
        lengths, ends = _clipped(piece.space, source.shape)
        return piece.values <= prod(lengths) and all(end <= size for end, size in zip(ends, source.shape, strict=True))
    last = piece.space.get_select_bounds()[1]
    return all(end < size for end, size in zip(last, source.shape, strict=True))


def _numbered(name: str, number: int | None) -> str:
    """The name of a source with %% replaced by % and %b by the number of a block; number None: %b stays."""
    return NUMBERED.sub(lambda match: "%" if match[1] == "%" else "%b" if number is None else str(number), name)


def _find(path: Path, name: str) -> Path | None:
    """Path at which HDF5 finds the source file `name` of a virtual array in `path`; None if there is none."""
    if name == ".":
        return path
    return next((place for place in _places(path, Path(name)) if place.is_file()), None)


def _places(path: Path, name: Path) -> Iterator[Path]:
    if name.is_absolute():
        yield name
        name = Path(name.name)
    for prefix in filter(None, os.environ.get("HDF5_VDS_PREFIX", "").split(":")):
        yield Path(prefix.replace("${ORIGIN}", str(path.absolute().parent))) / name
    yield path.parent / name
    yield name
    yield path.resolve().parent / name
