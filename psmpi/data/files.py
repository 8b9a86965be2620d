"""Search for files of data sets, and UserErrors for files that cannot be read."""

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
# Bytes that may be unpacked into memory at any ratio of compression.
UNPACKED_BYTES = 1 << 27
# Largest ratio of compression of measured samples; gzip compresses zeros a thousandfold.
PACKED = 200


def rows_per_chunk(row_bytes: int) -> int:
    """Number of rows of `row_bytes` bytes that fit into a chunk, at least one."""
    return max(1, CHUNK_BYTES // row_bytes)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the block about a missing, unreadable, damaged or truncated `path` into UserErrors."""
    try:
        yield
    # BadGzipFile is an OSError, so this clause has to come first.
    # NotImplementedError: a zip file needs a feature that zipfile lacks.
    # UnicodeDecodeError: a name in a zip file is flagged as UTF-8 and is not.
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
    """Raise UserError if `packed` bytes unpack to so many, `unpacked`, that they cannot be measured samples.

    advice: what to do if the file is right after all.
    """
    if unpacked > UNPACKED_BYTES and unpacked > PACKED * packed:
        raise UserError(
            f"{where}: {packed:,} bytes that would unpack to {unpacked:,}: nearly all of it repeats itself, as samples "
            f"do not; if it is what it should be, {advice}"
        )


# First bytes of files, and the format of each.
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
    """The format of a file by its first bytes, as text such as "it is an HDF5 file (.h5)"."""
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        return "it is empty"
    return "it is " + next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), "of an unknown format")


def fill(stream: BufferedIOBase, buffer: memoryview) -> int:
    """Read from `stream` until the byte view `buffer` is full or the stream ends; return the bytes read."""
    filled = 0
    # A decompressing stream may return fewer bytes than requested before its end.
    while filled < len(buffer):
        got = stream.readinto(buffer[filled:])
        if not got:
            break
        filled += got
    return filled


def find_set(what: str, data_dir: Path, folders: list[Path], wanted: dict[str, list[str]]) -> dict[str, Path] | None:
    """Find the files of a data set in the first of `folders` that has them all.

    what: name of the data set in messages. `wanted` maps a key to the accepted file names, the best first. Returns
    key -> path, or None if no folder has any of the files. UserError if `data_dir` is not a folder, and if no folder
    has all of the files but one has some.
    """
    if not data_dir.is_dir():
        lacks = "is no directory" if data_dir.exists() else "no such directory"
        raise UserError(f"{data_dir}: {lacks}; give --data-dir the directory that holds the {what} files")
    best: dict[str, Path] = {}
    best_folder = data_dir
    for folder in folders:
        paths = {}
        for key, names in wanted.items():
            present = [folder / name for name in names if (folder / name).is_file()]
            if present:
                paths[key] = present[0]
        # Files from several folders are never combined: they might belong to different data sets.
        if len(paths) > len(best):
            best, best_folder = paths, folder
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
    """Make the error for a data set `what` of which none of `folders` has a file."""
    return UserError(f"{what}: found none of {', '.join(names)} in {', '.join(map(str, folders))}; {advice}")


def need_data_dir(what: str, data_dir: Path | None) -> Path:
    """Return `data_dir`; UserError if none was given for the data set `what`."""
    if data_dir is None:
        raise UserError(
            f"{what}: no data directory given, and the files are not part of psmpi; "
            "name the directory that holds them with --data-dir"
        )
    return data_dir
