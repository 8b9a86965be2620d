"""From every rank of a group to all: what each has computed of its slice of a minibatch's samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group, wait_all
from psmpi.comm.transfers.base import Message, Step, Transfer
from psmpi.comm.transfers.rows import gathered
from psmpi.layout import even_edges


class Slices(Transfer):
    """src (units, b_k) of rank k to all ranks of a group: dst (units, b), the samples in the order of the ranks.

    Slices are consecutive and nearly equal, see `even_edges`. In round k a rank sends to the k-th rank after it and
    receives from the k-th before it. (Collectives would copy the rank's own slice, and the others' once more.) Arrays
    are those of `ops`.
    """

    def __init__(self, group: Group, units: int, dtype: np.dtype, ops: NumpyOps | None = None):
        self.group, self.units, self.dtype, self.ops = group, units, np.dtype(dtype), ops or NumpyOps()
        self.capacity = 0
        self.sent = self.received = self.ops.empty(0, self.dtype)

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples: a slice that is sent and one that is received."""
        if batch > self.capacity:
            self.capacity = batch
            size = self.units * -(-batch // self.group.size)
            self.sent, self.received = (self.ops.empty(size, self.dtype) for _ in range(2))

    @property
    def nbytes(self) -> int:
        return int(self.sent.nbytes + self.received.nbytes)

    def of_rank(self, batch: int, rank: int) -> slice:
        """The samples of a rank of the group in a minibatch of `batch`."""
        edges = even_edges(batch, self.group.size)
        return slice(edges[rank], edges[rank + 1])

    def forward(self, src: Any, dst: Any) -> None:
        b, group = dst.shape[-1], self.group
        self.reserve(b)
        if group.size == 1:
            dst[...] = src
        for k in range(1, group.size):
            to, source = (group.rank + k) % group.size, (group.rank - k) % group.size
            theirs = self.of_rank(b, source)
            values = self._block(self.received, theirs)
            begun = [group.irecv(values, source), group.isend(src, to)]
            if k == 1:
                # While the first messages are under way.
                dst[:, self.of_rank(b, group.rank)] = src
            wait_all(begun)
            group.bridge.arrived(values)
            dst[:, theirs] = values

    def backward(self, dst: Any, src: Any) -> None:
        b, group = dst.shape[-1], self.group
        self.reserve(b)
        mine = self.of_rank(b, group.rank)
        found = src.reshape(self.units, -1)
        if group.size == 1:
            found[...] = dst[:, mine]
        for k in range(1, group.size):
            to, source = (group.rank + k) % group.size, (group.rank - k) % group.size
            theirs = self.of_rank(b, to)
            values, others = self._block(self.received, mine), self._block(self.sent, theirs)
            others[...] = dst[:, theirs]
            begun = [group.irecv(values, source), group.isend(others, to)]
            if k == 1:
                # While the first messages are under way.
                found[...] = dst[:, mine]
            wait_all(begun)
            group.bridge.arrived(values)
            found += values

    def _block(self, room: np.ndarray, samples: slice) -> np.ndarray:
        """The front of a room, for a slice of samples (units, n)."""
        count = samples.stop - samples.start
        found: np.ndarray = room[: self.units * count].reshape(self.units, count)
        return found

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        counts = [at.stop - at.start for at in (self.of_rank(step.batch, k) for k in range(self.group.size))]
        return gathered(self.group.ranks, [self.units * n * self.dtype.itemsize for n in counts], back)
