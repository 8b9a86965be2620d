"""Writing of files complete or not at all, under names that nobody can guess, without following symbolic links.

In a folder that others may write to, a link with a predictable name would lead the writer elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def partial_of(target: Path) -> Path:
    """A random name for a file while it is being written, in the same folder; each call returns another one."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")


def partials_of(target: Path) -> Iterator[Path]:
    """Existing files with names of `partial_of(target)`, which a killed process left."""
    start, end = f".{target.name}.", ".part"
    for path in target.parent.iterdir():
        if path.name.startswith(start) and path.name.endswith(end):
            yield path


@contextlib.contextmanager
def written(target: Path, flushed: bool = True) -> Iterator[IO[bytes]]:
    """Open a binary file that appears as `target` at the end of the block, or not at all after an exception.

    A link named `target` is replaced, not followed; the umask sets who may read the file. flushed: whether the file is
    on the disk when the block ends. OSError if it cannot be written.
    """
    partial = partial_of(target)
    try:
        with partial.open("xb") as file:
            yield file
            if flushed:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Flush the names of a folder's files to the disk."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
