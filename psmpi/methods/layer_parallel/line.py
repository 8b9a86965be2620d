"""Messages between neighbouring ranks of a row, in forward and in adjoint passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.comm.transfers import Boundary
from psmpi.comm.transfers.base import Handle


class Line:
    """The neighbours of the rank at `position` of a row, see `Neighbours`.

    boundaries: between each two consecutive ranks of the row. back: whether passes go from the last rank to the first,
    as adjoint passes do.
    """

    def __init__(self, boundaries: Sequence[Boundary], position: int, back: bool = False):
        lower = boundaries[position - 1] if position > 0 else None
        upper = boundaries[position] if position < len(boundaries) else None
        self.back = back
        self.incoming, self.outgoing = (upper, lower) if back else (lower, upper)

    def send(self, values: np.ndarray) -> Handle:
        if self.outgoing is None:
            return Handle([])
        return self.outgoing.begin_back(values, None) if self.back else self.outgoing.begin(values, None)

    def receive(self, into: np.ndarray) -> Handle:
        if self.incoming is None:
            return Handle([])
        return self.incoming.begin_back(None, into) if self.back else self.incoming.begin(None, into)


def messages_of_cycle(levels: int, relaxations: int) -> int:
    """Return the number of messages from a rank to the next in a cycle.

    Each C-relaxation sends one, and so does the coarsest level.
    """
    return (levels - 1) * relaxations + 1
