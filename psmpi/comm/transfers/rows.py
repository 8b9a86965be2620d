"""The transfer of rows from each rank of a group to all: its values of every sample, such as scores of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers.base import Handle, Message, Overlapping, Step, keep, to_others, turned


class RowExchange(Overlapping):
    """A transfer of src (counts[k], b) on rank k to dst (sum of counts, b) on all ranks of a group, in order of ranks.

    Forward is an all-gather, backward a reduce-scatter.
    """

    def __init__(self, group: Group, counts: Sequence[int], dtype: np.dtype):
        self.group, self.counts, self.itemsize = group, tuple(counts), np.dtype(dtype).itemsize

    def forward(self, src: Any, dst: Any) -> None:
        b = dst.shape[-1]
        self.group.allgatherv(src, dst, [n * b for n in self.counts])

    def backward(self, dst: Any, src: Any) -> None:
        b = dst.shape[-1]
        src[...] = self.group.reduce_scatter(dst, [n * b for n in self.counts]).reshape(src.shape)

    def begin(self, src: Any, dst: Any, number: int = 0) -> Handle:
        if self.group.size == 1:
            keep(src, dst.reshape(src.shape))
            return Handle([])
        b = dst.shape[-1]
        request = self.group.iallgatherv(src, dst, [n * b for n in self.counts])
        return Handle([request], lambda: self.group.bridge.arrived(dst))

    def begin_back(self, dst: Any, src: Any, number: int = 0) -> Handle:
        if self.group.size == 1:
            keep(dst.reshape(src.shape), src)
            return Handle([])
        b = dst.shape[-1]
        request = self.group.ireduce_scatter(dst, [n * b for n in self.counts])

        def arrive() -> None:
            self.group.bridge.arrived(dst)
            src[...] = dst.reshape(-1)[: src.size].reshape(src.shape)

        return Handle([request], arrive)

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        own = [n * step.batch * self.itemsize for n in self.counts]
        return gathered(self.group.ranks, own, back)


def gathered(ranks: Sequence[int], own: Sequence[int], back: bool) -> list[Message]:
    """Messages of an all-gather of own[k] bytes of each rank k, or of the reduce-scatter back."""
    out = [message for rank, nbytes in zip(ranks, own, strict=True) for message in to_others(ranks, rank, nbytes)]
    return turned(out) if back else out
