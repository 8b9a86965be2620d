"""The sum of a gradient over ranks in buckets, each begun as soon as backward has filled it."""

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

# The first bucket's share of the others: it is to be on its way early.
FIRST = 25
# Bytes of a message from which on its size, and not its start, decides how long it takes, on a slow link.
SEGMENT = 1 << 15
# Of what no layer fills.
NEVER = 1 << 30


@dataclass(frozen=True)
class Bucket:
    """A run [start, stop) of the gradient, whole when layer number `last` has made its gradient."""

    start: int
    stop: int
    last: int


def plan_buckets(spans: Sequence[tuple[int, int, int]], size: int, room: int) -> list[Bucket]:
    """The buckets of a gradient (size,), of `room` elements at most, in the order in which backward fills them.

    spans: (start, stop, layer) of what each layer's backward fills, from the last layer to the first. What no layer
    fills is whole from the beginning.
    """
    edges = sorted({0, size, *(edge for a, b, _ in spans for edge in (a, b))})
    buckets: list[Bucket] = []
    stop, last = size, NEVER
    # From the end, which backward fills first where layers follow each other.
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
    """UserError for a way to sum that so many ranks cannot go."""
    if how in ("doubling", "halving") and size & (size - 1):
        raise UserError(f"--allreduce {how} pairs ranks, and {size} is no power of two: use ring or mpi")


class Whole:
    """The sum of one bucket by MPI's own non-blocking call, as `Ring` has it."""

    def __init__(self, group: Group, vector: np.ndarray):
        self.group, self.vector = group, vector
        self.request: Any = None

    def begin(self) -> None:
        self.request = self.group.iallreduce(self.vector)

    def push(self) -> None:
        # Many MPI libraries go on only inside calls.
        self.request.Test()

    def wait(self) -> None:
        self.group.wait(self.vector, self.request)
        self.request = None

    def messages(self) -> list[Message]:
        return around(self.group.ranks, self.vector.nbytes)


class Blocking:
    """The sum of one bucket by an algorithm that does not go on beside other work."""

    def __init__(self, group: Group, vector: np.ndarray, kind: str):
        self.group, self.vector, self.kind = group, vector, kind
        self.algorithm = _by_nccl if kind == "nccl" else ALGORITHMS[kind]

    def begin(self) -> None:
        """All is done in `wait`."""

    def push(self) -> None:
        """All is done in `wait`."""

    def wait(self) -> None:
        self.algorithm(self.group, self.vector)

    def messages(self) -> list[Message]:
        if self.kind == "nccl":
            return around(self.group.ranks, self.vector.nbytes)
        return messages(self.kind, self.group, self.vector)


def _by_nccl(group: Group, vector: np.ndarray) -> None:
    """Begun at once, and done before what the device does next."""
    group.allreduce(vector)


class Buckets:
    """Sums `vector` over the ranks of `group`, in place, its buckets begun in the same order on all ranks.

    how: `mpi`, `ring`, `doubling`, `halving`, or `auto`: between hosts (`across`) a ring for buckets that leave each
    rank a segment worth a message, else what MPI chooses. A group that has NCCL uses that. by_host: the same ranks, for
    sums that are made here, in host memory.
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
        """Bytes that the sums need beside the vector."""
        return sum(one.room.nbytes for one in self.sums if isinstance(one, Ring))

    def messages(self) -> list[Message]:
        """The messages of one sum of the vector, all ranks'."""
        return [message for one in self.sums for message in one.messages()]

    def finished(self, layer: int) -> None:
        """Backward has filled what `layer` and those after it fill: begin what is whole, and let the rest go on."""
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
        """Begin the rest, and wait for all."""
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
