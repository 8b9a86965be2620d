"""`psmpi.fit` on ranks that are threads of this process."""

import threading
from contextlib import contextmanager
from unittest import mock

from psmpi.testing import run_ranks
from psmpi.testing.builder import ThreadSpool

_own = threading.local()


@contextmanager
def ranks_are_threads():
    """A block in which `psmpi.comm.world.start` finds the world of its thread, one rank where it has none."""
    from psmpi.testing.communicator import Comm
    from psmpi.testing.hub import Hub
    from psmpi.testing.shared import Shared

    def start(tell=None):
        return getattr(_own, "world", None) or Comm(Shared(Hub(1), range(1)), 0)

    with mock.patch("psmpi.comm.world.start", start), mock.patch("psmpi.checkpoint.writer.Spool", ThreadSpool):
        yield


def on_ranks(size, work):
    """What work(rank) returns, or the error that it raises, on each of `size` ranks."""

    def call(world):
        _own.world = world
        try:
            return work(world.rank)
        except Exception as error:
            return error
        finally:
            _own.world = None

    with ranks_are_threads():
        return run_ranks(size, call)
