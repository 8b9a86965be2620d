"""Checks of a file that take what they should not: they show that the process that looks at files has limits."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def crash(path: Path) -> None:
    """End as a library does that writes where it should not."""
    os.kill(os.getpid(), signal.SIGSEGV)


def fill(path: Path) -> None:
    """Take memory until there is none."""
    blocks = [bytes(1)]
    while True:
        blocks.append(b"x" * (64 << 20))


def spin(path: Path) -> None:
    """Take processor time for ever."""
    while True:
        pass


def wait(path: Path) -> None:
    """Wait, as for a file that another program has to write."""
    time.sleep(600)
