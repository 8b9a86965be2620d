"""Splits of a sequence into consecutive groups of about equal length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_evenly(items: Sequence[int], pieces: int) -> list[list[int]]:
    """Return consecutive groups of `items` whose lengths differ by at most one, longer groups first."""
    return [list(map(int, g)) for g in np.array_split(np.asarray(items, dtype=int), pieces)]


def even_edges(count: int, pieces: int) -> list[int]:
    """Return the edges of the groups that `split_evenly` makes of `count` items: each start, and the last end."""
    return [k * (count // pieces) + min(k, count % pieces) for k in range(pieces + 1)]
