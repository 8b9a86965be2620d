"""Dealing things out evenly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_evenly(items: Sequence[int], pieces: int) -> list[list[int]]:
    """Consecutive groups whose lengths differ by at most one, the longer ones first."""
    return [list(map(int, g)) for g in np.array_split(np.asarray(items, dtype=int), pieces)]


def even_edges(count: int, pieces: int) -> list[int]:
    """The edges of such groups of `count` things: where each begins, and the end of the last."""
    return [k * (count // pieces) + min(k, count % pieces) for k in range(pieces + 1)]
