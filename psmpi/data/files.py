"""Finding files and turning what goes wrong while reading them into messages for the user."""

from __future__ import annotations

import gzip
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

from psmpi.errors import UserError

CHUNK_BYTES = 1 << 20
# What may be unpacked into memory without a look at how far it was packed.
UNPACKED_BYTES = 1 << 27
# How far samples that were measured can be packed; gzip packs zeros a thousandfold.
PACKED = 200


def rows_per_chunk(row_bytes: int) -> int:
    """The number of rows of `row_bytes` bytes that fit a chunk: at least one."""
    return max(1, CHUNK_BYTES // row_bytes)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a missing, unreadable, damaged or truncated `path` raises inside the block into UserError."""
    try:
        yield
    # BadGzipFile is an OSError, so this clause has to come first.
    # NotImplementedError: what zip files say that they need, and zipfile has not.
    # UnicodeDecodeError: names in a zip file that are said to be UTF-8.
    except (
        gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError,
        UnicodeDecodeError,
    ) as error:  # fmt: skip
        raise UserError(
            f"{path}: the file is damaged, truncated or not of the format its name promises ({error}); "
            "fetch or write it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: the file cannot be read ({error.strerror or error}); check that it is there, complete "
            "and readable to you, or fetch or write it again"
        ) from error


def check_unpacked(where: str, packed: int, unpacked: int, advice: str) -> None:
    """Raise UserError for `packed` bytes that become so many more, `unpacked`, that they are no measured samples."""
    if unpacked > UNPACKED_BYTES and unpacked > PACKED * packed:
        raise UserError(
            f"{where}: {packed:,} bytes that would unpack to {unpacked:,}: nearly all of it repeats itself, as samples "
            f"do not; if it is what it should be, {advice}"
        )


# The beginnings of files, and what these are.
MAGIC = {
    b"PK": "a zip file (.npz)",
    b"\x93NUMPY": "a single array of NumPy (.npy)",
    b"\x89HDF": "an HDF5 file (.h5)",
    b"\x1f\x8b": "compressed by gzip",
    b"MATLAB 5.0": "a MATLAB file of version 5",
    b"CDF": "a netCDF file of version 3",
}
ADVICE = "save it as HDF5 or, with np.savez(NAME, x=samples, y=labels), as .npz, and let its name end so"


def described(path: Path) -> str:
    """A file by its first bytes: "it is an HDF5 file (.h5)"."""
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        return "it is empty"
    return "it is " + next((what for magic, what in MAGIC.items() if start.startswith(magic)), "of an unknown format")


def fill(stream: BufferedIOBase, buffer: memoryview) -> int:
    """Read from `stream` until the byte view `buffer` is full or the stream ends; return the bytes read."""
    done = 0
    # A decompressing stream may hand over less than asked for long before its end.
    while done < len(buffer):
        got = stream.readinto(buffer[done:])
        if not got:
            break
        done += got
    return done


def find_set(what: str, data_dir: Path, folders: list[Path], wanted: dict[str, list[str]]) -> dict[str, Path] | None:
    """Find the files of a data set in the first of `folders` that has them all.

    `wanted` maps a key to the accepted file names, the best first. Returns key -> path, or None where no
    folder has any of the files. Raises UserError where `data_dir` is not a folder, and where files are there
    but none of the folders has all of them.
    """
    if not data_dir.is_dir():
        lacks = "is no directory" if data_dir.exists() else "no such directory"
        raise UserError(f"{data_dir}: {lacks}; give --data-dir the directory that holds the {what} files")
    best: dict[str, Path] = {}
    best_folder = data_dir
    for folder in folders:
        found = {}
        for key, names in wanted.items():
            present = [folder / name for name in names if (folder / name).is_file()]
            if present:
                found[key] = present[0]
        # Files of one set are never gathered from several folders: they might belong to different sets.
        if len(found) > len(best):
            best, best_folder = found, folder
    if not best:
        return None
    missing = [names[0] for key, names in wanted.items() if key not in best]
    if missing:
        raise UserError(
            f"{best_folder}: the {what} data set is incomplete: found "
            f"{', '.join(path.name for path in best.values())}, missing {', '.join(missing)}; "
            "put the missing files there too"
        )
    return best


def not_found(what: str, folders: list[Path], names: list[str], advice: str) -> UserError:
    """The error for a data set of which no file was found in any of `folders`."""
    return UserError(f"{what}: found none of {', '.join(names)} in {', '.join(map(str, folders))}; {advice}")


def need_data_dir(what: str, data_dir: Path | None) -> Path:
    """Return `data_dir`, or raise UserError where none was given for the data set `what`."""
    if data_dir is None:
        raise UserError(
            f"{what}: no data directory given, and the files are not part of psmpi; "
            "name the directory that holds them with --data-dir"
        )
    return data_dir
