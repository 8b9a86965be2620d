"""The halo transfer: outputs of units of a graph, from the ranks that own them to the ranks that use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers.base import TAGS, Handle, Message, Overlapping, Step, turned


class Halo(Overlapping):
    """A transfer of src (own units, b) to dst (needed units, b), both in increasing order of units.

    owners: (units,) the rank of the group that has each unit; needs: for each rank of the group the units that it uses,
    increasing, its own ones among them. A unit goes once to each other rank. Backward sums over all users of a unit.
    Adjacent rows are sent and received in place; others are packed.
    """

    def __init__(
        self,
        group: Group,
        owners: np.ndarray,
        needs: Sequence[np.ndarray],
        dtype: np.dtype,
        ops: NumpyOps | None = None,
    ):
        self.group, self.dtype, self.ops = group, np.dtype(dtype), ops or NumpyOps()
        # Rows that go from one rank to another, of all ranks.
        self.counts: dict[tuple[int, int], int] = {}
        self.outgoing: list[Rows] = []
        self.incoming: list[Rows] = []
        self.free: list[Any] = []
        own = np.flatnonzero(owners == group.rank)
        places = here = np.empty(0, np.int64)
        for user, units in enumerate(needs):
            sources = owners[units]
            for source in np.unique(sources).tolist():
                at = np.flatnonzero(sources == source)
                if source != user:
                    self.counts[source, user] = len(at)
                if user == group.rank == source:
                    places, here = np.searchsorted(own, units[at]), at
                elif source == group.rank:
                    self.outgoing.append(Rows(user, np.searchsorted(own, units[at]), self.ops))
                elif user == group.rank:
                    self.incoming.append(Rows(source, at, self.ops))
        # Whether this rank uses all that it has.
        self.uses_all = len(places) == len(own)
        # Copies of rows that stay on this rank.
        self.own_copies, self.own_copies_back = self.ops.row_copies(places, here), self.ops.row_copies(here, places)

    def begin(self, src: Any, dst: Any, number: int = 0) -> Handle:
        group, tag, b = self.group, number % TAGS, dst.shape[-1]
        room, at = self._room(b), 0
        requests, come = [], []
        for rows in self.incoming:
            into, at = rows.place(dst, room, at)
            requests.append(group.irecv(into, rows.rank, tag))
            come.append(into)
        for rows in self.outgoing:
            values, at = rows.place(src, room, at)
            rows.pack(src, values)
            requests.append(group.isend(values, rows.rank, tag))
        self.own_copies.copy(src, dst)

        def arrive() -> None:
            for rows, values in zip(self.incoming, come, strict=True):
                group.bridge.arrived(values)
                rows.unpack(values, dst)
            self.free.append(room)

        return Handle(requests, arrive)

    def begin_back(self, dst: Any, src: Any, number: int = 0) -> Handle:
        group, tag, b = self.group, number % TAGS, dst.shape[-1]
        room, at = self._room(b), 0
        requests, come = [], []
        for rows in self.outgoing:
            # Received gradients have a buffer of their own, since they are added.
            values = room[at : at + rows.count * b].reshape(rows.count, b)
            at += values.size
            requests.append(group.irecv(values, rows.rank, tag))
            come.append(values)
        for rows in self.incoming:
            values, at = rows.place(dst, room, at)
            rows.pack(dst, values)
            requests.append(group.isend(values, rows.rank, tag))
        if not self.uses_all:
            src.fill(0)
        self.own_copies_back.copy(dst, src)

        def arrive() -> None:
            for rows, values in zip(self.outgoing, come, strict=True):
                group.bridge.arrived(values)
                rows.add(values, src)
            self.free.append(room)

        return Handle(requests, arrive)

    def reserve(self, b: int) -> None:
        """Make room for a transfer of b columns."""
        self.free.append(self._room(b))

    def _room(self, b: int) -> Any:
        """A buffer for all rows that are sent and received."""
        size = b * sum(rows.count for rows in (*self.outgoing, *self.incoming))
        room = self.free.pop() if self.free else None
        return self.ops.empty(size, self.dtype) if room is None or room.size < size else room

    @property
    def nbytes(self) -> int:
        """Bytes of buffers that no transfer uses at the moment."""
        return sum(int(room.nbytes) for room in self.free)

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        ranks, nbytes = self.group.ranks, step.batch * self.dtype.itemsize
        messages = [(ranks[a], ranks[b], count * nbytes) for (a, b), count in self.counts.items()]
        return turned(messages) if back else messages


class Rows:
    """Rows of an array that another rank sends or receives."""

    def __init__(self, rank: int, at: np.ndarray, ops: NumpyOps):
        self.rank, self.count = rank, len(at)
        # Rows side by side need no packing.
        self.slice = slice(int(at[0]), int(at[-1]) + 1) if at[-1] - at[0] + 1 == len(at) else None
        order = np.arange(len(at))
        self.packed, self.spread = ops.row_copies(at, order), ops.row_copies(order, at)

    def place(self, array: Any, room: Any, at: int) -> tuple[Any, int]:
        """Adjacent rows in the array, or a place for packed rows in `room` from `at` on; and the next free place."""
        if self.slice is not None:
            return array[self.slice], at
        b = array.shape[-1]
        stop = at + self.count * b
        return room[at:stop].reshape(self.count, b), stop

    def pack(self, array: Any, values: Any) -> None:
        """Pack the rows into `values`, unless they are adjacent."""
        if self.slice is None:
            self.packed.copy(array, values)

    def unpack(self, values: Any, array: Any) -> None:
        """Copy received rows to their places in the array, unless they are adjacent."""
        if self.slice is None:
            self.spread.copy(values, array)

    def add(self, values: Any, array: Any) -> None:
        """Add received rows to the array."""
        self.spread.add(values, array)
