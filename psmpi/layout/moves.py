"""The collectives that bring weights from shards to parts, and gradients back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from psmpi.layout.roles import Roles


@dataclass(frozen=True)
class Move:
    """One collective on runs of the flat vector: weights go from `root` out, gradients come back to it.

    kind `spread`: [start, stop) of `slices` is needed by all other `ranks` (Bcast out, Reduce back);
    kind `deal`: rank k of `ranks` needs slice k alone (Scatterv out, Gatherv back; the root's own slice is empty);
    kind `sum`: all `ranks` own the slice: nothing out, an Allreduce of the gradients.
    """

    kind: str
    ranks: tuple[int, ...]
    slices: tuple[tuple[int, int], ...]

    @property
    def root(self) -> int:
        return self.ranks[0]


def plan_moves(roles: Roles) -> list[Move]:
    """The collectives that one step needs, in an order that all ranks follow (so that none waits for ever)."""
    edges = sorted({e for runs in roles.parts + roles.shards for i in runs.intervals for e in i})
    spans: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]] = []
    for start, stop in pairwise(edges):
        owners, holders = (
            tuple(r for r, runs in enumerate(of) if any(a <= start < b for a, b in runs.intervals))
            for of in (roles.shards, roles.parts)
        )
        if spans and spans[-1][1] == start and spans[-1][2:] == (owners, holders):
            start = spans.pop()[0]
        spans.append((start, stop, owners, holders))

    moves: list[Move] = []
    deals: dict[int, list[tuple[int, int, int]]] = {}
    for start, stop, owners, holders in spans:
        if len(owners) > 1:
            moves.append(Move("sum", owners, ((start, stop),)))
            continue
        others = [r for r in holders if r != owners[0]]
        if len(others) == 1 and owners[0] not in holders:
            deals.setdefault(owners[0], []).append((others[0], start, stop))
        elif others:
            moves.append(Move("spread", (owners[0], *others), ((start, stop),)))
    for root, dealt in deals.items():
        while dealt:
            this: dict[int, tuple[int, int]] = {}
            for rank, start, stop in dealt:
                this.setdefault(rank, (start, stop))
            dealt = [d for d in dealt if this[d[0]] != (d[1], d[2])]
            ranks = sorted(this)
            moves.append(Move("deal", (root, *ranks), ((0, 0), *(this[r] for r in ranks))))
    return moves
