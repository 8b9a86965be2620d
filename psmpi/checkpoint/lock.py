"""One run at a time in a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from psmpi.errors import UserError

# Seconds that the writing process of a run that has just been killed gets to end.
PATIENCE = 30.0


def take(out: Path, tell: Callable[[str], None]) -> IO[bytes]:
    """Take the lock of a run directory, to hold until the file returned is closed in every process that inherits it.

    UserError where another run holds it. On file systems without locks there is none.
    """
    file = (out / ".lock").open("ab")
    told, end = False, time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if not told:
                tell(f"waiting for another run to leave {out}")
                told = True
            if time.monotonic() > end:
                file.close()
                raise UserError(f"--out {out}: another run is writing there; name another folder, or end it") from None
            time.sleep(0.2)
        except OSError:
            return file


def inherit(file: IO[bytes] | None) -> tuple[int, ...]:
    """The descriptors to pass on to a process that is to hold the lock too."""
    with contextlib.suppress(ValueError, OSError):
        if file is not None:
            os.fstat(file.fileno())
            return (file.fileno(),)
    return ()
