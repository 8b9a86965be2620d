"""The sum of a gradient over ranks in buckets, each begun as soon as backward has filled it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.comm.allreduce import Algorithm
from psmpi.comm.group import Group

# The first bucket's share of the others: it is to be on its way early.
FIRST = 25
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
    found: list[Bucket] = []
    stop, last = size, NEVER
    # From the end, which backward fills first where layers follow each other.
    for a, b in reversed(list(pairwise(edges))):
        layer = min((layer for start, end, layer in spans if start <= a and b <= end), default=NEVER)
        while a < b:
            limit = room if found else max(1, room // FIRST)
            b, last = max(a, stop - limit), min(last, layer)
            if stop - b == limit:
                found.append(Bucket(b, stop, last))
                stop, last = b, NEVER
    if stop > 0:
        found.append(Bucket(0, stop, last))
    return sorted(found, key=lambda bucket: -bucket.last)


class Buckets:
    """Sums `vector` over the ranks of `group`, in place, its buckets begun in the same order on all ranks.

    algorithm: what sums a bucket; MPI's own, None, goes on while backward does (as far as MPI goes on by itself; each
    bucket begun pushes those before), others wait for the end of it.
    """

    def __init__(self, group: Group, vector: np.ndarray, buckets: Sequence[Bucket], algorithm: Algorithm | None = None):
        self.group, self.vector, self.buckets, self.algorithm = group, vector, buckets, algorithm
        self.begun: list[tuple[np.ndarray, Any]] = []

    def finished(self, layer: int) -> None:
        """Backward has filled what `layer` and those after it fill: begin what is whole."""
        if self.algorithm is not None or self.group.size == 1:
            return
        while len(self.begun) < len(self.buckets) and self.buckets[len(self.begun)].last >= layer:
            self._begin()
        self.group.push([request for _, request in self.begun])

    def _begin(self) -> None:
        bucket = self.buckets[len(self.begun)]
        run = self.vector[bucket.start : bucket.stop]
        self.begun.append((run, self.group.iallreduce(run)))

    def finish(self) -> None:
        """Begin the rest, and wait for all."""
        if self.group.size == 1:
            return
        if self.algorithm is not None:
            for bucket in self.buckets:
                self.algorithm(self.group, self.vector[bucket.start : bucket.stop])
            return
        for bucket in self.buckets[len(self.begun) :]:
            self.group.bridge.begin(self.vector[bucket.start : bucket.stop])
        while len(self.begun) < len(self.buckets):
            self._begin()
        for run, request in self.begun:
            self.group.wait(run, request)
        self.begun.clear()
