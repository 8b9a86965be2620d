"""The transfer of columns from each rank of a group to all: values of its slice of a minibatch."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group, wait_all
from psmpi.comm.transfers.base import Message, Step, Transfer
from psmpi.comm.transfers.rows import gathered
from psmpi.layout import even_edges


class Slices(Transfer):
    """A transfer of src (units, b_k) on rank k to dst (units, b) on all ranks of a group, samples in order of ranks.

    Slices are consecutive and nearly equal, see `even_edges`. In round k a rank sends to the k-th rank after it and
    receives from the k-th before it, without the copies that a collective would need. Arrays are arrays of `ops`.
    """

    def __init__(self, group: Group, units: int, dtype: np.dtype, ops: NumpyOps | None = None):
        self.group, self.units, self.dtype, self.ops = group, units, np.dtype(dtype), ops or NumpyOps()
        self.capacity = 0
        self.sent = self.received = self.ops.empty(0, self.dtype)

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples: one slice to send, and one to receive."""
        if batch > self.capacity:
            self.capacity = batch
            size = self.units * -(-batch // self.group.size)
            self.sent, self.received = (self.ops.empty(size, self.dtype) for _ in range(2))

    @property
    def nbytes(self) -> int:
        return int(self.sent.nbytes + self.received.nbytes)

    def of_rank(self, batch: int, rank: int) -> slice:
        """The slice of a rank of the group in a minibatch of `batch` samples."""
        edges = even_edges(batch, self.group.size)
        return slice(edges[rank], edges[rank + 1])

    def forward(self, src: Any, dst: Any) -> None:
        b, group = dst.shape[-1], self.group
        self.reserve(b)
        if group.size == 1:
            dst[...] = src
        for k in range(1, group.size):
            to, source = (group.rank + k) % group.size, (group.rank - k) % group.size
            columns = self.of_rank(b, source)
            values = self._block(self.received, columns)
            begun = [group.irecv(values, source), group.isend(src, to)]
            if k == 1:
                # While the first messages are under way.
                dst[:, self.of_rank(b, group.rank)] = src
            wait_all(begun)
            group.bridge.arrived(values)
            dst[:, columns] = values

    def backward(self, dst: Any, src: Any) -> None:
        b, group = dst.shape[-1], self.group
        self.reserve(b)
        own_columns = self.of_rank(b, group.rank)
        gradient = src.reshape(self.units, -1)
        if group.size == 1:
            gradient[...] = dst[:, own_columns]
        for k in range(1, group.size):
            to, source = (group.rank + k) % group.size, (group.rank - k) % group.size
            columns = self.of_rank(b, to)
            values, others = self._block(self.received, own_columns), self._block(self.sent, columns)
            others[...] = dst[:, columns]
            begun = [group.irecv(values, source), group.isend(others, to)]
            if k == 1:
                # While the first messages are under way.
                gradient[...] = dst[:, own_columns]
            wait_all(begun)
            group.bridge.arrived(values)
            gradient += values

    def _block(self, room: np.ndarray, samples: slice) -> np.ndarray:
        """The front of a buffer, as a slice of samples (units, n)."""
        count = samples.stop - samples.start
        block: np.ndarray = room[: self.units * count].reshape(self.units, count)
        return block

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        counts = [at.stop - at.start for at in (self.of_rank(step.batch, k) for k in range(self.group.size))]
        return gathered(self.group.ranks, [self.units * n * self.dtype.itemsize for n in counts], back)
