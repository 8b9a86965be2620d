"""The transfer between ranks of consecutive layers: activations forward, their gradients backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers.base import TAGS, Handle, Message, Overlapping, Step, keep, turned


class Boundary(Overlapping):
    """A transfer of src (units, b) on rank `source` of a group to dst (units, b) on `target`; both may be one rank."""

    def __init__(self, group: Group, source: int, target: int, units: int, dtype: np.dtype):
        self.group, self.source, self.target = group, source, target
        self.nbytes = units * np.dtype(dtype).itemsize

    def begin(self, src: Any, dst: Any, number: int = 0) -> Handle:
        return self._begin(src, dst, self.source, self.target, number)

    def begin_back(self, dst: Any, src: Any, number: int = 0) -> Handle:
        return self._begin(dst, src, self.target, self.source, number)

    def _begin(self, sent: Any, received: Any, source: int, target: int, number: int) -> Handle:
        group, tag = self.group, number % TAGS
        if source == target:
            if group.rank == source:
                keep(sent, received)
        elif group.rank == source:
            return Handle([group.isend(sent, target, tag)])
        elif group.rank == target:
            return Handle([group.irecv(received, source, tag)], lambda: group.bridge.arrived(received))
        return Handle([])

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        if self.source == self.target:
            return []
        out = [(self.group.ranks[self.source], self.group.ranks[self.target], self.nbytes * step.batch)]
        return turned(out) if back else out
