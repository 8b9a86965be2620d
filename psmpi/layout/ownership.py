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
    """Of each rank the runs of the flat vector that it has; several ranks may have the same ones."""

    runs: tuple[Runs, ...]

    @staticmethod
    def of_boxes(layout: Layout, boxes: Iterable[Iterable[Box]]) -> Ownership:
        """Of each rank its boxes of parameters; ValueError names the parameter of one that is not in the layout."""
        return Ownership(tuple(layout.runs_of(mine) for mine in boxes))

    @staticmethod
    def tiles(layout: Layout, grid: Sequence[int]) -> Ownership:
        """Rank r has, of every parameter, the tile at place r of `grid`, counted along the last axis first.

        The grid (ranks,) deals rows, (1, ranks) columns, (rows, columns) tiles; see `tile` for other parameters.
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
    def everything(self) -> Runs:
        """The runs that some rank has."""
        none = np.empty(0, np.int64)
        starts, stops = ([none, *(getattr(runs, of) for runs in self)] for of in ("starts", "stops"))
        return Runs.covering(np.concatenate(starts), np.concatenate(stops))

    @cached_property
    def record(self) -> tuple[Runs, ...]:
        """Of each rank the runs of which it is the owner of record, the lowest rank that has them."""
        edges, spans, ranks = holders([self])
        # By span and in it by rank: the first of each span.
        order = np.lexsort((ranks, spans))
        spans, ranks = spans[order], ranks[order]
        first = np.append(True, spans[1:] != spans[:-1]) if len(spans) else np.zeros(0, bool)
        spans, ranks = spans[first], ranks[first]
        return tuple(
            Runs.covering(edges[mine], edges[mine + 1]) for mine in (spans[ranks == r] for r in range(len(self)))
        )


def holders(several: Sequence[Ownership]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges that cut the flat vector into spans which every rank has whole or not at all, and who has which span.

    edges (spans + 1,); then, for each span that a rank has, the number of the span and the rank, where the ranks of the
    second ownership are counted on from those of the first. All int64.
    """
    runs = [one for ownership in several for one in ownership]
    edges = np.sort(np.concatenate([np.empty(0, np.int64), *(e for one in runs for e in (one.starts, one.stops))]))
    # np.unique would import masked arrays, 1.4 MB of them.
    edges = edges[np.diff(edges, prepend=edges[:1] - 1) != 0]
    spans, ranks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for rank, one in enumerate(runs):
        first = edges.searchsorted(one.starts)
        counts = edges.searchsorted(one.stops) - first
        total = int(counts.sum())
        spans.append(np.arange(total) + np.repeat(first - (np.cumsum(counts) - counts), counts))
        ranks.append(np.full(total, rank))
    return edges, np.concatenate(spans), np.concatenate(ranks)
