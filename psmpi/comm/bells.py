"""Bells by which the ranks of a host wake each other: futexes, words in shared memory on which processes sleep."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

# System calls of Linux.
FUTEX, FUTEX_WAIT, FUTEX_WAKE = {"x86_64": 202, "aarch64": 98, "ppc64le": 221, "riscv64": 98}, 0, 1


class Time(ctypes.Structure):
    """A time in the form of Linux system calls (struct timespec)."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Bells:
    """A bell for each rank of a host, by which other ranks wake it; without futexes ranks sleep for a fixed time.

    A bell is a word in memory that the ranks of the host share: 1 while a rank sleeps, or is about to.
    """

    def __init__(self, local: Any):
        self.number = int(local.rank)
        self.room = _shared(local, mmap.PAGESIZE * -(-4 * local.size // mmap.PAGESIZE))
        self.words = memoryview(self.room).cast("i")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.room))
        call = FUTEX.get(os.uname().machine) if sys.platform == "linux" else None
        self.call = None if call is None else ctypes.CDLL(None, use_errno=True).syscall
        self.code = ctypes.c_long(call or 0)
        self.own = ctypes.c_void_p(self.address + 4 * self.number)
        self.time = Time()
        # Whether this rank yields its core instead of sleeping.
        self.awake = False

    def ring(self, places: Sequence[int]) -> None:
        """Wake the sleeping ones of `ranks`, numbers on this host."""
        for place in places:
            if self.words[place]:
                self.words[place] = 0
                if self.call is not None:
                    self.call(self.code, ctypes.c_void_p(self.address + 4 * place), FUTEX_WAKE, 1, None, None, 0)

    def arm(self) -> None:
        """Announce that this rank is about to sleep. Test the awaited message between this call and `sleep`."""
        self.words[self.number] = 1

    def disarm(self) -> None:
        """Take back the announcement."""
        self.words[self.number] = 0

    def sleep(self, seconds: float) -> bool:
        """Sleep until the bell rings, at most `seconds`. Returns whether it rang."""
        if self.call is None:
            time.sleep(seconds)
        else:
            self.time.nanoseconds = int(1e9 * seconds)
            self.call(self.code, self.own, FUTEX_WAIT, 1, ctypes.byref(self.time), None, 0)
        return not self.words[self.number]


def _shared(local: Any, size: int) -> mmap.mmap:
    """Zeros in memory that the ranks of a host share, an unlinked file. All ranks of `local` call it."""
    name = np.zeros(4096, np.uint8)
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
    if local.rank == 0:
        handle, path = tempfile.mkstemp(prefix="psmpi-bells-", dir=folder)
        os.truncate(handle, size)
        data = np.frombuffer(os.fsencode(path), np.uint8)
        name[: len(data)] = data
    local.Bcast(name, 0)
    if local.rank != 0:
        handle = os.open(os.fsdecode(name.tobytes().rstrip(b"\0")), os.O_RDWR)
    room = mmap.mmap(handle, size)
    os.close(handle)
    local.Barrier()
    if local.rank == 0:
        os.unlink(path)
    return room
