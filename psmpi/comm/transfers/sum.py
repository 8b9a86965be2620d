"""The transfer of a vector that all ranks of a group own: nothing forward, an all-reduce of gradients backward."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers.base import Message, Step, Transfer, around, keep


class Sum(Transfer):
    """A transfer of `size` elements (with `per_sample` of each sample) that all ranks of a group have."""

    def __init__(self, group: Group, size: int, dtype: np.dtype, per_sample: bool = False):
        self.group, self.per_sample, self.nbytes = group, per_sample, size * np.dtype(dtype).itemsize

    def forward(self, src: Any, dst: Any) -> None:
        keep(src, dst)

    def stage_back(self, dst: Any, src: Any) -> None:
        if self.group.nccl is None:
            self.group.bridge.begin(src)

    def backward(self, dst: Any, src: Any) -> None:
        keep(dst, src)
        self.group.allreduce(src)

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        nbytes = self.nbytes * (step.batch if self.per_sample else 1)
        return around(self.group.ranks, nbytes) if back else []
