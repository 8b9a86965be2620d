"""Strips: rows and columns of a holder's shard that lie in a worker's subnetwork."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from psmpi.layout import Layout, Runs, Shares, even_edges

# Elements that are taken from a matrix at a time.
INDICES = 1 << 15


@dataclass(frozen=True, eq=False)
class Strip:
    """Rows of one parameter that lie in one shard and in one worker's subnetwork.

    In the shard they are rows and columns (None: all) of the matrix (count, unit) from `start` on; in the message
    between the two ranks, and in the worker's vector, (n, m) elements from `at` and from `into` on. It is the share
    number `turn` of `owners`.
    """

    start: int
    count: int
    unit: int
    rows: np.ndarray | None
    columns: np.ndarray | None
    shape: tuple[int, int]
    at: int
    into: int
    turn: int
    owners: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    def take(self, shard: np.ndarray, message: np.ndarray) -> None:
        """Copy it from the shard into the message."""
        out = message[self.at : self.at + self.size].reshape(self.shape)
        matrix = shard[self.start : self.start + self.count * self.unit].reshape(self.count, self.unit)
        rows = np.arange(self.count) if self.rows is None else self.rows
        # Any mode but "raise" saves numpy a buffer for the result.
        if self.columns is None:
            np.take(matrix, rows, axis=0, out=out, mode="clip")
        else:
            # A few rows at a time, so that the indices stay in the cache.
            flat, some = matrix.reshape(-1), max(1, INDICES // len(self.columns))
            for a in range(0, len(rows), some):
                at = rows[a : a + some, None] * self.unit + self.columns
                np.take(flat, at, out=out[a : a + some], mode="clip")

    def put(self, message: np.ndarray, shard: np.ndarray, mean: bool = True) -> None:
        """Copy it from the message into the shard: where it has more owners, the mean or the sum of their messages.

        The owners' messages are put one after the other, in their order. Some rows or columns have one owner.
        """
        values = message[self.at : self.at + self.size].reshape(self.shape)
        matrix = shard[self.start : self.start + self.count * self.unit].reshape(self.count, self.unit)
        if self.rows is None and self.columns is None:
            matrix[...] = values if self.turn == 0 else matrix + values
            if mean and self.turn == self.owners - 1 > 0:
                matrix *= 1 / self.owners
            return
        rows = np.arange(self.count) if self.rows is None else self.rows
        if self.columns is None:
            matrix[rows] = values
        else:
            matrix[rows[:, None], self.columns] = values


def shard_rows(layout: Layout, holders: int) -> list[Runs]:
    """Deal the flat vector to `holders` ranks: each has consecutive units of every parameter."""
    rows: list[list[tuple[int, int]]] = [[] for _ in range(holders)]
    for piece in layout.pieces():
        parameter = layout.parameters[piece.parameter]
        edges = even_edges(parameter.units, holders)
        for k in range(holders):
            first, last = max(piece.first, edges[k]), min(piece.last, edges[k + 1])
            if first < last:
                begin = piece.offset + (first - piece.first) * parameter.unit_size
                rows[k].append((begin, begin + (last - first) * parameter.unit_size))
    return [Runs.union(intervals) for intervals in rows]


def find_strips(
    layout: Layout, shard: Runs, holder: tuple[int, int], own: Layout, shares: Shares, worker: int
) -> list[Strip]:
    """The strips of a shard in a worker's subnetwork with the layout `own`. holder: (number, number of holders)."""
    numbers = {p.name: k for k, p in enumerate(layout.parameters)}
    strips, at = [], 0
    for piece in own.pieces():
        parameter = own.parameters[piece.parameter]
        share = shares[parameter.name]
        source = layout.parameters[numbers[share.source]]
        rows = np.arange(source.units) if share.rows is None else share.rows
        rows = rows[piece.first : piece.last]
        edges = even_edges(source.units, holder[1])
        for begin, first, last in _pieces(layout, numbers[share.source], *edges[holder[0] : holder[0] + 2]):
            a, b = (int(np.searchsorted(rows, edge)) for edge in (first, last))
            if a == b:
                continue
            count = last - first
            start = shard.local(begin, begin + count * source.unit_size).start
            some = rows[a:b] - first
            strip = Strip(
                start, count, source.unit_size, None if b - a == count else some, share.columns,
                (b - a, parameter.unit_size), at, piece.offset + a * parameter.unit_size, share.owners.index(worker),
                len(share.owners),
            )  # fmt: skip
            strips.append(strip)
            at += strip.size
    return strips


def _pieces(layout: Layout, parameter: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """(offset, first unit, last unit + 1) of each piece of a parameter's units [first, last)."""
    size = layout.parameters[parameter].unit_size
    for piece in layout.by_parameter[parameter]:
        a, b = max(piece.first, first), min(piece.last, last)
        if a < b:
            yield piece.offset + (a - piece.first) * size, a, b


def strips_size(strips: Sequence[Strip]) -> int:
    """Number of elements of the message of these strips."""
    return sum(strip.size for strip in strips)
