"""Writing files whole or not at all, under names that nobody can guess, through no symbolic link.

In a folder that others may write to, a link of a name that is known beforehand would lead the writer elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def partial_of(target: Path) -> Path:
    """A name for a file while it is being written, beside it; another one at each call."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")


def partials_of(target: Path) -> Iterator[Path]:
    """The files that are there under such names, which a killed process left."""
    start, end = f".{target.name}.", ".part"
    for path in target.parent.iterdir():
        if path.name.startswith(start) and path.name.endswith(end):
            yield path


@contextlib.contextmanager
def written(target: Path, flushed: bool = True) -> Iterator[IO[bytes]]:
    """A file for bytes, which appears as `target` when the block ends, and not at all after an exception.

    A link called `target` is replaced, not followed; who may read the file is as the umask says. flushed: whether it is
    to be on the disk by then. OSError where it cannot be written.
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
    """Let the names of a folder's files be on the disk."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
