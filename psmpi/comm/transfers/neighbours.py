"""The transfer along the edges of a directed graph of places: the vector of each place goes to its out-neighbours.

Several places may lie on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers.base import TAGS, Handle, Message, Overlapping, Step, turned

Edge = tuple[int, int]


class Neighbours(Overlapping):
    """A transfer of src (places of this rank, size) to dst (in-neighbours on other ranks, size), in order of places.

    edges: (source, target), numbers of different places, the same on all ranks. owners: for each place its rank in the
    group, increasing; by default each rank is a place. Places of one rank exchange nothing, and a place with several
    out-neighbours on a rank is sent there once. The largest number of backward transfers open at once determines the
    receive buffers.
    """

    def __init__(
        self,
        group: Group,
        edges: Iterable[Edge],
        size: int,
        dtype: np.dtype,
        ops: NumpyOps | None = None,
        owners: Sequence[int] | None = None,
    ):
        self.group, self.size, self.dtype, self.ops = group, size, np.dtype(dtype), ops or NumpyOps()
        self.owners = tuple(range(group.size)) if owners is None else tuple(owners)
        self.first = self.owners.index(group.rank) if group.rank in self.owners else 0
        self.own_count = self.owners.count(group.rank)
        self.free: list[Any] = []
        self.plan(edges)

    def plan(self, edges: Iterable[Edge]) -> None:
        """Replace the edges. All ranks call it between the same transfers."""
        every = sorted(set(edges))
        if any(a == b for a, b in every):
            raise ValueError("an edge goes from a place to another: what a place has itself is not sent")
        own = self.owners
        # (place, rank) of each message, for all ranks.
        self.links = sorted({(a, own[b]) for a, b in every if own[a] != own[b]})
        self.sources = [a for a, rank in self.links if rank == self.group.rank]
        self.targets = [(a, rank) for a, rank in self.links if own[a] == self.group.rank]

    def begin(self, src: Any, dst: Any, number: int = 0) -> Handle:
        group, tag = self.group, number % TAGS
        requests = [group.irecv(row, self.owners[a], tag) for a, row in zip(self.sources, dst, strict=True)]
        own = self._own(src)
        requests += [group.isend(own[a - self.first], rank, tag) for a, rank in self.targets]

        def arrive() -> None:
            for row in dst:
                group.bridge.arrived(row)

        return Handle(requests, arrive)

    def begin_back(self, dst: Any, src: Any, number: int = 0) -> Handle:
        group, tag = self.group, number % TAGS
        room = self.free.pop() if self.free else None
        if room is None or room.size < len(self.targets) * self.size:
            room = self.ops.empty(len(self.targets) * self.size, self.dtype)
        rows = room[: len(self.targets) * self.size].reshape(len(self.targets), self.size)
        requests = [group.irecv(row, rank, tag) for (_, rank), row in zip(self.targets, rows, strict=True)]
        requests += [group.isend(row, self.owners[a], tag) for a, row in zip(self.sources, dst, strict=True)]

        def arrive() -> None:
            own = self._own(src)
            own.fill(0)
            for (a, _), row in zip(self.targets, rows, strict=True):
                group.bridge.arrived(row)
                own[a - self.first] += row
            self.free.append(room)

        return Handle(requests, arrive)

    def _own(self, src: Any) -> Any:
        """The vectors (places, size) of this rank's places; a single one may have the shape (size,)."""
        return None if src is None else src.reshape(self.own_count, self.size)

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        nbytes, ranks = self.size * self.dtype.itemsize, self.group.ranks
        out = [(ranks[self.owners[a]], ranks[rank], nbytes) for a, rank in self.links]
        return turned(out) if back else out
