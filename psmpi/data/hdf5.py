"""Data sets in HDF5 files, of which only the wanted rows are read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.arrays import Header
from psmpi.data.files import reading, rows_per_chunk
from psmpi.data.own import KEYS
from psmpi.data.rows import RowSource, windows
from psmpi.errors import UserError


def _h5py() -> Any:
    # Loaded where it is needed: it takes a moment, and most runs have no HDF5 file.
    return import_module("h5py")


def read_hdf5(path: Path) -> tuple[list[str], dict[str, Header]]:
    """The names of everything in the HDF5 file `path`, and headers of the arrays psmpi knows. UserError if damaged."""
    h5py = _h5py()
    with reading(path), h5py.File(path, "r") as file:
        keys = list(file)
        headers = {}
        for key in KEYS:
            if key in keys:
                array = file.get(key)
                if not isinstance(array, h5py.Dataset) or array.shape is None:
                    raise UserError(f"{path}: {key} is a group, a dead link or empty; save an array under this name")
                headers[key] = _header(path, key, array.shape, array.dtype)
    return keys, headers


def _header(path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Header:
    def source() -> RowSource:
        return Hdf5Rows(path, key, shape, dtype)

    def values() -> npt.NDArray[Any]:
        with reading(path), _h5py().File(path, "r") as file:
            return np.asarray(file[key][()])

    return Header(shape, dtype, source, values)


@dataclass(frozen=True, eq=False)
class Hdf5Rows:
    """The rows of the array `key`, of shape (n, ...), in an HDF5 file."""

    path: Path
    key: str
    shape: tuple[int, ...]
    stored: np.dtype[Any]

    @property
    def n(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        native: np.dtype[Any] = self.stored.newbyteorder("=")
        return native

    def read_into(self, rows: npt.NDArray[np.int64], where: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        width = rows_per_chunk(out.shape[1] * self.stored.itemsize)
        with reading(self.path), _h5py().File(self.path, "r") as file:
            array = file[self.key]
            if array.shape != self.shape or array.dtype != self.stored:
                raise UserError(f"{self.path}: {self.key} has changed since the file was opened; start again")
            for i, j in windows(rows, width):
                first, last = int(rows[i]), int(rows[j - 1])
                # A whole window and the wanted rows out of it: picking single rows takes HDF5 up to ten times
                # as long, and saves nothing where the array is stored in chunks.
                block = array[first : last + 1][rows[i:j] - first]
                out[where[i:j]] = block.reshape(j - i, -1)
