"""Patterns of sparse layers from files that scipy.sparse.save_npz writes."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.lib import format as npy

from psmpi.errors import UserError, expanded
from psmpi.layout import PACKED, Pattern

# Bytes of an array's header, at most, and of the longest number.
HEADER, NUMBER = 1 << 16, 8


def read_pattern(path: str) -> Pattern:
    """The pattern of a matrix (units, inputs) in a .npz file, without its values; UserError where it is none."""
    try:
        with zipfile.ZipFile(expanded(path, "pattern")) as archive:
            shape = _read(archive, "shape", 2)
            if shape.shape != (2,) or shape.dtype.kind not in "iu" or (shape < 1).any():
                raise ValueError(f"its shape is {shape.tolist()}, not two numbers above 0")
            rows, inputs = (int(n) for n in shape)
            starts = _read(archive, "indptr", rows + 1)
            if len(starts) != rows + 1:
                raise ValueError(
                    f"indptr has {starts.shape} numbers, and of {rows} rows needs {rows + 1}: save_npz a CSR"
                )
            pattern = Pattern.of(starts, _read(archive, "indices", int(starts[-1])), inputs)
    # What zipfile, zlib and NumPy raise for bytes that are not what they should be.
    except (ValueError, KeyError, EOFError, OSError, MemoryError, NotImplementedError, RuntimeError,
            zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip("'\"")
        raise UserError(
            f"pattern {path}: {reason[:200]}; expected a file of scipy.sparse.save_npz(FILE, MATRIX.tocsr())"
        ) from None
    return pattern.sorted()


def _read(archive: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    """An array of at most so many whole numbers."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > HEADER + NUMBER * max(0, most):
        raise ValueError(f"{name} has {info.file_size:,} bytes, and {most:,} numbers were expected")
    with archive.open(info) as stream:
        found: np.ndarray = npy.read_array(stream, allow_pickle=False, max_header_size=HEADER)
    return found


def with_patterns(tables: Sequence[Any]) -> tuple[Any, ...]:
    """Layer tables with the patterns of files in the place of their names, so that nothing else is needed.

    UserError where a file is none.
    """
    found = []
    for table in tables:
        if isinstance(table, dict):
            pattern = table.get("pattern")
            if isinstance(pattern, str) and pattern.endswith(".npz") and not pattern.startswith(PACKED):
                table = {**table, "pattern": read_pattern(pattern).packed()}
            if isinstance(table.get("layers"), list | tuple):
                table = {**table, "layers": list(with_patterns(table["layers"]))}
        found.append(table)
    return tuple(found)


def brief(value: Any) -> Any:
    """A setting for people, with a pattern as its sizes and a digest of its text."""
    if isinstance(value, dict):
        return {key: brief(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(brief(one) for one in value)
    if isinstance(value, str) and value.startswith(PACKED):
        return f"{value.rpartition(':')[0]}:sha256 {sha256(value.encode()).hexdigest()[:12]}"
    return value
