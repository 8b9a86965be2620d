"""Tools for tests: ranks that are threads of one process, and psmpi's programs run on them."""

from __future__ import annotations

from psmpi.testing.communicator import Comm
from psmpi.testing.hub import DeadlockError, StoppedError
from psmpi.testing.program import Ended, run_program, train
from psmpi.testing.world import run_ranks

__all__ = ["Comm", "DeadlockError", "Ended", "StoppedError", "run_program", "run_ranks", "train"]
