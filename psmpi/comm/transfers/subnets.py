"""The transfer between holders of a network and workers that train subnetworks: rows and columns drawn each round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers.base import Message, Step, Transfer, turned
from psmpi.comm.transfers.strips import Strip, find_strips, shard_rows, strips_size
from psmpi.layout import Layout, Ownership, Runs, Shares


class Subnets(Transfer):
    """A transfer of src, a holder's shard of a network with `layout`, to dst, the flat vector of a worker's subnetwork.

    holders, workers: numbers of ranks in the group. layouts: of each worker's subnetwork, the same in every round.
    deal: function from the number of a round to each worker's rows and columns, which are not sent. Vectors are in host
    memory; dst is None on ranks that do not train. With a single holder the message is dst itself.
    """

    def __init__(
        self,
        group: Group,
        holders: Sequence[int],
        workers: Sequence[int],
        layout: Layout,
        layouts: Sequence[Layout],
        deal: Callable[[int], Sequence[Shares]],
        dtype: np.dtype,
    ):
        self.group, self.holders, self.workers = group, tuple(holders), tuple(workers)
        self.layout, self.layouts, self.deal, self.dtype = layout, tuple(layouts), deal, np.dtype(dtype)
        dealt = dict(zip(self.holders, shard_rows(layout, len(self.holders)), strict=True))
        self.shards = Ownership(tuple(dealt.get(rank, Runs()) for rank in range(group.size)))
        self.worker = self.workers.index(group.rank) if group.rank in self.workers else -1
        self.plan(0)
        self.sending = np.empty(sum(self.sent), self.dtype)
        own = self.layouts[self.worker].size if len(self.holders) > 1 and self.worker >= 0 else 0
        self.arriving = np.empty(own, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of message buffers apart from the vectors."""
        return self.sending.nbytes + self.arriving.nbytes

    def plan(self, number: int) -> None:
        """Plan the messages of this rank in round `number`, for the next transfers."""
        shares = self.deal(number)
        rank, every = self.group.rank, range(len(self.workers))
        self.out = [self._strips(self.holders.index(rank), w, shares) for w in every] if rank in self.holders else []
        holders = range(len(self.holders)) if self.worker >= 0 else ()
        self.into = [self._strips(k, self.worker, shares) for k in holders]
        # Elements to and from each rank.
        self.sent, self.received = ([0] * self.group.size for _ in range(2))
        for to, strips in zip(self.workers, self.out, strict=False):
            self.sent[to] = strips_size(strips)
        for source, strips in zip(self.holders, self.into, strict=False):
            self.received[source] = strips_size(strips)

    def _strips(self, holder: int, worker: int, shares: Sequence[Shares]) -> list[Strip]:
        at, shard = (holder, len(self.holders)), self.shards[self.holders[holder]]
        return find_strips(self.layout, shard, at, self.layouts[worker], shares[worker], worker)

    def _message(self, dst: Any) -> np.ndarray:
        """The buffer of a worker's messages."""
        return self.arriving if dst is None or len(self.holders) > 1 else dst

    def forward(self, src: Any, dst: Any) -> None:
        if sum(self.sent) > self.sending.size:
            # Widths that cannot be divided: a shard's share of the subnets changes a little.
            self.sending = np.empty(sum(self.sent), self.dtype)
        for strip, message in _messages(self.out, self.sending):
            strip.take(src, message)
        arriving = self._message(dst)
        self.group.alltoallv(self.sending, self.sent, arriving, self.received)
        if dst is not None and arriving is not dst:
            for strip, message in _messages(self.into, arriving):
                dst[strip.into : strip.into + strip.size] = message[strip.at : strip.at + strip.size]

    def backward(self, dst: Any, src: Any) -> None:
        self._back(dst, src, mean=False)

    def average(self, dst: Any, src: Any) -> None:
        """Backward of weights: the mean, in place of the sum, of elements that several workers have."""
        self._back(dst, src, mean=True)

    def _back(self, dst: Any, src: Any, mean: bool) -> None:
        leaving = self._message(dst)
        if dst is not None and leaving is not dst:
            for strip, message in _messages(self.into, leaving):
                message[strip.at : strip.at + strip.size] = dst[strip.into : strip.into + strip.size]
        self.group.alltoallv(leaving, self.received, self.sending, self.sent)
        for strip, message in _messages(self.out, self.sending):
            strip.put(message, src, mean)

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        shares, ranks, messages = self.deal(step.round), self.group.ranks, []
        for k, holder in enumerate(self.holders):
            for number, worker in enumerate(self.workers):
                nbytes = strips_size(self._strips(k, number, shares)) * self.dtype.itemsize
                if holder != worker:
                    messages.append((ranks[holder], ranks[worker], nbytes))
        return turned(messages) if back else messages


def _messages(strips: list[list[Strip]], buffer: np.ndarray) -> Iterator[tuple[Strip, np.ndarray]]:
    """All strips of several messages, each with the slice of the buffer of its message."""
    at = 0
    for some in strips:
        size = strips_size(some)
        for strip in some:
            yield strip, buffer[at : at + size]
        at += size
