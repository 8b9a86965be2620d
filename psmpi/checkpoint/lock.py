"""One run at a time in a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

# Seconds that the writing process of a run that has just been killed gets to end.
PATIENCE = 30.0
# For file systems that lock files only.
NAME = ".lock"


class Lock:
    """The lock of a run directory, taken on the directory itself: removing files in it does not free the lock.

    On a file system with locks of files alone, the lock of the file `.lock`; on one without locks, none. The lock is
    held until every process that inherits it has closed it.
    """

    def __init__(self, out: Path, patience: float = 0.0, tell: Callable[[str], None] | None = None):
        """Take the lock of `out`, waiting `patience` seconds at most; `tell` hears of a wait.

        BlockingIOError where another run has the lock, OSError where `out` cannot be opened.
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
    def there(self) -> bool:
        """Whether the directory, or the file, that is locked is still the one of that name."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def close(self) -> None:
        """Give the lock up in this process."""
        with contextlib.suppress(OSError):
            os.close(self.fd)
        self.fd = -1


def inherit(lock: Lock | None) -> tuple[int, ...]:
    """The descriptors to pass on to a process that is to hold the lock too."""
    return () if lock is None or lock.fd < 0 else (lock.fd,)
