"""All-reduces made of single messages: ring, recursive doubling, recursive halving and doubling.

Each message is counted when it is sent. Thakur, Rabenseifner and Gropp, "Optimization of collective communication
operations in MPICH" (2005), has the three; words sent by a rank for D elements on P ranks: 2 D (P-1)/P, D log2 P,
2 D (P-1)/P.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from psmpi.comm.group import Group, all_done, wait_all
from psmpi.comm.protocol import Request
from psmpi.comm.transfers.base import Message
from psmpi.errors import UserError

Algorithm = Callable[[Group, np.ndarray], None]


def _exchange(group: Group, send: np.ndarray, to: int, receive: np.ndarray, source: int) -> None:
    group.comm.Sendrecv(send, to, 0, receive, source, 0)
    group.counter.add(send.nbytes, receive.nbytes)


def _segments(size: int, pieces: int) -> list[slice]:
    edges = [size * k // pieces for k in range(pieces + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


class Ring:
    """The sum of one vector over a group by a ring, for repeated use: `begin`, then `push` now and then, then `wait`.

    Each segment goes around the ring twice: once to be summed, once to be distributed. tag: of the messages of this
    sum, apart from those of other sums under way.
    """

    def __init__(self, group: Group, vector: np.ndarray, tag: int = 0):
        self.group, self.vector, self.tag = group, vector, tag
        self.segments = _segments(vector.size, group.size)
        self.room = np.empty(max(s.stop - s.start for s in self.segments), vector.dtype)
        self.steps, self.step = 2 * (group.size - 1), 0
        self.requests: list[Request] = []

    def messages(self) -> list[Message]:
        """Messages of the sum, of all ranks."""
        size, ranks, nbytes = self.group.size, self.group.ranks, self.vector.nbytes
        lengths = [(s.stop - s.start) * self.vector.itemsize for s in self.segments]
        # All but two segments go out twice.
        sent = [2 * nbytes - lengths[(rank + 1) % size] - lengths[(rank + 2) % size] for rank in range(size)]
        return [(ranks[rank], ranks[(rank + 1) % size], sent[rank]) for rank in range(size) if self.steps]

    def begin(self) -> None:
        """Send the first segment."""
        if self.steps:
            self.wire = self.group.bridge.outgoing(self.vector)
            self.step = 0
            self._start()

    def _places(self) -> tuple[slice, slice]:
        """The segments that this step sends and receives."""
        rank, size, k = self.group.rank, self.group.size, self.step
        if k < size - 1:
            return self.segments[(rank - k) % size], self.segments[(rank - k - 1) % size]
        k -= size - 1
        return self.segments[(rank + 1 - k) % size], self.segments[(rank - k) % size]

    def _start(self) -> None:
        group = self.group
        sent_part, received_part = self._places()
        summing = self.step < group.size - 1
        into = self.room[: received_part.stop - received_part.start] if summing else self.wire[received_part]
        before, after = (group.rank - 1) % group.size, (group.rank + 1) % group.size
        self.requests = [
            group.comm.Irecv(into, before, self.tag),
            group.comm.Isend(self.wire[sent_part], after, self.tag),
        ]
        group.counter.add(self.wire[sent_part].nbytes, into.nbytes)

    def _advance(self) -> None:
        if self.step < self.group.size - 1:
            _, received_part = self._places()
            self.wire[received_part] += self.room[: received_part.stop - received_part.start]
        self.step += 1
        if self.step < self.steps:
            self._start()
        else:
            self.group.bridge.arrived(self.vector)

    def push(self) -> None:
        """Make progress as far as messages have arrived."""
        while self.step < self.steps and all_done(self.requests):
            self._advance()

    def wait(self) -> None:
        """Finish the sum."""
        while self.step < self.steps:
            wait_all(self.requests)
            self._advance()


def ring(group: Group, vector: np.ndarray) -> None:
    """Sum vector (n,) over the group, in place, by a ring."""
    one = Ring(group, vector)
    one.begin()
    one.wait()


def doubling(group: Group, vector: np.ndarray) -> None:
    """Sum vector (n,) over the group, in place, by recursive doubling: ranks at distances 1, 2, 4, ... exchange it."""
    _check(group, "doubling")
    if group.size == 1:
        return
    wire = group.bridge.outgoing(vector)
    room, distance = np.empty_like(wire), 1
    while distance < group.size:
        other = group.rank ^ distance
        _exchange(group, wire, other, room, other)
        # Both ranks add in the same order, and get the same bits.
        if other < group.rank:
            np.add(room, wire, out=wire)
        else:
            wire += room
        distance *= 2
    group.bridge.arrived(vector)


def halving(group: Group, vector: np.ndarray) -> None:
    """Sum vector (n,) over the group, in place, by recursive halving (reduce-scatter) and doubling (all-gather)."""
    _check(group, "halving")
    if group.size == 1:
        return
    wire = group.bridge.outgoing(vector)
    segments = _segments(len(wire), group.size)
    room = np.empty_like(wire)
    low, high, distance, path = 0, group.size, group.size // 2, []
    while distance:
        other, middle = group.rank ^ distance, (low + high) // 2
        upper = group.rank & distance
        kept, sent = ((middle, high), (low, middle)) if upper else ((low, middle), (middle, high))
        kept_part, sent_part = (slice(segments[a].start, segments[b - 1].stop) for a, b in (kept, sent))
        received = room[: kept_part.stop - kept_part.start]
        _exchange(group, wire[sent_part], other, received, other)
        wire[kept_part] += received
        path.append((other, kept_part, sent_part))
        (low, high), distance = kept, distance // 2
    for other, kept_part, sent_part in reversed(path):
        _exchange(group, wire[kept_part], other, wire[sent_part], other)
    group.bridge.arrived(vector)


def messages(kind: str, group: Group, vector: np.ndarray) -> list[Message]:
    """Messages of `doubling` or `halving`, of all ranks."""
    messages, distance, size = [], 1, group.size
    segments = _segments(len(vector), size)
    while distance < size:
        for rank in range(size):
            # By halving, the segments of the half of a block of ranks that the other one is in, and later one's own.
            low = (rank ^ distance) // distance * distance
            half = segments[low + distance - 1].stop - segments[low].start
            block = rank // distance * distance
            own = segments[block + distance - 1].stop - segments[block].start
            length = len(vector) if kind == "doubling" else half + own
            messages.append((group.ranks[rank], group.ranks[rank ^ distance], length * vector.itemsize))
        distance *= 2
    return messages


def _check(group: Group, name: str) -> None:
    if group.size & (group.size - 1):
        raise UserError(f"--allreduce {name} pairs ranks, and {group.size} is no power of two: use ring, or mpi")


ALGORITHMS: dict[str, Algorithm] = {"ring": ring, "doubling": doubling, "halving": halving}
