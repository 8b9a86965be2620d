"""One-sided windows between threads of one process: plain arrays and a lock, with the interface of psmpi.comm.windows.

Every access to a sharded vector or to counters holds the lock, so that accesses are atomic.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psmpi.comm.group import Counter
from psmpi.comm.windows import find_fault


class ThreadWindows:
    """The windows of a communicator of threads. All ranks are on one host."""

    one_host = True

    def __init__(self, comm: Any):
        self.comm = comm

    def fault(self) -> str:
        return find_fault(self, self.comm)

    def memory(self, nbytes: int) -> ThreadMemory:
        return ThreadMemory(self._first(np.zeros(nbytes, np.uint8) if self.comm.rank == 0 else None))

    def sharded(self, edges: Sequence[int], dtype: np.dtype[Any], counter: Counter) -> ThreadSharded:
        made = (np.zeros(edges[-1], dtype), threading.Lock()) if self.comm.rank == 0 else None
        values, lock = self._first(made)
        return ThreadSharded(values, lock, edges[self.comm.rank], edges[self.comm.rank + 1], counter)

    def counters(self, count: int) -> ThreadCounters:
        return ThreadCounters(
            *self._first((np.zeros(count, np.int64), threading.Lock()) if self.comm.rank == 0 else None)
        )

    def _first(self, made: Any) -> Any:
        """The object that rank 0 gives; collective."""
        return self.comm.allgather(made)[0]


class ThreadMemory:
    def __init__(self, room: NDArray[np.uint8]):
        self.bytes = room

    def sync(self) -> None:
        """Threads see what others write."""

    def free(self) -> None:
        """The last one that knows it frees it."""


class ThreadSharded:
    def __init__(self, values: NDArray[Any], lock: threading.Lock, start: int, stop: int, counter: Counter):
        self.values, self.lock, self.start, self.stop, self.counter = values, lock, start, stop, counter
        self.own = values[start:stop]

    def read(self, out: NDArray[Any]) -> None:
        with self.lock:
            out[...] = self.values
        self.counter.add(0, self.values.nbytes - self.own.nbytes)

    def add(self, values: NDArray[Any]) -> None:
        with self.lock:
            self.values += values
        self.counter.add(self.values.nbytes - self.own.nbytes, 0)

    def read_at(self, places: NDArray[np.int64], out: NDArray[Any]) -> None:
        with self.lock:
            out[...] = self.values[places]
        self.counter.add(0, out.itemsize * self._remote_count(places))

    def add_at(self, places: NDArray[np.int64], values: NDArray[Any]) -> None:
        with self.lock:
            self.values[places] += values
        self.counter.add(values.itemsize * self._remote_count(places), 0)

    def _remote_count(self, places: NDArray[np.int64]) -> int:
        return int(np.count_nonzero((places < self.start) | (places >= self.stop)))

    def flush(self) -> None:
        """Additions are made at once."""

    def sync(self) -> None:
        """Threads see what others write."""

    def free(self) -> None:
        """The last one that knows it frees it."""


class ThreadCounters:
    def __init__(self, values: NDArray[np.int64], lock: threading.Lock):
        self.values, self.lock = values, lock

    def count(self, number: int, by: int = 1) -> int:
        with self.lock:
            before = int(self.values[number])
            self.values[number] += by
        return before

    def read(self, out: NDArray[np.int64]) -> None:
        with self.lock:
            out[...] = self.values[: len(out)]

    def free(self) -> None:
        """The last one that knows it frees it."""
