"""The ranks of a row, one behind the other: what a pass sends to its neighbours, up and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.comm.transfers import Boundary
from psmpi.comm.transfers.base import Handle


class Line:
    """The neighbours of the rank at `position` of a row, in the direction of forward passes.

    boundaries: between each two ranks of the row. back: in the direction of adjoint passes.
    """

    def __init__(self, boundaries: Sequence[Boundary], position: int, back: bool = False):
        before = boundaries[position - 1] if position > 0 else None
        behind = boundaries[position] if position < len(boundaries) else None
        self.back = back
        self.before, self.behind = (behind, before) if back else (before, behind)

    def send(self, values: np.ndarray) -> Handle:
        if self.behind is None:
            return Handle([])
        return self.behind.begin_back(values, None) if self.back else self.behind.begin(values, None)

    def receive(self, into: np.ndarray) -> Handle:
        if self.before is None:
            return Handle([])
        return self.before.begin_back(None, into) if self.back else self.before.begin(None, into)


def messages_of_cycle(levels: int, relaxations: int) -> int:
    """The messages of a cycle from one rank to the next: one in each C-relaxation, and one on the coarsest level."""
    return (levels - 1) * relaxations + 1
