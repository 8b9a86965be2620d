"""Data sets in .npz files. Headers are read first, samples later by rows or as a stream; pickles are never loaded."""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from psmpi.data.arrays import Header
from psmpi.data.files import ADVICE, check_unpacked, described, reading
from psmpi.data.own import KEYS
from psmpi.data.rows import CheckedRows, FileRows, RowSource, StreamRows
from psmpi.errors import UserError

_LOCAL_HEADER = 30


def read_npz(path: Path) -> tuple[list[str], dict[str, Header]]:
    """Names of all arrays in the .npz file `path`, and headers of the arrays in KEYS. UserError if it is damaged.

    An uncompressed array is read by rows after a check of its checksum, a compressed one as a stream.
    """
    with reading(path):
        if not zipfile.is_zipfile(path) and not described(path).startswith("it is a zip"):
            raise UserError(f"{path}: {described(path)}, not an .npz file; {ADVICE}")
    with reading(path), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        # One wrong byte in the directory can hide members, which zipfile does not notice.
        if _members(path) not in (len(names), 0xFFFF):
            raise EOFError(f"its directory has {len(names)} members, its end says {_members(path)}")
        for key in KEYS:
            if names.count(key) > 1:
                raise UserError(
                    f"{path}: holds {names.count(key)} arrays named {key}; write the file anew with np.savez"
                )
        return list(members), {key: _header(path, archive, members[key]) for key in KEYS if key in members}


def array_header(where: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Read the header of a .npy stream: shape, whether in Fortran order, dtype, bytes of the header.

    UserError, which names `where`, for a header that is not sound.
    """
    try:
        version = npy.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = npy.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, dtype = npy.read_array_header_2_0(stream)
        else:
            raise ValueError(f"version {version} of the .npy format, which arrays of numbers never need")
    # A header is a Python literal; Python raises these errors for other text.
    except (ValueError, SyntaxError, TokenError, RecursionError, MemoryError) as error:
        # NumPy's message repeats the header, which may be long.
        reason = str(error) if len(str(error)) < 200 else f"{str(error)[:200]}..."
        raise UserError(f"{where}: no sound .npy header ({reason}); write it with np.savez") from error
    if any(size < 0 for size in shape):
        raise UserError(f"{where}: its header says the shape {shape}; write the file again")
    return shape, fortran, dtype, stream.tell()


def _header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Header:
    where = f"{path}, {info.filename}"
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{where}: encrypted or packed in an unusual way; write it with np.savez_compressed")
    with archive.open(info) as stream:
        shape, fortran, dtype, offset = array_header(where, stream)
    if info.compress_size > path.stat().st_size:
        raise UserError(f"{where}: its directory says more bytes than the file has; fetch or write it again")
    check_unpacked(where, info.compress_size, info.file_size, "save it with np.savez")
    if not dtype.hasobject and info.file_size != offset + prod(shape) * dtype.itemsize:
        raise UserError(
            f"{where}: found {info.file_size} bytes, expected {offset + prod(shape) * dtype.itemsize} by its "
            f"header ({dtype}, shape {shape}); write the file again"
        )

    def source() -> RowSource:
        features = prod(shape[1:])
        if fortran and len(shape) > 1:
            columns = np.arange(features, dtype=np.int64).reshape(shape[1:]).ravel(order="F")
            return StreamRows(path, info.filename, offset, shape[0], features, dtype, columns)
        stream = StreamRows(path, info.filename, offset, shape[0], features, dtype)
        if info.compress_type == zipfile.ZIP_STORED:
            first = _data_start(path, info) + offset
            return CheckedRows(stream, FileRows(path, first, shape[0], features, dtype))
        return stream

    def values() -> npt.NDArray[Any]:
        with reading(path), zipfile.ZipFile(path) as archive, archive.open(info.filename) as stream:
            return np.asarray(npy.read_array(stream, allow_pickle=False))

    return Header(tuple(shape), dtype, source, values)


def _members(path: Path) -> int:
    """Number of members that the end record of a zip file gives; 65535 means that many or more."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        # A comment of up to 65,535 bytes may follow the end record of 22 bytes.
        file.seek(max(0, size - 65535 - 22))
        end = file.read()
    at = end.rfind(b"PK\5\6")
    return int.from_bytes(end[at + 10 : at + 12], "little")


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    """Offset in the file of the content of an uncompressed member."""
    with reading(path), path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER)
        if len(local) < _LOCAL_HEADER:
            raise EOFError("a member's header is missing")
    # The name and the extra field can differ in length from those in the central directory.
    return (
        info.header_offset
        + _LOCAL_HEADER
        + int.from_bytes(local[26:28], "little")
        + int.from_bytes(local[28:30], "little")
    )
