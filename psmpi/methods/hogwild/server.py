"""Weights on a server, rank 0, which adds the changes that workers send: for MPI libraries without working windows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers import Gather, Message
from psmpi.comm.watch.flight import receiving
from psmpi.methods.hogwild.stores import Store

# Messages of a worker: END of a minibatch, READ the weights, a CHANGE follows (with the version of the weights that it
# was made from), STOP for good. END is 0, as the zeros of ranks that are not there must ask for no answer.
END, READ, CHANGE, STOP = range(4)
WORDS = 2 * 8
# Polls of all workers without a message before the server sleeps, and its longest sleep in seconds.
LOOKS, NAP = 200, 5e-4


class ServerStore(Store):
    """Shared weights on a server: the server's w (n,) are the weights, a worker's w is its last copy.

    An update of a worker is a READ and a CHANGE, which names the version of the weights that it was made from. The
    server polls the workers in turn, so that it serves all of them. A worker more than `bound` minibatches ahead of the
    slowest one waits for the answer to its READ. histogram: counts of changes by the number of other changes that the
    server added since the READ.
    """

    def __init__(
        self,
        n: int,
        share: slice,
        group: Group,
        uncounted: Group,
        whole: Gather,
        bound: int | None,
        dtype: np.dtype,
    ):
        self.group, self.uncounted, self.whole, self.bound = group, uncounted, whole, bound
        self.server, self.workers = group.rank == 0, group.size - 1
        self.w = np.zeros(n, dtype)
        self.share = self.w[share]
        self.version = 0
        self.histogram = np.zeros(0, np.int64)
        # On the server: a received change, and for each worker its last message, finished minibatches, and if it waits.
        self.change = np.zeros(n if self.server else 0, dtype)
        self.headers = np.zeros((self.workers + 1, 2), np.int64)
        self.done, self.waits = np.zeros(self.workers, np.int64), np.zeros(self.workers, bool)
        self.stopped = 0
        self.owned = (self.w, self.change)
        # These receives are not counted; `_look` counts each message that has arrived.
        self.requests = (
            [uncounted.irecv(self.headers[k + 1], k + 1) for k in range(self.workers)] if self.server else []
        )

    def read(self) -> None:
        version = np.empty(1, np.int64)
        self.group.send(np.array([READ, 0]), 0)
        self.group.receive(version, 0)
        self.group.receive(self.w, 0)
        self.version = int(version[0])

    def add(self, change: np.ndarray, factor: float) -> None:
        if factor != 1:
            change *= change.dtype.type(factor)
        self.group.send(np.array([CHANGE, self.version]), 0)
        self.group.send(change, 0)

    def end(self) -> None:
        self.group.send(np.array([END, 0]), 0)

    def serve(self, worker: int, minibatches: int) -> None:
        """On the server: serve all workers until `worker`, from 0, has finished that many minibatches."""
        with receiving(self.group.comm, worker + 1):
            self._until(lambda: bool(self.done[worker] >= minibatches))

    def _until(self, done: Callable[[], bool]) -> None:
        idle, nap = 0, 2e-5
        while not done():
            if sum(map(self._look, range(self.workers))):
                idle, nap = 0, 2e-5
                continue
            idle += 1
            if idle < LOOKS:
                os.sched_yield()
            else:
                time.sleep(nap)
                nap = min(NAP, 2 * nap)

    def _look(self, worker: int) -> bool:
        """Serve a request of a worker, if there is one; return whether there was."""
        if self.waits[worker]:
            if not self._may_begin(worker):
                return False
            self.waits[worker] = False
            self._answer(worker)
            return True
        if not self.requests[worker].Test():
            return False
        self.group.counter.add(0, WORDS)
        kind, version = self.headers[worker + 1].tolist()
        if kind == STOP:
            self.stopped += 1
            # The worker sends no more messages.
            self.waits[worker] = True
            self.done[worker] = np.iinfo(np.int64).max
            return True
        if kind == READ:
            self.waits[worker] = True
            return True
        if kind == CHANGE:
            self._take(version, worker + 1)
        else:
            self.done[worker] += 1
        self._listen(worker)
        return True

    def _may_begin(self, worker: int) -> bool:
        return not self.stopped and (self.bound is None or self.done[worker] - self.done.min() <= self.bound)

    def _answer(self, worker: int) -> None:
        self.group.send(np.array([self.version]), worker + 1)
        self.group.send(self.w, worker + 1)
        self._listen(worker)

    def _take(self, version: int, rank: int) -> None:
        self.group.receive(self.change, rank)
        self.w += self.change
        late = self.version - version
        if late >= len(self.histogram):
            self.histogram = np.pad(self.histogram, (0, late + 1 - len(self.histogram)))
        self.histogram[late] += 1
        self.version += 1

    def _listen(self, worker: int) -> None:
        self.requests[worker] = self.uncounted.irecv(self.headers[worker + 1], worker + 1)

    def settle(self) -> None:
        # Every worker has made all of its steps, and the server has received their changes.
        self.uncounted.bcast(self.w, 0)

    def loaded(self) -> None:
        self.whole.forward(self.share, self.w)

    def restart(self, turn: int) -> None:
        """Set the counts of finished minibatches so that the run goes on with minibatch `turn`."""
        self.done[:] = (turn + self.workers - 1 - np.arange(self.workers)) // self.workers

    def close(self) -> None:
        if not self.server:
            self.group.send(np.array([STOP, 0]), 0)
        else:
            self._until(lambda: self.stopped == self.workers)

    def messages(self, worker: int, updates: int) -> list[Message]:
        """Return the messages between `worker`, from 0, and the server for a minibatch of `updates` updates."""
        rank, own = worker + 1, self.w.nbytes
        return [(rank, 0, WORDS), *[(rank, 0, 2 * WORDS + own), (0, rank, WORDS // 2 + own)] * updates]
