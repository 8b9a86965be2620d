"""Patterns of sparse layers from files that scipy.sparse.save_npz writes."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from hashlib import sha256
from math import prod
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy

from psmpi.errors import UserError, expanded
from psmpi.layout import PACKED, Pattern

# Most bytes of an array's header, bytes of the longest number, and most rows or columns of a matrix.
HEADER, NUMBER, MOST = 1 << 16, 8, 2**31 - 1
WHOLE, TEXT = "iu", "SU"


def read_pattern(path: str) -> Pattern:
    """Return the pattern of a sparse matrix (units, inputs) in a .npz file, without its values.

    UserError for a file that is not a compressed-row matrix of scipy.sparse.save_npz.
    """
    try:
        place = expanded(path, "pattern")
        if place.exists() and not place.is_file():
            # Opening a pipe would block.
            raise ValueError("it is not a regular file")
        with zipfile.ZipFile(place) as archive:
            kind = _read(archive, "format", 0, NUMBER, TEXT).item()
            kind = kind.decode("ascii") if isinstance(kind, bytes) else kind
            if kind != "csr":
                raise ValueError(f"it holds a matrix of the format {kind!r} and not 'csr'")
            shape = _read(archive, "shape", 1, 2)
            if shape.shape != (2,) or (shape < 1).any() or (shape > MOST).any():
                raise ValueError(f"its shape is {shape.tolist()}, not two numbers from 1 to {MOST:,}")
            rows, inputs = (int(n) for n in shape)
            starts = _read(archive, "indptr", 1, rows + 1)
            if len(starts) != rows + 1:
                raise ValueError(f"indptr has {len(starts):,} numbers, but {rows:,} rows need {rows + 1:,}")
            pattern = Pattern.of(starts, _read(archive, "indices", 1, int(starts[-1])), inputs)
    # zipfile, zlib, NumPy and ast.literal_eval raise these errors for damaged files.
    except (ValueError, KeyError, EOFError, OSError, MemoryError, NotImplementedError, RuntimeError, OverflowError,
            SyntaxError, TokenError, zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip("'\"")
        raise UserError(
            f"pattern {path}: {reason[:200]}; expected a file of scipy.sparse.save_npz(FILE, MATRIX.tocsr())"
        ) from None
    return pattern.sorted()


def _read(archive: zipfile.ZipFile, name: str, axes: int, most: int, kinds: str = WHOLE) -> np.ndarray:
    """Return an array of `axes` axes and at most `most` whole numbers (or characters); ValueError for any other."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed by an unsupported method")
    if info.file_size > HEADER + NUMBER * max(0, most):
        raise ValueError(f"{name} has {info.file_size:,} bytes, but at most {most:,} numbers were expected")
    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of version {version} of the .npy format, which arrays of numbers never need")
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(stream, max_header_size=HEADER)
        if len(shape) != axes or dtype.kind not in kinds:
            expected = "whole numbers in a vector" if kinds == WHOLE else "a word"
            raise ValueError(f"{name} has the shape {shape} and the type {dtype}, not {expected}")
        size = prod(shape) * dtype.itemsize
        if info.file_size != stream.tell() + size:
            raise ValueError(
                f"{name} has {info.file_size - stream.tell():,} bytes of numbers, but its header says {size:,}"
            )
        return np.frombuffer(stream.read(), dtype).reshape(shape)


def with_patterns(tables: Sequence[Any]) -> tuple[Any, ...]:
    """Return layer tables in which the patterns themselves replace names of pattern files.

    The tables then need no other file. UserError for a file without a pattern.
    """
    packed = []
    for table in tables:
        if isinstance(table, dict):
            pattern = table.get("pattern")
            if isinstance(pattern, str) and _is_file(pattern):
                table = {**table, "pattern": read_pattern(pattern).packed()}
            if isinstance(table.get("layers"), list | tuple):
                table = {**table, "layers": list(with_patterns(table["layers"]))}
        packed.append(table)
    return tuple(packed)


def names_files(value: Any) -> bool:
    """Return whether layer tables name files of patterns, at any depth."""
    if isinstance(value, dict):
        own = value.get("pattern")
        return (isinstance(own, str) and _is_file(own)) or any(names_files(one) for one in value.values())
    return isinstance(value, list | tuple) and any(names_files(one) for one in value)


def _is_file(pattern: str) -> bool:
    return pattern.endswith(".npz") and not pattern.startswith(PACKED)


def brief(value: Any) -> Any:
    """Return a setting for display, with a pattern as its sizes and a digest of its text."""
    if isinstance(value, dict):
        return {key: brief(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(brief(one) for one in value)
    if isinstance(value, str) and value.startswith(PACKED):
        return f"{value.rpartition(':')[0]}:sha256 {sha256(value.encode()).hexdigest()[:12]}"
    return value
