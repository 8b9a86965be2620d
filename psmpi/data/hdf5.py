"""Data sets in HDF5 files, of which only the wanted rows are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.arrays import Header
from psmpi.data.files import ADVICE, described, reading, rows_per_chunk
from psmpi.data.own import KEYS
from psmpi.data.rows import InPieces, RowSource, some_rows, windows
from psmpi.data.stored import check_stored
from psmpi.errors import UserError


def _h5py() -> Any:
    # Loaded where it is needed: it takes a moment, and most runs have no HDF5 file.
    return import_module("h5py")


def read_hdf5(path: Path) -> tuple[list[str], dict[str, Header]]:
    """The names of everything in the HDF5 file `path`, and headers of the arrays psmpi knows. UserError if damaged."""
    h5py = _h5py()
    with _opened(path) as file:
        keys = list(file)
        headers = {}
        for key in KEYS:
            if key in keys:
                array = file.get(key)
                link = file.get(key, getlink=True)
                if array is None and isinstance(link, h5py.ExternalLink):
                    raise UserError(
                        f"{path}: {key} is a link to {link.path} in {link.filename}, which is not there; bring that "
                        "file back, or save the array itself"
                    )
                if not isinstance(array, h5py.Dataset) or array.shape is None:
                    raise UserError(f"{path}: {key} is a group, a dead link or empty; save an array under this name")
                check_stored(path, key, array)
                _check_attributes(path, key, array)
                headers[key] = _header(path, key, array.shape, array.dtype)
    return keys, headers


def _check_attributes(path: Path, key: str, array: Any) -> None:
    """UserError where the values of an array are not those that are stored, as netCDF's conventions allow."""
    for name, nothing in (("scale_factor", 1), ("add_offset", 0)):
        value = array.attrs.get(name, nothing)
        if np.any(value != nothing):
            raise UserError(
                f"{path}: {key} has the attribute {name} = {value}, which psmpi does not apply; save the scaled values "
                "as float32, without it"
            )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The HDF5 file `path`, and UserError for whatever HDF5 finds wrong with it, or with what is read of it."""
    with reading(path):
        try:
            # Best effort: file systems without locks are no reason to fail.
            with _h5py().File(path, "r", locking="best-effort") as file:
                yield file
        except OSError as error:
            raise _explained(path, error) or error from error
        # What h5py raises for headers and links that are damaged, or that it does not know.
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: the file is damaged, or made in a way that h5py cannot read ({error}); write it anew"
            ) from error


def _explained(path: Path, error: OSError) -> UserError | None:
    """The cause of an error of HDF5 that is not the operating system's."""
    text = str(error)
    if "unable to lock file" in text:
        return UserError(
            f"{path}: another program has the file open for writing; end or close it there, or train on a copy"
        )
    if "consistency flags" in text:
        return UserError(
            f"{path}: the program that wrote the file did not close it, or still writes; end it, then h5clear -s {path}"
        )
    if "signature not found" in text:
        return UserError(f"{path}: {described(path)}, not an HDF5 file; {ADVICE}")
    if "read data" in text or "checksum" in text:
        return UserError(f"{path}: the file is damaged ({text}); fetch or write it again")
    return None


def _header(path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Header:
    def source() -> RowSource:
        return Hdf5Rows(path, key, shape, dtype)

    def values() -> npt.NDArray[Any]:
        with _opened(path) as file:
            return np.asarray(file[key][()])

    return Header(shape, dtype, source, values)


@dataclass(frozen=True, eq=False)
class Hdf5Rows(InPieces):
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

    def pieces(self, rows: npt.NDArray[np.int64], features: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        width = rows_per_chunk(features * self.stored.itemsize)
        with _opened(self.path) as file:
            array = file[self.key]
            if array.shape != self.shape or array.dtype != self.stored:
                raise UserError(f"{self.path}: {self.key} has changed since the file was opened; start again")
            check_stored(self.path, self.key, array)
            for i, j in windows(rows, width):
                first, last = int(rows[i]), int(rows[j - 1])
                # A whole window and the wanted rows out of it: picking single rows takes HDF5 up to ten times
                # as long, and saves nothing where the array is stored in chunks.
                yield i, array[first : last + 1][rows[i:j] - first].reshape(j - i, -1)

    def glance(self, count: int) -> npt.NDArray[Any]:
        return some_rows(self, prod(self.shape[1:]), count)

    def place(self, row: int) -> str:
        return f"{self.path}, {self.key}: sample {row}"
