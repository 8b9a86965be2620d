"""Rows of tables, by the rank that holds them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TableRows:
    """Rows of tables, by the rank that holds them: of each rank the numbers of its rows, together 0, 1, ..., each once.

    group: of a checkpoint, the one that holds the tables. `elements`: rows that mean the same on any ranks; `rank`:
    one row a rank, which means nothing on another number of ranks.
    """

    of: tuple[tuple[int, ...], ...] = ()
    group: str = "elements"

    @staticmethod
    def one_each(size: int) -> TableRows:
        """Row r is of rank r."""
        return TableRows(tuple((rank,) for rank in range(size)), "rank")

    @property
    def total(self) -> int:
        return sum(map(len, self.of))

    def runs(self, rank: int) -> list[tuple[int, int, int]]:
        """The rows of a rank as (number of the first, its place among the rank's own, how many side by side)."""
        found: list[tuple[int, int, int]] = []
        for k, row in enumerate(self.of[rank]):
            if found and row == found[-1][0] + found[-1][2]:
                found[-1] = (*found[-1][:2], found[-1][2] + 1)
            else:
                found.append((row, k, 1))
        return found
