"""Errors in a call that all ranks make: raised on all ranks if all have one; else they end the job."""

from __future__ import annotations

import time
from types import TracebackType

import numpy as np

from psmpi.comm.protocol import World
from psmpi.comm.world import end

# Seconds that a rank with an error waits for errors of other ranks.
PATIENCE = 3.0


class Failures:
    """A block of calls that all ranks make: its error is raised on all ranks if all have one, else ends the job.

    A rank with an error notifies the others, and waits PATIENCE seconds for their errors. If a rank has none, it waits
    in a call that this rank will not make: then the error is printed and the job is aborted.
    """

    def __init__(self, world: World, patience: float = PATIENCE):
        # Messages of their own, apart from what is under way.
        self.comm = world.Dup() if world.size > 1 else world
        self.patience = patience

    def __enter__(self) -> Failures:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.comm.size == 1:
            return
        if error is None:
            self.comm.Free()
        elif isinstance(error, Exception) and not self._met():
            end(error)

    def _met(self) -> bool:
        """Whether all ranks have an error."""
        others = [rank for rank in range(self.comm.size) if rank != self.comm.rank]
        flags = np.zeros(self.comm.size)
        waiting = [self.comm.Irecv(flags[rank : rank + 1], rank, 0) for rank in others]
        sent = [self.comm.Isend(np.ones(1), rank, 0) for rank in others]
        over = time.monotonic() + self.patience
        while waiting and time.monotonic() < over:
            waiting = [one for one in waiting if not one.Test()]
            time.sleep(0.001)
        if not waiting:
            for one in sent:
                one.Wait()
        return not waiting
