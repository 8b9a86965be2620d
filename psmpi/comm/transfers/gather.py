"""The transfer of a sharded vector to every rank: all-gather forward, reduce-scatter backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers.base import Message, Step, Transfer
from psmpi.comm.transfers.rows import gathered
from psmpi.layout import Runs


@dataclass
class Span:
    """A slice [start, stop) of dst, made of counts[k] elements of each rank k in order.

    own: slices of this rank's elements: in src, in dst, and at the front of the span.
    """

    start: int
    stop: int
    counts: list[int]
    own: list[tuple[slice, slice, slice]] = field(default_factory=list)


class Gather(Transfer):
    """A transfer of the elements of `runs` from disjoint `shards` to all ranks of a group; dst is a vector of the runs.

    src, over this rank's shard, may be a view of dst. One collective fills one span; equal consecutive shards make a
    single span.
    """

    def __init__(self, group: Group, shards: Sequence[Runs], runs: Runs, dtype: np.dtype):
        self.group, self.itemsize = group, np.dtype(dtype).itemsize
        held = sorted((a, b, k) for k, shard in enumerate(shards) for a, b in (runs & shard).intervals)
        if sum(b - a for a, b, _ in held) != runs.size:
            raise ValueError("every element of the runs has to be in one shard")
        self.spans: list[Span] = []
        last, stop = len(shards), 0
        for a, b, k in held:
            if k < last:
                self.spans.append(Span(stop, stop, [0] * len(shards)))
            span, last = self.spans[-1], k
            if k == group.rank:
                front = span.counts[k]
                self.spans[-1].own.append(
                    (shards[k].local(a, b), runs.local(a, b), slice(span.start + front, span.start + front + b - a))
                )
            span.counts[k] += b - a
            span.stop = stop = span.stop + b - a

    def forward(self, src: Any, dst: Any) -> None:
        for span in self.spans:
            for of_src, of_dst, _ in span.own:
                dst[of_dst] = src[of_src]
            self.group.gather_all(dst[span.start : span.stop], span.counts)

    def backward(self, dst: Any, src: Any) -> None:
        for span in self.spans:
            self.group.reduce_scatter(dst[span.start : span.stop], span.counts)
            for of_src, _, front in span.own:
                src[of_src] = dst[front]

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        own = (np.sum([span.counts for span in self.spans], axis=0) * self.itemsize).tolist() if self.spans else []
        return gathered(self.group.ranks, own, back) if own else []
