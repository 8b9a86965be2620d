"""The process that looks at files of strangers, see psmpi.files.examiner: it may crash, and has limits.

A line of JSON asks for one check of one file, and a line answers: what was wrong, or nothing.
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

# Bytes and seconds of processor time of a check, beside those that the size of the file explains.
MEMORY, SECONDS = 384 << 20, 5
# Bytes in memory for a byte of a file (numbers of a text are objects), and bytes of a file that are looked at a second.
TIMES, SPEED = 16, 20e6


def run_check(check: str, path: Path, options: dict[str, Any]) -> None:
    """Call the function `module:name` with a path and options; it raises UserError or DamagedError."""
    module, _, name = check.partition(":")
    getattr(import_module(module), name)(path, **options)


def answer_of(check: str, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a check as plain data: kind "" (nothing is wrong), "user", "damaged" or "memory", and the text."""
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
    """The bytes that a file takes on its disk, or has, where these are fewer: it may have holes; 0 where it is none."""
    try:
        found = path.stat()
    except OSError:
        return 0
    # Some systems do not say what it takes.
    return min(found.st_size, 512 * found.st_blocks) if found.st_blocks else found.st_size


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Limits of this process on memory and processor time for a file of `size` bytes; beyond the time it is killed.

    Where the system does not say how much memory the process has, that has no limit.
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
    """Answer the lines of standard input until it ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What a library prints is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        # Loaded before there is a limit.
        import_module(asked["check"].partition(":")[0])
        os.chdir(asked["folder"])
        for name in [name for name in os.environ if name.startswith("HDF5_")]:
            del os.environ[name]
        os.environ.update(asked["environ"])
        path = Path(asked["path"])
        with limited(size_of(path)):
            answer = answer_of(asked["check"], path, asked["options"])
        print(json.dumps(answer), file=answers, flush=True)
        if answer["kind"] == "memory":
            return


if __name__ == "__main__":
    main()
