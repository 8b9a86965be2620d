"""Run a function on several ranks that are threads of one process.

No process has to be started, and errors show at once. A rank that raises ends the other ranks. A deadlock and
collectives that do not match raise errors without waiting for a timeout. Reductions add neighbours in pairs, in the
order in which MPICH reduces short arrays. A send copies its message at once, as MPI does with small messages.
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

# Seconds in which the other ranks must end after one has raised.
GRACE = 30.0


def run_ranks(
    size: int, work: Callable[[Any], Result], *, patience: float = PATIENCE, timeout: float | None = None
) -> list[Result]:
    """Call work(world) on `size` ranks, each a thread; return the results by rank.

    An error on one rank ends the others and is raised here; of several errors that of the lowest rank. Raise
    DeadlockError if ranks wait for messages that no rank sends, or if one call takes longer than `patience` seconds;
    TimeoutError if all ranks together take longer than `timeout` seconds.
    """
    hub = Hub(size, patience)
    shared = Shared(hub, range(size))
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def rank(number: int) -> None:
        try:
            # NumPy's error state belongs to a thread: turn off its warnings about overflow and NaN on each rank.
            with np.errstate(all="ignore"):
                results[number] = work(Comm(shared, number))
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
        # The ranks still use streams and folders that the caller restores or removes after this error.
        end = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        raise
    if errors:
        raise errors[min(errors)]
    if hub.error is not None:
        raise hub.error
    return [results[number] for number in range(size)]


def _join(threads: Sequence[threading.Thread], hub: Hub, timeout: float | None) -> None:
    """Wait for all threads. Return GRACE seconds after the world has stopped at the latest.

    Raise TimeoutError after `timeout` seconds.
    """
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
