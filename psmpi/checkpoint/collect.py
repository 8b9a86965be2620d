"""Collection of the ranks' elements on rank 0, piece by piece through one small buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from psmpi.comm.control import Control
from psmpi.layout import Ownership, Runs, TableRows, copy_runs

# Elements that rank 0 receives from another rank at a time.
BUFFER = 1 << 20


def collect(
    control: Control,
    sizes: Sequence[int],
    dtype: np.dtype,
    piece: Callable[[int, int], np.ndarray],
    keep: Callable[[int, int, np.ndarray], None],
) -> None:
    """Send the elements of all ranks to rank 0. All ranks call it.

    sizes: number of elements of each rank. piece(first, last): this rank's elements [first, last), contiguous, of
    `dtype`. keep(rank, first, elements): called on rank 0 for each piece, in the order of ranks; `elements` are valid
    until it returns. A message has up to BUFFER elements.
    """
    largest = max([0, *sizes[1:]]) if control.rank == 0 else 0
    buffer = np.empty(min(BUFFER, largest), dtype)
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
    """Runs of a vector that each rank writes: those that it owns on record, in the order of ranks.

    size: of the flat vector. starts: (ranks + 1,), the place of each rank's first element among all written elements.
    ValueError if an element of the vector has no owner.
    """

    def __init__(self, ownership: Ownership, size: int, rank: int):
        if ownership.union != Runs.union([(0, size)]):
            raise ValueError(f"{size - ownership.union.size} of {size} elements belong to no rank: give them an owner")
        self.record = ownership.record
        self.sizes = [runs.size for runs in self.record]
        self.starts = np.cumsum([0, *self.sizes])
        self.total = size
        # Places of the runs that this rank writes in its local vector.
        self.local = self.record[rank].located(ownership[rank])

    def piece(self, vector: np.ndarray, first: int, last: int) -> np.ndarray:
        """Elements [first, last) of those that this rank writes, (last - first,).

        The result is a view of the local `vector` if the elements are one run of it, else a copy.
        """
        cut = self.local.cut(first, last)
        if len(cut.starts) == 1:
            return vector[cut.starts[0] : cut.stops[0]]
        elements = np.empty(last - first, vector.dtype)
        copy_runs(vector, cut.starts, elements, cut.offsets[:-1], cut.stops - cut.starts)
        return elements

    @cached_property
    def table(self) -> np.ndarray:
        """Runs of all ranks, sorted by start: start, stop and place among all written elements; (3, runs) int64."""
        starts = np.concatenate([runs.starts for runs in self.record])
        stops = np.concatenate([runs.stops for runs in self.record])
        places = np.concatenate([runs.offsets[:-1] + at for runs, at in zip(self.record, self.starts, strict=False)])
        order = np.argsort(starts)
        return np.stack([starts[order], stops[order], places[order]])


def row_pieces(rows: TableRows, rank: int, row: int, first: int, last: int) -> list[tuple[int, int, int]]:
    """Cut bytes [first, last) of a rank's rows, of `row` bytes each, into pieces (first, last, byte in the table)."""
    pieces = []
    for number, local, count in rows.runs(rank):
        a, b = max(first, local * row), min(last, (local + count) * row)
        if a < b:
            pieces.append((a, b, (number - local) * row + a))
    return pieces
