"""Who takes which minibatch, and how far a rank may be ahead of others (Ho et al. 2013, stale synchronous parallel)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from psmpi.comm.protocol import Communicator
from psmpi.comm.watch.flight import receiving
from psmpi.comm.windows import Counters

# Seconds between looks at other clocks, first and at most.
SHORT, LONG = 2e-5, 1e-3


class Turns:
    """Minibatches for ranks in turn. `clock` is how many a rank has done, and what was added before is there.

    A rank begins with its c-th only while c - the least clock <= bound; None: whenever it likes.
    """

    def __init__(self, rank: int, size: int, bound: int | None, counters: Counters | None, world: Communicator):
        self.rank, self.size, self.bound, self.counters, self.world = rank, size, bound, counters, world
        self.clocks = np.zeros(size, np.int64)
        self.clock = self.lead = 0

    def mine(self, turn: int) -> bool:
        """Whether this rank takes minibatch `turn`; asked for each, in their order."""
        return turn % self.size == self.rank

    def restart(self, turn: int, barrier: Callable[[], None]) -> None:
        """Go on with minibatch `turn`; all ranks call it together, with what makes all wait for all."""
        past = self.clock
        self.clock = max(0, turn - self.rank + self.size - 1) // self.size
        if self.counters is not None and self.bound is not None:
            self.counters.count(self.rank, self.clock - past)
            barrier()

    def begin(self) -> None:
        """Wait until this rank may begin with its next minibatch."""
        if self.counters is None or self.bound is None:
            return
        self.counters.read(self.clocks)
        if self.clock - self.clocks.min() > self.bound:
            with receiving(self.world, int(self.clocks.argmin())):
                self._wait()
        self.lead = max(self.lead, self.clock - int(self.clocks.min()))

    def _wait(self) -> None:
        assert self.counters is not None and self.bound is not None
        nap = SHORT
        while self.clock - self.clocks.min() > self.bound:
            time.sleep(nap)
            nap = min(LONG, 2 * nap)
            self.counters.read(self.clocks)

    def end(self) -> None:
        """Count a minibatch whose additions are there."""
        self.clock += 1
        if self.counters is not None and self.bound is not None:
            self.counters.count(self.rank)


class Tickets(Turns):
    """Minibatches for whoever comes first. A rank has the number of its next one before those before it are done."""

    def __init__(self, rank: int, size: int, counters: Counters, world: Communicator):
        super().__init__(rank, size, None, counters, world)
        self.next = counters.count(0)

    def restart(self, turn: int, barrier: Callable[[], None]) -> None:
        assert self.counters is not None
        barrier()
        if self.rank == 0:
            self.counters.count(0, turn - self.counters.count(0, 0))
        barrier()
        self.next = self.counters.count(0)

    def mine(self, turn: int) -> bool:
        return turn == self.next

    def end(self) -> None:
        super().end()
        assert self.counters is not None
        self.next = self.counters.count(0)
