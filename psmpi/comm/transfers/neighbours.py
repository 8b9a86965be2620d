"""Between the ranks of a directed graph: each one's vector to those it points to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers.base import TAGS, Handle, Message, Overlapping, Step, turned


class Neighbours(Overlapping):
    """src (size,) of every rank to its out-neighbours; dst (in-degree, size) are those of the in-neighbours.

    edges: (source, target), numbers of different ranks of the group, the same on all of them. Rows of dst and terms of
    sums are in the order of the ranks. As many of the backward transfers as were ever open at once keep room of
    (out-degree, size) each.
    """

    def __init__(
        self,
        group: Group,
        edges: Iterable[tuple[int, int]],
        size: int,
        dtype: np.dtype,
        ops: NumpyOps | None = None,
    ):
        self.group, self.size, self.dtype, self.ops = group, size, np.dtype(dtype), ops or NumpyOps()
        self.edges = sorted(set(edges))
        if any(a == b for a, b in self.edges):
            raise ValueError("an edge goes from a rank to another: what a rank has itself is not sent")
        self.sources = [a for a, b in self.edges if b == group.rank]
        self.targets = [b for a, b in self.edges if a == group.rank]
        self.free: list[Any] = []

    def begin(self, src: Any, dst: Any, number: int = 0) -> Handle:
        group, tag = self.group, number % TAGS
        requests = [group.irecv(row, rank, tag) for rank, row in zip(self.sources, dst, strict=True)]
        requests += [group.isend(src, rank, tag) for rank in self.targets]

        def arrive() -> None:
            for row in dst:
                group.bridge.arrived(row)

        return Handle(requests, arrive)

    def begin_back(self, dst: Any, src: Any, number: int = 0) -> Handle:
        group, tag = self.group, number % TAGS
        room = self.free.pop() if self.free else self.ops.empty(len(self.targets) * self.size, self.dtype)
        rows = room.reshape(len(self.targets), self.size)
        requests = [group.irecv(row, rank, tag) for rank, row in zip(self.targets, rows, strict=True)]
        requests += [group.isend(row, rank, tag) for rank, row in zip(self.sources, dst, strict=True)]

        def arrive() -> None:
            src.fill(0)
            for row in rows:
                group.bridge.arrived(row)
                src[...] += row
            self.free.append(room)

        return Handle(requests, arrive)

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        nbytes, ranks = self.size * self.dtype.itemsize, self.group.ranks
        out = [(ranks[a], ranks[b], nbytes) for a, b in self.edges]
        return turned(out) if back else out
