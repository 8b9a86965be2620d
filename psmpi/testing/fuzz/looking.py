"""The part of the work on a file that another process does in earnest, which may be lost there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psmpi.errors import DamagedError
from psmpi.files.examining import limited, run_check, size_of

# What hears where the work is: "looking", or "using" what was looked at.
report: Callable[[str], None] = lambda stage: None  # noqa: E731


@contextmanager
def looking() -> Iterator[None]:
    """A block whose work another process does in earnest."""
    report("looking")
    yield
    report("using")


def look(check: str, path: Path, options: dict[str, Any]) -> None:
    """As `psmpi.files.examining.run_check`, in this process, with the limits that the other one has."""
    with looking(), limited(size_of(path)):
        try:
            run_check(check, path, options)
        except MemoryError:
            raise DamagedError(f"{path} takes more memory to open than its size explains") from None
