"""Checks of a file that crash or use too much memory or time: they test the limits of the process that runs checks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def crash(path: Path) -> None:
    """End with SIGSEGV, as a library that writes to invalid memory."""
    os.kill(os.getpid(), signal.SIGSEGV)


def fill(path: Path) -> None:
    """Allocate memory until there is none left."""
    blocks = [bytes(1)]
    while True:
        blocks.append(b"x" * (64 << 20))


def spin(path: Path) -> None:
    """Use processor time for ever."""
    while True:
        pass


def wait(path: Path) -> None:
    """Sleep for 10 minutes, as a check that waits for another program."""
    time.sleep(600)
