"""Lock of a run directory, which only one run at a time may use."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

# Seconds to wait for the writing process of a run that has just been killed.
PATIENCE = 30.0
# Name of the locked file on file systems that cannot lock directories.
NAME = ".lock"


class Lock:
    """Lock of a run directory. The directory itself is locked, so that removing files in it does not free the lock.

    On a file system that cannot lock directories, the file `.lock` is locked; on one without locks, nothing. The lock
    is held until every process that inherits it has closed it.
    """

    def __init__(self, out: Path, patience: float = 0.0, tell: Callable[[str], None] | None = None):
        """Take the lock of `out`. patience: most seconds to wait for another run; tell: prints a line about the wait.

        BlockingIOError if another run has the lock, OSError if `out` cannot be opened.
        """
        self.out = self.path = out
        self.fd = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._wait(patience, tell)
        except BaseException:
            self.close()
            raise

    def _wait(self, patience: float, tell: Callable[[str], None] | None) -> None:
        end = time.monotonic() + patience
        while True:
            try:
                self._lock()
                return
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
                if tell is not None:
                    tell(f"waiting for another run to leave {self.out}")
                    tell = None
                time.sleep(0.2)

    def _lock(self) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            raise
        except OSError:
            if self.path != self.out:
                # This file system has no locks.
                return
        file = os.open(self.out / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        os.close(self.fd)
        self.fd, self.path = file, self.out / NAME
        self._lock()

    @property
    def in_place(self) -> bool:
        """Whether the locked directory or file still has its path: it may have been removed or replaced."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def close(self) -> None:
        """Release the lock in this process."""
        with contextlib.suppress(OSError):
            os.close(self.fd)
        self.fd = -1


def inherit(lock: Lock | None) -> tuple[int, ...]:
    """File descriptors that a child process needs to hold the lock too; () without a lock."""
    return () if lock is None or lock.fd < 0 else (lock.fd,)
