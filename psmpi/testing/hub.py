"""Waiting and stopping of ranks that are threads: the world ends when a rank raises or when all ranks are stuck."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Seconds that a rank waits in one call before it raises DeadlockError.
PATIENCE = 120.0


class StoppedError(BaseException):
    """Another rank has ended the world of this rank.

    This is not an Exception, so that `except Exception` in the code under test does not catch it.
    """


class DeadlockError(RuntimeError):
    """Ranks wait for messages that no rank sends."""


class Hub:
    """The lock of a world of ranks, and the request that each rank waits for."""

    def __init__(self, size: int, patience: float = PATIENCE):
        self.size, self.patience = size, patience
        self.lock = threading.Lock()
        self.wakes = [threading.Condition(self.lock) for _ in range(size)]
        self.waiting: list[Request | None] = [None] * size
        self.ended: set[int] = set()
        # The error that ended the world.
        self.error: BaseException | None = None
        self.stopped = False

    def check(self) -> None:
        """Raise StoppedError if the world has ended. The caller holds the lock."""
        if self.stopped:
            raise StoppedError("another rank has ended the world")

    def wait(self, request: Request) -> None:
        """Return when the request is ready. The caller holds the lock.

        Raise DeadlockError if the request cannot become ready, or is not ready after `patience` seconds.
        """
        rank, end = request.rank, time.monotonic() + self.patience
        self.check()
        self.waiting[rank] = request
        try:
            while not request.ready():
                if self.stuck():
                    raise DeadlockError(f"ranks wait for messages that no rank sends: {self.report()}")
                left = end - time.monotonic()
                if left <= 0:
                    raise DeadlockError(f"rank {rank} has waited {self.patience:.0f} s: {self.report()}")
                self.wakes[rank].wait(left)
                self.check()
        finally:
            self.waiting[rank] = None

    def stuck(self) -> bool:
        """Whether each rank has ended or waits for a request that is not ready. The caller holds the lock."""
        return all(
            rank in self.ended or (request is not None and not request.ready())
            for rank, request in enumerate(self.waiting)
        )

    def report(self) -> str:
        """The state of each rank as text: ended, computing, or the call in which it waits."""
        parts = []
        for rank, request in enumerate(self.waiting):
            what = "has ended" if rank in self.ended else "computes" if request is None else f"waits in {request.what}"
            parts.append(f"rank {rank} {what}")
        return ", ".join(parts)

    def wake(self, ranks: Iterable[int]) -> None:
        """Wake those of `ranks` whose requests are ready. The caller holds the lock."""
        for rank in ranks:
            request = self.waiting[rank]
            if request is not None and request.ready():
                self.wakes[rank].notify()

    def stop(self, error: BaseException | None = None) -> None:
        """End the world: ranks that wait now or communicate later raise StoppedError."""
        with self.lock:
            self.error = self.error or error
            self.stopped = True
            for wake in self.wakes:
                wake.notify()

    def end(self, rank: int) -> None:
        """Record that a rank makes no more calls; end the world if all others are stuck."""
        with self.lock:
            self.ended.add(rank)
            stuck = len(self.ended) < self.size and not self.stopped and self.stuck()
            report = self.report() if stuck else ""
        if stuck:
            self.stop(DeadlockError(f"ranks wait for messages that no rank sends: {report}"))


class Request:
    """Nonblocking call: once ready() is true, Wait and Test call complete() and the request is done.

    what: the name of the call in messages. sent: an array that the caller must not write before the request is done,
    and a copy of it; Wait and Test raise RuntimeError if the two differ.
    """

    def __init__(
        self, hub: Hub, rank: int, what: str, ready: Callable[[], bool], complete: Callable[[], None] | None = None
    ):
        self.hub, self.rank, self.what, self.ready, self.complete = hub, rank, what, ready, complete
        self.done = False
        self.sent: tuple[NDArray[Any], NDArray[Any]] | None = None

    def Test(self) -> bool:
        with self.hub.lock:
            self.hub.check()
            if not self.done and self.ready():
                self._finish()
            return self.done

    def Wait(self) -> None:
        with self.hub.lock:
            if not self.done:
                self.hub.wait(self)
                self._finish()

    def _finish(self) -> None:
        if self.complete is not None:
            self.complete()
        if self.sent is not None:
            now, then = (array.reshape(-1).view(np.uint8) for array in self.sent)
            if not np.array_equal(now, then):
                raise RuntimeError(f"rank {self.rank} wrote to the array that it sends before {self.what} was done")
        self.done = True
