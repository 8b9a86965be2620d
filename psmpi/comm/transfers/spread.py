"""The transfer of one vector from one rank to all: broadcast forward, sum backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers.base import Handle, Message, Overlapping, Step, keep, to_others, turned


class Spread(Overlapping):
    """A transfer of `size` elements (with `per_sample` of each sample) from rank `root` of a group to all its ranks.

    src is on the root alone. The root may have a dst, too; without one its own share of the sum lies in src.
    """

    def __init__(self, group: Group, size: int, dtype: np.dtype, root: int = 0, per_sample: bool = False):
        self.group, self.root, self.per_sample = group, root, per_sample
        self.nbytes, self.at_root = size * np.dtype(dtype).itemsize, group.rank == root

    def stage(self, src: Any) -> None:
        if self.at_root:
            self.group.bridge.begin(src)

    def forward(self, src: Any, dst: Any) -> None:
        self.group.bcast(src if self.at_root else dst, self.root)
        if self.at_root:
            keep(src, dst)

    def stage_back(self, dst: Any, src: Any) -> None:
        if self.group.nccl is None:
            self.group.bridge.begin(src if self.at_root else dst)

    def backward(self, dst: Any, src: Any) -> None:
        if self.at_root:
            keep(dst, src)
            self.group.reduce(src, src, self.root)
        else:
            self.group.reduce(dst, None, self.root)

    def begin(self, src: Any, dst: Any, number: int = 0) -> Handle:
        if self.at_root:
            keep(src, dst)
        if self.group.size == 1:
            return Handle([])
        vector = src if self.at_root else dst
        request = self.group.ibcast(vector, self.root)
        return Handle([request], None if self.at_root else lambda: self.group.bridge.arrived(vector))

    def begin_back(self, dst: Any, src: Any, number: int = 0) -> Handle:
        if self.at_root:
            keep(dst, src)
        if self.group.size == 1:
            return Handle([])
        request = self.group.ireduce(src if self.at_root else dst, self.root)
        return Handle([request], (lambda: self.group.bridge.arrived(src)) if self.at_root else None)

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        nbytes = self.nbytes * (step.batch if self.per_sample else 1)
        out = to_others(self.group.ranks, self.group.ranks[self.root], nbytes)
        return turned(out) if back else out
