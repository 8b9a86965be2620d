"""Put NaN into the gradients of chosen ranks and steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from psmpi.nn.model import Model
from psmpi.training.numbers import Numbers


@contextmanager
def poisoned(when: Callable[[int, int], bool]) -> Iterator[set[tuple[int, int]]]:
    """Within the block, gradients are NaN on the ranks and in the steps for which when(rank, step) is true.

    Steps count from 1 and are those given to `Numbers.begin`; each rank is a thread. A step that is repeated has sound
    gradients. Yields the set of (rank, step) whose gradients have become NaN so far.
    """
    own, hit = threading.local(), set()
    begin: Any = Numbers.begin
    backward: Any = Model.backward

    def begun(self: Numbers, step: int, epoch: int, samples: int) -> None:
        # A step that is repeated after a rollback has sound gradients.
        own.at = (self.rank, step) if when(self.rank, step) and (self.rank, step) not in hit else None
        begin(self, step, epoch, samples)

    def spoilt(self: Model, tape: Any, dy: np.ndarray, **options: Any) -> None:
        if getattr(own, "at", None) is not None:
            hit.add(own.at)
            dy[...] = np.nan
        backward(self, tape, dy, **options)

    with mock.patch.object(Numbers, "begin", begun), mock.patch.object(Model, "backward", spoilt):
        yield hit
