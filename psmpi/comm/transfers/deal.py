"""The transfer of disjoint runs from one rank to the others: scatter forward, gather backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.comm.group import Group, pieces
from psmpi.comm.transfers.base import Message, Step, Transfer, keep, turned


class Deal(Transfer):
    """A transfer of run [starts[k], starts[k] + counts[k]) of src on rank 0 of a group to dst on rank k.

    Runs do not overlap. Only rank 0 needs `starts`.
    """

    def __init__(self, group: Group, counts: Sequence[int], starts: Sequence[int], dtype: np.dtype):
        self.group, self.counts, self.starts = group, tuple(counts), tuple(starts)
        self.itemsize = np.dtype(dtype).itemsize
        self.at_root = group.rank == 0
        self.pieces = pieces(self.counts, self.starts) if self.at_root else []
        self.own = slice(self.starts[0], self.starts[0] + self.counts[0]) if self.at_root else slice(0, 0)

    def stage(self, src: Any) -> None:
        if self.at_root:
            self.group.bridge.begin(src, self.pieces)

    def forward(self, src: Any, dst: Any) -> None:
        if self.group.size > 1:
            self.group.scatterv(src, self.counts, self.starts, dst, self.pieces)
        if self.at_root and self.counts[0]:
            keep(src[self.own], dst)

    def stage_back(self, dst: Any, src: Any) -> None:
        if not self.at_root and self.group.nccl is None:
            self.group.bridge.begin(dst)

    def backward(self, dst: Any, src: Any) -> None:
        if self.group.size > 1:
            self.group.gatherv(dst, src, self.counts, self.starts, self.pieces)
        if self.at_root and self.counts[0]:
            keep(dst, src[self.own])

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        root, *others = self.group.ranks
        out = [(root, rank, n * self.itemsize) for rank, n in zip(others, self.counts[1:], strict=True)]
        return turned(out) if back else out
