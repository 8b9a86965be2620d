"""Bringing what the ranks hold to rank 0, piece by piece through one small buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from psmpi.comm.control import Control
from psmpi.layout import Ownership, Runs, TableRows, copy_runs

# Elements that rank 0 takes from another rank at a time.
BUFFER = 1 << 20


def collect(
    control: Control,
    sizes: Sequence[int],
    dtype: np.dtype,
    piece: Callable[[int, int], np.ndarray],
    keep: Callable[[int, int, np.ndarray], None],
) -> None:
    """Hand rank 0 the sizes[r] elements of each rank r, which its `piece(first, last)` gives, contiguous, of `dtype`.

    All ranks call it. On rank 0, `keep(rank, first, elements)` is called for each piece, rank by rank in order; the
    elements are there until it returns. A message has up to BUFFER elements.
    """
    others = max([0, *sizes[1:]]) if control.rank == 0 else 0
    buffer = np.empty(min(BUFFER, others), dtype)
    for rank, size in enumerate(sizes):
        if control.rank not in (0, rank):
            continue
        for first in range(0, size, BUFFER):
            last = min(first + BUFFER, size)
            if rank == control.rank:
                elements = piece(first, last)
            else:
                elements = buffer[: last - first]
                control.receive_from(elements, rank)
            if control.rank != 0:
                control.send_to_first(elements)
            else:
                keep(rank, first, elements)


class Records:
    """The runs that each rank writes of vectors of one ownership: those of record, one rank after the other.

    `starts` (ranks + 1,): where a rank's begin among all elements. ValueError where no rank has some of `size`.
    """

    def __init__(self, ownership: Ownership, size: int, rank: int):
        if ownership.everything != Runs.union([(0, size)]):
            raise ValueError(
                f"{size - ownership.everything.size} of {size} elements are of no rank: give them an owner"
            )
        self.record = ownership.record
        self.sizes = [runs.size for runs in self.record]
        self.starts = np.cumsum([0, *self.sizes])
        self.total = size
        # Where this rank's lie in its local vector.
        self.local = self.record[rank].located(ownership[rank])

    def piece(self, vector: np.ndarray, first: int, last: int) -> np.ndarray:
        """Elements [first, last) of those that this rank writes: a view of its local vector where they are one run.

        Else a copy, of a message at most.
        """
        cut = self.local.cut(first, last)
        if len(cut.starts) == 1:
            return vector[cut.starts[0] : cut.stops[0]]
        elements = np.empty(last - first, vector.dtype)
        copy_runs(vector, cut.starts, elements, cut.offsets[:-1], cut.stops - cut.starts)
        return elements

    @cached_property
    def table(self) -> np.ndarray:
        """(3, runs) int64: start and stop of the runs of all ranks in order, and where each is among all elements."""
        starts = np.concatenate([runs.starts for runs in self.record])
        stops = np.concatenate([runs.stops for runs in self.record])
        places = np.concatenate([runs.offsets[:-1] + at for runs, at in zip(self.record, self.starts, strict=False)])
        order = np.argsort(starts)
        return np.stack([starts[order], stops[order], places[order]])


def row_pieces(rows: TableRows, rank: int, row: int, first: int, last: int) -> list[tuple[int, int, int]]:
    """Bytes [first, last) of a rank's rows, of `row` bytes each: (first, last, place in the whole table) of pieces."""
    found = []
    for number, local, count in rows.runs(rank):
        a, b = max(first, local * row), min(last, (local + count) * row)
        if a < b:
            found.append((a, b, (number - local) * row + a))
    return found
