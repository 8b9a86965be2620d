"""The process that examines strangers' files, see psmpi.files.examiner. It has limits, and may crash.

A line of JSON requests one check of one file; a line of JSON answers with the error, if any.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from psmpi.errors import DamagedError, UserError

# Bytes of memory and seconds of processor time of a check, besides those for the size of the file.
MEMORY, SECONDS = 384 << 20, 5
# Bytes of memory for a byte of the file (numbers in a text become objects), and bytes of the file checked in a second.
TIMES, SPEED = 16, 20e6


def run_check(check: str, path: Path, options: dict[str, Any]) -> None:
    """Call the function `module:name` with a path and options; UserError or DamagedError if the file is not sound."""
    module, _, name = check.partition(":")
    getattr(import_module(module), name)(path, **options)


def answer_of(check: str, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run a check; return {"kind", "text"}: kind "" (sound), "user", "damaged" or "memory", text of the error."""
    try:
        run_check(check, path, options)
    except DamagedError as error:
        return {"kind": "damaged", "text": str(error)}
    except UserError as error:
        return {"kind": "user", "text": str(error)}
    except MemoryError:
        return {"kind": "memory", "text": ""}
    return {"kind": "", "text": ""}


def size_of(path: Path) -> int:
    """Size of a file in bytes, or its bytes on the disk if fewer, since a file may have holes; 0 if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return 0
    # Some file systems do not report blocks.
    return min(status.st_size, 512 * status.st_blocks) if status.st_blocks else status.st_size


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Run a block with limits on memory and processor time for a file of `size` bytes; a late process is killed.

    The memory has no limit if the system does not report how much the process has.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime + SECONDS + size / SPEED
    _limit(resource.RLIMIT_CPU, int(seconds) + 1)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        pages = 0
    if pages:
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + MEMORY + TIMES * size)
    try:
        yield
    finally:
        _limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main() -> None:
    """Answer the requests in the lines of standard input until it ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Keep standard output for answers: a library may print to it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        # Import before the limits apply.
        import_module(request["check"].partition(":")[0])
        os.chdir(request["folder"])
        for name in [name for name in os.environ if name.startswith("HDF5_")]:
            del os.environ[name]
        os.environ.update(request["environ"])
        path = Path(request["path"])
        with limited(size_of(path)):
            answer = answer_of(request["check"], path, request["options"])
        print(json.dumps(answer), file=answers, flush=True)
        if answer["kind"] == "memory":
            return


if __name__ == "__main__":
    main()
