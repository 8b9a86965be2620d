"""Buffers of minibatches in flight: sample ids, and the outputs and gradients that cross the cuts between blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from psmpi.comm.transfers import Boundary
from psmpi.comm.transfers.base import Handle


@dataclass
class Slots:
    """Sample ids of the minibatches in flight: minibatch k is in row k % ahead.

    ids: (ahead, largest minibatch) int64, -1 after the last sample.
    """

    ids: np.ndarray

    def put(self, k: int, ids: np.ndarray) -> None:
        """Set the sample ids of minibatch k."""
        row = self.ids[k % len(self.ids)]
        row[: len(ids)] = ids
        row[len(ids) :] = -1

    def of(self, k: int) -> np.ndarray:
        """Sample ids (b,) of minibatch k."""
        row = self.ids[k % len(self.ids)]
        ids: np.ndarray = row[: int(np.count_nonzero(row >= 0))]
        return ids


@dataclass
class CutBuffers:
    """One rank's buffers of a cut between two blocks: outputs go up; gradients, or with local losses a credit, go down.

    outputs, targets: (ahead, units * largest minibatch), a row for each minibatch in flight; targets are the gradients
    that the block above returns, None with local losses. ticket: (ahead, 1, 1), the content of credits. handles: the
    messages under way, by row.
    """

    boundary: Boundary
    credit: Boundary | None
    outputs: np.ndarray
    targets: np.ndarray | None
    ticket: np.ndarray
    handles: list[list[Handle]] = field(default_factory=list)

    @property
    def local(self) -> bool:
        """Whether both blocks are on this rank: they share the arrays, without messages."""
        return self.boundary.source == self.boundary.target

    def finish(self, slot: int) -> None:
        """Wait for the messages of a row."""
        for handle in self.handles[slot]:
            handle.finish()
        self.handles[slot].clear()

    def poll(self) -> None:
        """Progress all messages without waiting."""
        for handles in self.handles:
            for handle in handles:
                handle.poll()


def view(array: np.ndarray, slot: int, units: int, b: int) -> np.ndarray:
    """View (units, b) of row `slot`."""
    rows: np.ndarray = array[slot][: units * b].reshape(units, b)
    return rows
