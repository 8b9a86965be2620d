"""File format of a checkpoint: header, paths, chunks, checksums; FORMAT.md in this folder describes it.

The first `HEADER` bytes are HDF5's user block, which HDF5 skips: format version, length and SHA-256 of all following
bytes. psmpi compares them before HDF5 opens the file, so that HDF5 never reads damaged bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psmpi.errors import DamagedError, UserError
from psmpi.output import legible

FORMAT = 2
HEADER = 512
NAME = re.compile(r"step-(\d{9})\.h5")
# Most elements of a chunk.
CHUNK = 1 << 18
# Bytes of HDF5's cache for the chunks of a data set: a few chunks of float64.
CACHE = 1 << 23
READ = 1 << 20
HEADER_TEXT = re.compile(rb"psmpi checkpoint (\d{1,9})\nbytes (\d{1,18})\nsha256 ([0-9a-f]{64})\n\0*")


def chunk_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a chunk: whole rows, or a part of a row that is longer than `CHUNK` elements."""
    chunk: list[int] = []
    room = CHUNK
    for length in reversed(shape):
        chunk.insert(0, max(1, min(length, room)))
        room //= chunk[0]
    return tuple(chunk)


def filters(gzip: int) -> dict[str, Any]:
    """h5py options for a data set of numbers: checksums, and compression; gzip: 0 (none) to 9."""
    return {"fletcher32": True, **({"compression": "gzip", "compression_opts": gzip, "shuffle": True} if gzip else {})}


def as_data(text: str) -> np.ndarray:
    """A text as an array of one UTF-8 string of fixed length, so that the filter for checksums applies to it."""
    data = legible(text).encode()
    return np.array([data], h5py.string_dtype("utf-8", max(1, len(data))))


def folder(out: Path) -> Path:
    """The folder of checkpoints in a run directory."""
    return out / "checkpoints"


def best(out: Path) -> Path:
    """Path of the checkpoint of a run's best epoch, which no newer checkpoint removes."""
    return out / "best.h5"


def available(out: Path) -> list[Path]:
    """Checkpoints of a run directory, or of its folder of checkpoints, whole or damaged, oldest first."""
    place = out if out.name == folder(out).name and not folder(out).is_dir() else folder(out)
    files = place.iterdir() if place.is_dir() else ()
    return sorted(path for path in files if NAME.fullmatch(path.name) and path.is_file())


def digest(path: Path) -> tuple[int, str]:
    """Length and SHA-256 (hex) of the bytes after the header."""
    total, length = hashlib.sha256(), 0
    with path.open("rb") as file:
        file.seek(HEADER)
        while data := file.read(READ):
            total.update(data)
            length += len(data)
    return length, total.hexdigest()


def seal(path: Path) -> None:
    """Write the header of a finished HDF5 file and flush it to the disk."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+b") as file:
        # A second thread flushes written data to the disk while this one computes the digest.
        with ThreadPoolExecutor(1) as beside:
            flushed = beside.submit(os.fdatasync, file.fileno())
            length, sha256 = digest(path)
            flushed.result()
        file.write(f"psmpi checkpoint {FORMAT}\nbytes {length}\nsha256 {sha256}\n".encode().ljust(HEADER, b"\0"))
        file.flush()
        os.fsync(file.fileno())


def check_file(path: Path) -> None:
    """Read the whole file and compare it with its header.

    DamagedError if the bytes are not those that were written or the file is no checkpoint; UserError if the file is
    missing, cannot be read or has a newer format.
    """
    try:
        # Refuse pipes, since a read would wait for data.
        if path.exists() and not path.is_file():
            raise UserError(f"checkpoint {path} is no regular file: give a file of a run's checkpoints folder")
        with path.open("rb") as file:
            header = file.read(HEADER)
        size = path.stat().st_size
        match = HEADER_TEXT.fullmatch(header) if len(header) == HEADER else None
        if match is None:
            if header.startswith(b"\x89HDF"):
                raise DamagedError(
                    f"{path} is HDF5 but not a psmpi checkpoint: give a file of a run's checkpoints folder"
                )
            if header.startswith(b"psmpi checkpoint"):
                raise DamagedError(f"checkpoint {path} is damaged in its first {HEADER} bytes; use another one")
            raise DamagedError(f"{path} is not a psmpi checkpoint: give a file of a run's checkpoints folder")
        version, length = int(match[1]), int(match[2])
        if version > FORMAT:
            raise UserError(
                f"checkpoint {path} has format {version}, this psmpi reads up to {FORMAT}: install a newer psmpi"
            )
        if size != HEADER + length:
            raise DamagedError(
                f"checkpoint {path} has {size:,} bytes, its header says {HEADER + length:,}: it was cut short or "
                "something was added; use another one"
            )
        if digest(path)[1] != match[3].decode():
            raise DamagedError(
                f"checkpoint {path} is damaged: its bytes do not have the SHA-256 that its header says; use another one"
            )
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such checkpoint; give a file of a checkpoints folder, or a run directory"
        ) from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None


def open_file(path: Path) -> h5py.File:
    """Open a file that `check_file` has passed."""
    try:
        # A file system without locks is no reason to fail.
        return h5py.File(path, "r", locking="best-effort", rdcc_nbytes=CACHE)
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
