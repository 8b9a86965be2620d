"""Windows of a rank without the others, which add nothing and never lag."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.comm.group import Counter

# The value of the clocks of other ranks.
LATER = 1 << 62


class AloneWindows:
    """The factory of windows, in place of psmpi.comm.windows.MpiWindows."""

    def __init__(self, rank: int, size: int, of_host: Sequence[int]):
        self.rank, self.size, self.one_host = rank, size, len(set(of_host)) == 1

    def fault(self) -> str:
        return ""

    def memory(self, nbytes: int) -> AloneMemory:
        return AloneMemory(nbytes)

    def sharded(self, edges: Sequence[int], dtype: np.dtype, counter: Counter) -> AloneSharded:
        return AloneSharded(np.zeros(edges[self.rank + 1] - edges[self.rank], dtype), edges[self.rank], counter)

    def counters(self, count: int) -> AloneCounters:
        return AloneCounters(self.rank, self.size)


class AloneMemory:
    def __init__(self, nbytes: int):
        self.bytes = np.zeros(nbytes, np.uint8)

    def sync(self) -> None:
        """Do nothing: no other rank writes."""

    def free(self) -> None:
        """Do nothing: there is nothing to free."""


class AloneSharded:
    def __init__(self, own: np.ndarray, start: int, counter: Counter):
        self.own, self.start, self.counter = own, start, counter

    def read(self, out: np.ndarray) -> None:
        self.counter.add(0, out.nbytes - self.own.nbytes)

    def add(self, values: np.ndarray) -> None:
        self.counter.add(values.nbytes - self.own.nbytes, 0)

    def read_at(self, places: np.ndarray, out: np.ndarray) -> None:
        out.fill(0)
        self.counter.add(0, out.itemsize * self._remote_count(places))

    def add_at(self, places: np.ndarray, values: np.ndarray) -> None:
        self.counter.add(values.itemsize * self._remote_count(places), 0)

    def _remote_count(self, places: np.ndarray) -> int:
        return int(np.count_nonzero((places < self.start) | (places >= self.start + len(self.own))))

    def flush(self) -> None:
        """Do nothing: no message is under way."""

    def sync(self) -> None:
        """Do nothing: no other rank writes."""

    def free(self) -> None:
        """Do nothing: there is nothing to free."""


class AloneCounters:
    """Counters from which ranks would draw tickets in turn."""

    def __init__(self, rank: int, size: int):
        self.next, self.size = rank, size

    def count(self, number: int, by: int = 1) -> int:
        before = self.next
        self.next += by * self.size
        return before

    def read(self, out: np.ndarray) -> None:
        out.fill(LATER)

    def free(self) -> None:
        """Do nothing: there is nothing to free."""
