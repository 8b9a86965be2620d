"""The ranks of a world of threads: what each waits for, and the end of all when one raises or none can go on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Seconds that a rank waits in one call while others compute.
PATIENCE = 120.0


class StoppedError(BaseException):
    """Raised in the calls of a rank whose world has ended.

    Not an Exception: code that deals with errors is not to go on.
    """


class DeadlockError(RuntimeError):
    """Ranks wait for what nobody sends."""


class Hub:
    """One lock for all ranks of a world, and what each of them waits for."""

    def __init__(self, size: int, patience: float = PATIENCE):
        self.size, self.patience = size, patience
        self.lock = threading.Lock()
        self.wakes = [threading.Condition(self.lock) for _ in range(size)]
        self.waiting: list[Request | None] = [None] * size
        self.ended: set[int] = set()
        # Why the world ended.
        self.error: BaseException | None = None
        self.stopped = False

    def check(self) -> None:
        """StoppedError in a world that has ended; the lock is held."""
        if self.stopped:
            raise StoppedError("another rank has ended the world")

    def wait(self, request: Request) -> None:
        """Return when the request is ready; the lock is held.

        DeadlockError where it cannot become ready, or is not within `patience` seconds.
        """
        rank, end = request.rank, time.monotonic() + self.patience
        self.check()
        self.waiting[rank] = request
        try:
            while not request.ready():
                if self.stuck():
                    raise DeadlockError(f"ranks wait for what nobody sends: {self.report()}")
                left = end - time.monotonic()
                if left <= 0:
                    raise DeadlockError(f"rank {rank} has waited {self.patience:.0f} s: {self.report()}")
                self.wakes[rank].wait(left)
                self.check()
        finally:
            self.waiting[rank] = None

    def stuck(self) -> bool:
        """Whether no rank can go on; the lock is held."""
        return all(
            rank in self.ended or (request is not None and not request.ready())
            for rank, request in enumerate(self.waiting)
        )

    def report(self) -> str:
        """What each rank waits for, as text."""
        parts = []
        for rank, request in enumerate(self.waiting):
            what = "has ended" if rank in self.ended else "computes" if request is None else f"waits in {request.what}"
            parts.append(f"rank {rank} {what}")
        return ", ".join(parts)

    def wake(self, ranks: Iterable[int]) -> None:
        """Wake those of the ranks that can go on; the lock is held."""
        for rank in ranks:
            request = self.waiting[rank]
            if request is not None and request.ready():
                self.wakes[rank].notify()

    def stop(self, error: BaseException | None = None) -> None:
        """End the world: ranks that wait, or call, get StoppedError."""
        with self.lock:
            self.error = self.error or error
            self.stopped = True
            for wake in self.wakes:
                wake.notify()

    def end(self, rank: int) -> None:
        """Note that a rank makes no more calls."""
        with self.lock:
            self.ended.add(rank)
            stuck = len(self.ended) < self.size and not self.stopped and self.stuck()
            report = self.report() if stuck else ""
        if stuck:
            self.stop(DeadlockError(f"ranks wait for what nobody sends: {report}"))


class Request:
    """Done, by `complete`, once it is `ready`. what: the call, for messages about it.

    sent: an array that is not to be written until then, and the bytes that it had; RuntimeError where it was.
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
                raise RuntimeError(f"rank {self.rank} has written what it sends before {self.what} was done")
        self.done = True
