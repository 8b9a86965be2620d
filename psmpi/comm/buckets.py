"""The sum of a gradient over ranks in buckets; the sum of a bucket begins when backward has filled it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.comm.allreduce import ALGORITHMS, Ring, messages
from psmpi.comm.group import Group
from psmpi.comm.transfers.base import Message, around
from psmpi.errors import UserError

# The first bucket is so many times smaller than the others, so that its sum begins early.
FIRST = 25
# Bytes from which on the time of a message on a slow link is bandwidth, not latency.
SEGMENT = 1 << 15
# The layer number of weights that no layer fills.
NEVER = 1 << 30


@dataclass(frozen=True)
class Bucket:
    """A run [start, stop) of the gradient, filled when layer number `last` has done its backward pass."""

    start: int
    stop: int
    last: int


def plan_buckets(spans: Sequence[tuple[int, int, int]], size: int, room: int) -> list[Bucket]:
    """The buckets of a gradient (size,), of `room` elements at most, in the order in which backward fills them.

    spans: (start, stop, layer) of the elements that each layer's backward pass fills, from the last layer to the first.
    Elements that no layer fills are complete from the beginning.
    """
    edges = sorted({0, size, *(edge for a, b, _ in spans for edge in (a, b))})
    buckets: list[Bucket] = []
    stop, last = size, NEVER
    # From the end of the vector, which backward fills first.
    for a, b in reversed(list(pairwise(edges))):
        layer = min((layer for start, end, layer in spans if start <= a and b <= end), default=NEVER)
        while a < b:
            limit = room if buckets else max(1, room // FIRST)
            b, last = max(a, stop - limit), min(last, layer)
            if stop - b == limit:
                buckets.append(Bucket(b, stop, last))
                stop, last = b, NEVER
    if stop > 0:
        buckets.append(Bucket(0, stop, last))
    return sorted(buckets, key=lambda bucket: -bucket.last)


def check_allreduce(how: str, size: int) -> None:
    """UserError for an --allreduce that does not work on so many ranks."""
    if how in ("doubling", "halving") and size & (size - 1):
        raise UserError(f"--allreduce {how} pairs ranks, and {size} is no power of two: use ring or mpi")


class Whole:
    """The sum of one bucket by MPI's non-blocking all-reduce, with the interface of `Ring`."""

    def __init__(self, group: Group, vector: np.ndarray):
        self.group, self.vector = group, vector
        self.request: Any = None

    def begin(self) -> None:
        self.request = self.group.iallreduce(self.vector)

    def push(self) -> None:
        # Many MPI libraries make progress only inside calls.
        self.request.Test()

    def wait(self) -> None:
        self.group.wait(self.vector, self.request)
        self.request = None

    def messages(self) -> list[Message]:
        return around(self.group.ranks, self.vector.nbytes)


class Blocking:
    """The sum of one bucket by an algorithm that does not overlap with other work."""

    def __init__(self, group: Group, vector: np.ndarray, kind: str):
        self.group, self.vector, self.kind = group, vector, kind
        self.algorithm = _by_nccl if kind == "nccl" else ALGORITHMS[kind]

    def begin(self) -> None:
        """Do nothing: `wait` makes the whole sum."""

    def push(self) -> None:
        """Do nothing: `wait` makes the whole sum."""

    def wait(self) -> None:
        self.algorithm(self.group, self.vector)

    def messages(self) -> list[Message]:
        if self.kind == "nccl":
            return around(self.group.ranks, self.vector.nbytes)
        return messages(self.kind, self.group, self.vector)


def _by_nccl(group: Group, vector: np.ndarray) -> None:
    """The sum of one bucket by NCCL, in the order of the device's stream."""
    group.allreduce(vector)


class Buckets:
    """Sums `vector` over the ranks of `group`, in place, its buckets begun in the same order on all ranks.

    how: `mpi`, `ring`, `doubling`, `halving`, or `auto`: between hosts (`across`) a ring for buckets whose segments are
    large enough, else MPI's all-reduce. A group with NCCL uses NCCL. by_host: the same ranks, for the algorithms of
    `psmpi.comm.allreduce`, which work in host memory.
    """

    def __init__(
        self,
        group: Group,
        by_host: Group,
        vector: np.ndarray,
        buckets: Sequence[Bucket],
        how: str = "auto",
        across: bool = False,
    ):
        self.group, self.vector, self.buckets, self.begun = group, vector, buckets, 0
        self.sums: list[Any] = []
        for k, bucket in enumerate(buckets):
            run = vector[bucket.start : bucket.stop]
            if group.nccl is not None:
                self.sums.append(Blocking(group, run, "nccl"))
            elif how == "ring" or (how == "auto" and across and run.nbytes >= SEGMENT * group.size):
                self.sums.append(Ring(by_host, run, k))
            elif how in ("auto", "mpi"):
                self.sums.append(Whole(group, run))
            else:
                self.sums.append(Blocking(by_host, run, how))

    @property
    def nbytes(self) -> int:
        """Bytes of buffers besides the vector."""
        return sum(one.room.nbytes for one in self.sums if isinstance(one, Ring))

    def messages(self) -> list[Message]:
        """Messages of one sum of the vector, of all ranks."""
        return [message for one in self.sums for message in one.messages()]

    def finished(self, layer: int) -> None:
        """Begin the sums of buckets that backward has filled down to `layer`, and make progress with the others."""
        if self.group.size == 1:
            return
        for one in self.sums[: self.begun]:
            one.push()
        while self.begun < len(self.buckets) and self.buckets[self.begun].last >= layer:
            self._begin()

    def _begin(self) -> None:
        self.sums[self.begun].begin()
        self.begun += 1

    def finish(self) -> None:
        """Begin the remaining sums, and wait for all."""
        if self.group.size == 1:
            return
        for one in self.sums[self.begun :]:
            if not (isinstance(one, Blocking) and one.group.nccl is not None):
                one.group.bridge.begin(one.vector)
        while self.begun < len(self.buckets):
            self._begin()
        for one in self.sums:
            one.wait()
        self.begun = 0
