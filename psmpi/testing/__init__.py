"""Tools for tests: ranks that are threads, psmpi's programs run on them, and checks of classes of one's own."""

from __future__ import annotations

from psmpi.testing.communicator import Comm
from psmpi.testing.hub import DeadlockError, StoppedError
from psmpi.testing.layers import check_layer
from psmpi.testing.losses import check_loss
from psmpi.testing.optimizers import check_optimizer
from psmpi.testing.program import Ended, run_program, train
from psmpi.testing.world import run_ranks

__all__ = [
    "Comm",
    "DeadlockError",
    "Ended",
    "StoppedError",
    "check_layer",
    "check_loss",
    "check_optimizer",
    "run_program",
    "run_ranks",
    "train",
]
