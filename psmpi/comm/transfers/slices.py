"""From every rank of a group to all: what each has computed of its slice of a minibatch's samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers.base import Message, Step, Transfer
from psmpi.comm.transfers.rows import gathered
from psmpi.layout import even_edges


class Slices(Transfer):
    """src (units, b_k) of rank k to all ranks of a group: dst (units, b), the samples in the order of the ranks.

    Slices are consecutive and nearly equal, see `even_edges`. Forward is an all-gather, backward a reduce-scatter, both
    through a room in which each rank's slice is contiguous. Arrays are those of `ops`.
    """

    def __init__(self, group: Group, units: int, dtype: np.dtype, ops: NumpyOps | None = None):
        self.group, self.units, self.dtype, self.ops = group, units, np.dtype(dtype), ops or NumpyOps()
        self.reserve(0)

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        self.room = self.ops.empty(self.units * batch, self.dtype)

    @property
    def nbytes(self) -> int:
        return int(self.room.nbytes)

    def of_rank(self, batch: int, rank: int) -> slice:
        """The samples of a rank of the group in a minibatch of `batch`."""
        edges = even_edges(batch, self.group.size)
        return slice(edges[rank], edges[rank + 1])

    def forward(self, src: Any, dst: Any) -> None:
        counts, blocks = self._blocks(dst.shape[-1])
        self.group.allgatherv(src, self._front(sum(counts)), counts)
        for at, block in blocks:
            dst[:, at] = block

    def backward(self, dst: Any, src: Any) -> None:
        counts, blocks = self._blocks(dst.shape[-1])
        for at, block in blocks:
            block[...] = dst[:, at]
        src[...] = self.group.reduce_scatter(self._front(sum(counts)), counts).reshape(src.shape)

    def _front(self, size: int) -> np.ndarray:
        found: np.ndarray = self.room[:size]
        return found

    def _blocks(self, batch: int) -> tuple[list[int], list[tuple[slice, np.ndarray]]]:
        """Elements of each rank's slice; the samples of each slice, and its block of the room (units, samples)."""
        if self.room.size < self.units * batch:
            self.reserve(batch)
        samples = [self.of_rank(batch, k) for k in range(self.group.size)]
        blocks = [self.room[self.units * at.start : self.units * at.stop].reshape(self.units, -1) for at in samples]
        return [block.size for block in blocks], list(zip(samples, blocks, strict=True))

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        counts = [at.stop - at.start for at in (self.of_rank(step.batch, k) for k in range(self.group.size))]
        return gathered(self.group.ranks, [self.units * n * self.dtype.itemsize for n in counts], back)
