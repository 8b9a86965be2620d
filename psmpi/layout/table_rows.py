"""Rows of tables that each rank holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TableRows:
    """Rows of tables that each rank holds: the numbers of each rank's rows, together 0, 1, ..., each once.

    group: the checkpoint group that holds the tables. `elements`: rows keep their meaning on another number of ranks;
    `rank`: one row for each rank, without meaning on another number of ranks.
    """

    of: tuple[tuple[int, ...], ...] = ()
    group: str = "elements"

    @staticmethod
    def one_each(size: int) -> TableRows:
        """Return table rows in which rank r holds row r."""
        return TableRows(tuple((rank,) for rank in range(size)), "rank")

    @property
    def total(self) -> int:
        return sum(map(len, self.of))

    def runs(self, rank: int) -> list[tuple[int, int, int]]:
        """Return the runs of a rank's rows: (number of the first row, its place among the rank's rows, row count)."""
        runs: list[tuple[int, int, int]] = []
        for k, row in enumerate(self.of[rank]):
            if runs and row == runs[-1][0] + runs[-1][2]:
                runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
            else:
                runs.append((row, k, 1))
        return runs
