"""Assignment of minibatches to ranks, and the bound on staleness (stale synchronous parallel, Ho et al. 2013)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from psmpi.comm.protocol import Communicator
from psmpi.comm.watch.flight import receiving
from psmpi.comm.windows import Counters

# First and longest pause between two reads of the other clocks, in seconds.
SHORT, LONG = 2e-5, 1e-3


class Turns:
    """Minibatches for ranks in turn, with a bound on staleness.

    clock: the minibatches that this rank has finished, whose additions are in the shared weights. A rank begins its
    next minibatch only if clock - the least clock of all ranks <= bound; with bound None it never waits.
    """

    def __init__(self, rank: int, size: int, bound: int | None, counters: Counters | None, world: Communicator):
        self.rank, self.size, self.bound, self.counters, self.world = rank, size, bound, counters, world
        self.clocks = np.zeros(size, np.int64)
        self.clock = self.lead = 0

    def takes(self, turn: int) -> bool:
        """Whether this rank takes minibatch `turn`; callers ask for every minibatch, in order."""
        return turn % self.size == self.rank

    def restart(self, turn: int, barrier: Callable[[], None]) -> None:
        """Set the clocks so that the run goes on with minibatch `turn`. Collective; barrier: a barrier of all ranks."""
        past = self.clock
        self.clock = max(0, turn - self.rank + self.size - 1) // self.size
        if self.counters is not None and self.bound is not None:
            self.counters.count(self.rank, self.clock - past)
            barrier()

    def begin(self) -> None:
        """Wait until the bound allows this rank's next minibatch."""
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
        """Count a minibatch whose additions are in the shared weights."""
        self.clock += 1
        if self.counters is not None and self.bound is not None:
            self.counters.count(self.rank)


class Tickets(Turns):
    """Minibatches for the rank that comes first: a shared counter hands out their numbers.

    next: the number of this rank's next minibatch, which the rank draws when it has finished the one before.
    """

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

    def takes(self, turn: int) -> bool:
        return turn == self.next

    def end(self) -> None:
        super().end()
        assert self.counters is not None
        self.next = self.counters.count(0)
