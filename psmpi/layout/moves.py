"""Collectives that move weights from shards to parts, and gradients back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from psmpi.layout.ownership import holders
from psmpi.layout.roles import Roles


@dataclass(frozen=True)
class Move:
    """One collective on runs of the flat vector: weights go out from `root`, gradients come back to `root`.

    kind `spread`: [start, stop) of `slices` is needed by all other `ranks` (Bcast out, Reduce back);
    kind `deal`: only rank k of `ranks` needs slice k (Scatterv out, Gatherv back; the root's own slice is empty);
    kind `sum`: all `ranks` own the slice, so no weights move (Allreduce of the gradients).
    """

    kind: str
    ranks: tuple[int, ...]
    slices: tuple[tuple[int, int], ...]

    @property
    def root(self) -> int:
        return self.ranks[0]


@lru_cache(maxsize=4)
def plan_moves(roles: Roles) -> tuple[Move, ...]:
    """Return the collectives of one step, in the same order for all ranks, so that no rank deadlocks."""
    moves: list[Move] = []
    # By root, then by rank: slices of the root that only this rank needs.
    deals: dict[int, dict[int, list[tuple[int, int]]]] = {}
    for start, stop, owners, needing in _spans(roles):
        if len(owners) > 1:
            moves.append(Move("sum", owners, ((start, stop),)))
            continue
        others = [r for r in needing if r != owners[0]]
        if len(others) == 1 and owners[0] not in needing:
            deals.setdefault(owners[0], {}).setdefault(others[0], []).append((start, stop))
        elif others:
            moves.append(Move("spread", (owners[0], *others), ((start, stop),)))
    for root, dealt in deals.items():
        # The k-th deal of a root takes the k-th slice of each rank that has more than k slices.
        for k in range(max(map(len, dealt.values()))):
            ranks = sorted(rank for rank, slices in dealt.items() if k < len(slices))
            moves.append(Move("deal", (root, *ranks), ((0, 0), *(dealt[r][k] for r in ranks))))
    return tuple(moves)


def _spans(roles: Roles) -> list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """Return the spans between changes of owners or holders: start, stop, ranks that own it, ranks that need it."""
    edges, spans, ranks = holders([roles.shards, roles.parts])
    order = np.lexsort((ranks, spans))
    ranks = ranks[order]
    begins = spans[order].searchsorted(np.arange(len(edges)))
    merged: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = []
    for k, (start, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        span_ranks = ranks[begins[k] : begins[k + 1]].tolist()
        owners, needing = (
            tuple(r for r in span_ranks if r < roles.size),
            tuple(r - roles.size for r in span_ranks if r >= roles.size),
        )
        if merged and merged[-1][2:] == (owners, needing):
            start = merged.pop()[0]
        merged.append((start, stop, owners, needing))
    return merged
