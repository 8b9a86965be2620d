"""Ownerships: the boxes of a flat vector that each rank has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from psmpi.layout.box import Box, tile
from psmpi.layout.layout import Layout
from psmpi.layout.runs import Runs


@dataclass(frozen=True)
class Ownership:
    """Runs of the flat vector that each rank has; several ranks may have the same runs."""

    runs: tuple[Runs, ...]

    @staticmethod
    def of_boxes(layout: Layout, boxes: Iterable[Iterable[Box]]) -> Ownership:
        """Return the ownership of each rank's boxes; raise ValueError for a parameter that the layout does not have."""
        return Ownership(tuple(layout.runs_of(rank_boxes) for rank_boxes in boxes))

    @staticmethod
    def tiles(layout: Layout, grid: Sequence[int]) -> Ownership:
        """Return the ownership in which rank r has tile r of every parameter, numbered in C order of `grid`.

        The grid (ranks,) deals rows, (1, ranks) deals columns, (rows, columns) deals tiles. `tile` describes parameters
        with fewer axes than the grid.
        """
        places = [np.unravel_index(rank, tuple(grid)) for rank in range(prod(grid))]
        return Ownership.of_boxes(
            layout, ([tile(p.name, p.shape, grid, list(map(int, at))) for p in layout.parameters] for at in places)
        )

    def __getitem__(self, rank: int) -> Runs:
        return self.runs[rank]

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Runs]:
        return iter(self.runs)

    @cached_property
    def union(self) -> Runs:
        """Union of the runs of all ranks."""
        none = np.empty(0, np.int64)
        starts, stops = ([none, *(getattr(runs, of) for runs in self)] for of in ("starts", "stops"))
        return Runs.covering(np.concatenate(starts), np.concatenate(stops))

    @cached_property
    def record(self) -> tuple[Runs, ...]:
        """Runs of which each rank is the owner of record: the lowest rank that has them."""
        edges, spans, ranks = holders([self])
        # Sorted by span, then by rank, the first entry of each span is its owner of record.
        order = np.lexsort((ranks, spans))
        spans, ranks = spans[order], ranks[order]
        first = np.append(True, spans[1:] != spans[:-1]) if len(spans) else np.zeros(0, bool)
        spans, ranks = spans[first], ranks[first]
        return tuple(
            Runs.covering(edges[owned], edges[owned + 1]) for owned in (spans[ranks == r] for r in range(len(self)))
        )


def holders(several: Sequence[Ownership]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut the flat vector into spans that each rank has whole or not at all: return edges, spans, ranks, all int64.

    edges (spans + 1,): cuts of the flat vector. spans, ranks (n,): one entry for each rank that has a span, the number
    of the span and of the rank. Ranks of the second ownership are numbered on from the ranks of the first one.
    """
    runs = [held for ownership in several for held in ownership]
    edges = np.sort(np.concatenate([np.empty(0, np.int64), *(e for held in runs for e in (held.starts, held.stops))]))
    # np.unique would import masked arrays, which take 1.4 MB.
    edges = edges[np.diff(edges, prepend=edges[:1] - 1) != 0]
    spans, ranks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for rank, held in enumerate(runs):
        first = edges.searchsorted(held.starts)
        counts = edges.searchsorted(held.stops) - first
        total = int(counts.sum())
        spans.append(np.arange(total) + np.repeat(first - (np.cumsum(counts) - counts), counts))
        ranks.append(np.full(total, rank))
    return edges, np.concatenate(spans), np.concatenate(ranks)
