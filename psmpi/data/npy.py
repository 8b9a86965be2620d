"""Pairs of .npy files: x.npy and y.npy of a folder, or NAME_x.npy and NAME_y.npy, with x_test and y_test, lengths, ...

Each file is an array of a data set, see psmpi.data.own; samples are read by rows.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.arrays import Header
from psmpi.data.files import described, reading
from psmpi.data.npz import array_header
from psmpi.data.own import KEYS
from psmpi.data.rows import FileRows, RowSource
from psmpi.errors import UserError

NPY = "_x.npy"
_NAME = re.compile(r"(.*_)?x\.npy", re.IGNORECASE)


def is_pair(name: str) -> bool:
    """Whether a name of a data set is that of a .npy file."""
    return Path(name).suffix.lower() == ".npy"


def pair_in(folder: Path) -> Path | None:
    """The path of a folder's x.npy; None if there is no such file."""
    path = folder / "x.npy"
    return path if path.is_file() else None


def read_pair(path: Path) -> tuple[list[str], dict[str, Header]]:
    """Names and headers of the arrays beside x.npy or NAME_x.npy; UserError for damaged files and for another name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise UserError(
            f"{path}: a single array; expected a pair: save samples as {path.stem}_x.npy and labels as "
            f"{path.stem}_y.npy, and name the first"
        )
    beside = {key: path.with_name(f"{match[1] or ''}{key}.npy") for key in KEYS}
    headers = {key: _header(file) for key, file in beside.items() if file.is_file()}
    return list(headers), headers


def _header(path: Path) -> Header:
    with reading(path), path.open("rb") as file:
        if not file.read(6).startswith(b"\x93NUMPY"):
            raise UserError(f"{path}: {described(path)}, not a .npy file; save it with np.save")
        file.seek(0)
        shape, fortran, dtype, offset = array_header(str(path), file)
        size = file.seek(0, 2)
    if not dtype.hasobject and size != offset + prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: found {size} bytes, expected {offset + prod(shape) * dtype.itemsize} by its header ({dtype}, "
            f"shape {shape}); write the file again"
        )

    def source() -> RowSource:
        if fortran and len(shape) > 1:
            name = path.stem
            raise UserError(
                f"{path}: the array lies in Fortran order: save np.ascontiguousarray({name}), to read it by rows"
            )
        return FileRows(path, offset, shape[0], prod(shape[1:]), dtype)

    def values() -> npt.NDArray[Any]:
        with reading(path):
            return np.asarray(np.load(path, allow_pickle=False))

    return Header(tuple(shape), dtype, source, values)
