"""Checks of files that psmpi runs in a separate process, and the fuzzer in its worker.

Outside the fuzzer a crash of that process is harmless. The worker therefore reports which part of its work is a check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psmpi.errors import DamagedError
from psmpi.files.examining import limited, run_check, size_of

# Called with the stage of the work: "looking" within a check, "using" after it.
report: Callable[[str], None] = lambda stage: None  # noqa: E731


@contextmanager
def looking() -> Iterator[None]:
    """Report the block as work that psmpi does in a separate process."""
    report("looking")
    yield
    report("using")


def look(check: str, path: Path, options: dict[str, Any]) -> None:
    """Run psmpi.files.examining.run_check in this process, with the limits of the separate one."""
    with looking(), limited(size_of(path)):
        try:
            run_check(check, path, options)
        except MemoryError:
            raise DamagedError(f"{path} needs more memory to open than its size explains") from None
