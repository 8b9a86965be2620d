"""Sets of intervals of the flat vector, and the local vectors that hold them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Runs:
    """Sorted disjoint intervals of the flat vector, kept one after the other in a local vector of `size` elements."""

    intervals: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def union(intervals: Iterable[tuple[int, int]]) -> Runs:
        """The smallest set of runs that covers `intervals` (which may touch or overlap)."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(i for i in intervals if i[0] < i[1]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return Runs(tuple(merged))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Local offset of each interval."""
        return tuple(np.cumsum([0, *(b - a for a, b in self.intervals)]).tolist())

    @property
    def size(self) -> int:
        return self.offsets[-1]

    def local(self, start: int, stop: int) -> slice:
        """Where [start, stop) lies in the local vector; it must lie inside one interval (ValueError)."""
        k = int(np.searchsorted([a for a, _ in self.intervals], start, side="right")) - 1
        if k < 0 or stop > self.intervals[k][1]:
            raise ValueError(f"[{start}, {stop}) is not inside one of the runs {self.intervals}")
        at = self.offsets[k] + start - self.intervals[k][0]
        return slice(at, at + stop - start)

    def __and__(self, other: Runs) -> Runs:
        return Runs.union(
            (max(a, c), min(b, d)) for a, b in self.intervals for c, d in other.intervals if max(a, c) < min(b, d)
        )

    def __sub__(self, other: Runs) -> Runs:
        left = []
        for start, stop in self.intervals:
            for a, b in other.intervals:
                if b <= start or a >= stop:
                    continue
                left.append((start, a))
                start = b
            left.append((start, stop))
        return Runs.union(left)

    def split(self, pieces: int) -> list[Runs]:
        """Cut into `pieces` consecutive sets of runs whose sizes differ by at most one element."""
        sizes = [self.size // pieces + (k < self.size % pieces) for k in range(pieces)]
        edges = np.cumsum([0, *sizes]).tolist()
        cut = []
        for a, b in pairwise(edges):
            cut.append(
                Runs.union(
                    (start + max(a - at, 0), start + min(b - at, stop - start))
                    for (start, stop), at in zip(self.intervals, self.offsets, strict=False)
                    if max(a, at) < min(b, at + stop - start)
                )
            )
        return cut

    def inside(self, outer: Runs) -> slice | None:
        """The slice of `outer`'s local vector that equals this local vector, or None where there is no such slice."""
        if not self.intervals:
            return slice(0, 0)
        try:
            slices = [outer.local(a, b) for a, b in self.intervals]
        except ValueError:
            return None
        if any(s.stop != t.start for s, t in pairwise(slices)):
            return None
        return slice(slices[0].start, slices[-1].stop)


def restrict(w: np.ndarray, runs: Runs) -> np.ndarray:
    """U_e w: the elements of the flat vector `w` (n,) that `runs` names, as a new (runs.size,) array."""
    return np.concatenate([w[a:b] for a, b in runs.intervals]) if runs.intervals else w[:0].copy()


def accumulate(g: np.ndarray, runs: Runs, g_e: np.ndarray) -> None:
    """g += U_e^T g_e, in place: `g` (n,), `g_e` (runs.size,)."""
    for (a, b), at in zip(runs.intervals, runs.offsets, strict=False):
        g[a:b] += g_e[at : at + b - a]
