"""A world of threads: a function on several ranks in one process.

Four ranks cost no start of a process, and what goes wrong is told at once: a rank that raises ends the others, ranks
that all wait for what nobody sends are found without a timeout, and so are ranks whose collectives do not match. Sums
are made pair by pair, as MPICH makes short ones. What is sent is copied at once, as MPI does with small messages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from psmpi.testing.communicator import Comm
from psmpi.testing.hub import PATIENCE, Hub, StoppedError
from psmpi.testing.shared import Shared

Result = TypeVar("Result")

# Seconds that ranks get to end after one of them has raised.
GRACE = 30.0


def run_ranks(
    size: int, work: Callable[[Any], Result], *, patience: float = PATIENCE, timeout: float | None = None
) -> list[Result]:
    """work(world) on every rank of a world of threads; what each returns.

    What a rank raises ends the others and is raised here: that of the lowest rank where several raise. Ranks that wait
    for what nobody sends are a DeadlockError, and so is a call that takes longer than `patience` seconds; a world that
    takes longer than `timeout` seconds is a TimeoutError.
    """
    hub = Hub(size, patience)
    shared = Shared(hub, range(size))
    found: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def rank(number: int) -> None:
        try:
            # Warnings of numbers that are not finite are a thread's own, and training has none.
            with np.errstate(all="ignore"):
                found[number] = work(Comm(shared, number))
        except StoppedError:
            pass
        except BaseException as error:
            errors[number] = error
            hub.stop(error)
        finally:
            hub.end(number)

    threads = [threading.Thread(target=rank, args=(k,), name=f"rank {k}", daemon=True) for k in range(size)]
    for thread in threads:
        thread.start()
    try:
        _join(threads, hub, timeout)
    except BaseException as error:
        hub.stop(error)
        # What they stand in, streams and folders, is not taken away from under them.
        end = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        raise
    if errors:
        raise errors[min(errors)]
    if hub.error is not None:
        raise hub.error
    return [found[number] for number in range(size)]


def _join(threads: Sequence[threading.Thread], hub: Hub, timeout: float | None) -> None:
    """Wait for all threads: `timeout` seconds, or GRACE once the world has ended."""
    end = None if timeout is None else time.monotonic() + timeout
    grace = None
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5 if end is not None or hub.stopped else 1.0)
            now = time.monotonic()
            if hub.stopped and grace is None:
                grace = now + GRACE
            if grace is not None and now > grace and thread.is_alive():
                return
            if end is not None and now > end and not hub.stopped:
                with hub.lock:
                    report = hub.report()
                raise TimeoutError(f"no end within {timeout:.0f} s: {report}")
