"""Run `psmpi.fit` on ranks that are threads of this process."""

import threading
from contextlib import contextmanager
from unittest import mock

from psmpi.testing import run_ranks
from psmpi.testing.builder import ThreadSpool

_own = threading.local()


@contextmanager
def ranks_are_threads():
    """Within the block, psmpi.comm.world.start returns the communicator of the thread, else one of a single rank."""
    from psmpi.testing.communicator import Comm
    from psmpi.testing.hub import Hub
    from psmpi.testing.shared import Shared

    def start(tell=None):
        return getattr(_own, "world", None) or Comm(Shared(Hub(1), range(1)), 0)

    with mock.patch("psmpi.comm.world.start", start), mock.patch("psmpi.checkpoint.writer.Spool", ThreadSpool):
        yield


def on_ranks(size, work):
    """Call work(rank) on `size` ranks; return the results by rank, or the errors raised instead."""

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
