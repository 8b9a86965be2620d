"""Data sets in HDF5 files; reads touch only the requested rows."""

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
from psmpi.data.stored import check_stored, is_unusual
from psmpi.errors import UserError
from psmpi.files import examiner
from psmpi.files.packed import Unpacker, is_packed

# Most soft links that are followed one after the other.
DEPTH = 8


def _h5py() -> Any:
    # Import late: it takes time, and most runs have no HDF5 file.
    return import_module("h5py")


def read_hdf5(path: Path, external: bool = False) -> tuple[list[str], dict[str, Header]]:
    """Names of all objects at the root of the HDF5 file `path`, and headers of the arrays in KEYS.

    external: whether the arrays may lie in other files. UserError for a damaged file. Another process examines the file
    first, see psmpi.files.examiner.
    """
    # Report a missing or unreadable file here, without the examining process.
    with reading(path), path.open("rb") as file:
        file.read(1)
    examiner.examine("psmpi.data.hdf5:check_inside", path, external=external)
    return _headers(path, external)


def _headers(path: Path, external: bool) -> tuple[list[str], dict[str, Header]]:
    h5py = _h5py()
    with _opened(path) as file:
        # h5py returns names that are not UTF-8 as bytes.
        keys = [key if isinstance(key, str) else key.decode(errors="replace") for key in file]
        headers = {}
        for key in KEYS:
            if key in keys:
                if not external:
                    _check_links(path, file, key)
                array = file.get(key)
                link = file.get(key, getlink=True)
                if array is None and isinstance(link, h5py.ExternalLink):
                    raise UserError(
                        f"{path}: {key} is a link to {link.path} in {link.filename}, which is not there; bring that "
                        "file back, or save the array itself"
                    )
                if not isinstance(array, h5py.Dataset) or array.shape is None:
                    raise UserError(f"{path}: {key} is a group, a dead link or empty; save an array under this name")
                check_stored(path, key, array, external)
                _check_attributes(path, key, array)
                headers[key] = _header(path, key, array.shape, array.dtype, external)
    return keys, headers


def check_inside(path: Path, external: bool) -> None:
    """Raise UserError as `read_hdf5` does; called in a process that may crash or run out of memory.

    Arrays with filters of other packages are read whole once, since the filters' results are not known before.
    """
    _, headers = _headers(path, external)
    with _opened(path) as file:
        for key in headers:
            array = file[key]
            if not array.is_virtual and is_unusual(array) and array.size:
                step = rows_per_chunk(max(1, prod(array.shape[1:]) * array.dtype.itemsize))
                for first in range(0, array.shape[0], step):
                    array[first : first + step]


def _check_links(path: Path, file: Any, key: str) -> None:
    """Raise UserError if `key` leads to another file. Up to DEPTH links within the file are followed."""
    h5py, name = _h5py(), key
    for _ in range(DEPTH):
        parts = [part for part in name.split("/") if part not in ("", ".")]
        group = file
        for number, part in enumerate(parts):
            link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
            if isinstance(link, h5py.ExternalLink):
                raise UserError(
                    f"{path}: {key} is a link to {link.path} in {link.filename}, another file, which a file of a "
                    "stranger could choose: if this one is yours, add --allow-external, else save the array itself"
                )
            if isinstance(link, h5py.SoftLink):
                before = "" if link.path.startswith("/") else "/".join(parts[:number])
                name = "/".join([before, link.path, *parts[number + 1 :]])
                break
            if link is None:
                # The array is missing; `_headers` reports this.
                return
            group = group[part]
        else:
            return
    raise UserError(f"{path}: {key} is a link to links without end; save the array itself under this name")


def _check_attributes(path: Path, key: str, array: Any) -> None:
    """Raise UserError if an array has netCDF's attributes for scaled values, which psmpi does not apply."""
    for name, nothing in (("scale_factor", 1), ("add_offset", 0)):
        value = array.attrs.get(name, nothing)
        if np.any(value != nothing):
            raise UserError(
                f"{path}: {key} has the attribute {name} = {value}, which psmpi does not apply; save the scaled values "
                "as float32, without it"
            )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open the HDF5 file `path` for a block; errors of HDF5, and of reads in the block, become UserErrors."""
    with reading(path):
        try:
            # A file system without locks is no reason to fail.
            with _h5py().File(path, "r", locking="best-effort") as file:
                yield file
        except OSError as error:
            raise _explained(path, error) or error from error
        # h5py raises these for headers and links that are damaged or unknown.
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{path}: the file is damaged, or made in a way that h5py cannot read ({error}); write it anew"
            ) from error


def _explained(path: Path, error: OSError) -> UserError | None:
    """A UserError that explains a known error of HDF5; None for other errors."""
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


def _header(path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], external: bool) -> Header:
    def source() -> RowSource:
        return Hdf5Rows(path, key, shape, dtype, external)

    def values() -> npt.NDArray[Any]:
        with _opened(path) as file:
            array = file[key]
            return Unpacker(array).read() if is_packed(array) else np.asarray(array[()])

    return Header(shape, dtype, source, values)


@dataclass(frozen=True, eq=False)
class Hdf5Rows(InPieces):
    """The rows of the array `key`, of shape (n, ...), in an HDF5 file."""

    path: Path
    key: str
    shape: tuple[int, ...]
    stored: np.dtype[Any]
    external: bool = False

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
            check_stored(self.path, self.key, array, self.external)
            if is_packed(array):
                for i, values in Unpacker(array).pieces(rows):
                    yield i, values.reshape(len(values), -1)
                return
            for i, j in windows(rows, width):
                first, last = int(rows[i]), int(rows[j - 1])
                # Read a whole window and select the requested rows: HDF5 takes up to ten times as long to read single
                # rows, and this saves nothing for an array in chunks.
                yield i, array[first : last + 1][rows[i:j] - first].reshape(j - i, -1)

    def glance(self, count: int) -> npt.NDArray[Any]:
        return some_rows(self, prod(self.shape[1:]), count)

    def place(self, row: int) -> str:
        return f"{self.path}, {self.key}: sample {row}"
