"""Sums over ranks by messages of our own: ring, recursive doubling, recursive halving and doubling.

What each sends is counted as it is sent. Thakur, Rabenseifner and Gropp, "Optimization of collective communication
operations in MPICH" (2005), has the three; words sent by a rank for D elements on P ranks: 2 D (P-1)/P, D log2 P,
2 D (P-1)/P.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from psmpi.comm.group import Group
from psmpi.errors import UserError

Algorithm = Callable[[Group, np.ndarray], None]


def _exchange(group: Group, send: np.ndarray, to: int, receive: np.ndarray, source: int) -> None:
    group.comm.Sendrecv(send, to, 0, receive, source, 0)
    group.counter.add(send.nbytes, receive.nbytes)


def _segments(size: int, pieces: int) -> list[slice]:
    edges = [size * k // pieces for k in range(pieces + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def ring(group: Group, vector: np.ndarray) -> None:
    """vector (n,) = its sum over the group, in place: every segment goes round once to be summed, once to be told."""
    size, rank = group.size, group.rank
    if size == 1:
        return
    wire = group.bridge.outgoing(vector)
    segments = _segments(len(wire), size)
    room = np.empty(max(s.stop - s.start for s in segments), wire.dtype)
    after, before = (rank + 1) % size, (rank - 1) % size
    for k in range(size - 1):
        mine, theirs = segments[(rank - k) % size], segments[(rank - k - 1) % size]
        received = room[: theirs.stop - theirs.start]
        _exchange(group, wire[mine], after, received, before)
        wire[theirs] += received
    for k in range(size - 1):
        mine, theirs = segments[(rank + 1 - k) % size], segments[(rank - k) % size]
        _exchange(group, wire[mine], after, wire[theirs], before)
    group.bridge.arrived(vector)


def doubling(group: Group, vector: np.ndarray) -> None:
    """vector (n,) = its sum over the group, in place: pairs of ranks exchange all of it, at distances 1, 2, 4, ..."""
    _check(group, "doubling")
    if group.size == 1:
        return
    wire = group.bridge.outgoing(vector)
    room, distance = np.empty_like(wire), 1
    while distance < group.size:
        other = group.rank ^ distance
        _exchange(group, wire, other, room, other)
        # In the same order on both: the same bits.
        if other < group.rank:
            np.add(room, wire, out=wire)
        else:
            wire += room
        distance *= 2
    group.bridge.arrived(vector)


def halving(group: Group, vector: np.ndarray) -> None:
    """vector (n,) = its sum over the group, in place: halves are exchanged and summed, then put together again."""
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
        mine, theirs = (slice(segments[a].start, segments[b - 1].stop) for a, b in (kept, sent))
        received = room[: mine.stop - mine.start]
        _exchange(group, wire[theirs], other, received, other)
        wire[mine] += received
        path.append((other, mine, theirs))
        (low, high), distance = kept, distance // 2
    for other, mine, theirs in reversed(path):
        _exchange(group, wire[mine], other, wire[theirs], other)
    group.bridge.arrived(vector)


def _check(group: Group, name: str) -> None:
    if group.size & (group.size - 1):
        raise UserError(f"--allreduce {name} pairs ranks, and {group.size} is no power of two: use ring, or mpi")


# None is MPI's own.
ALGORITHMS: dict[str, Algorithm | None] = {"mpi": None, "ring": ring, "doubling": doubling, "halving": halving}
