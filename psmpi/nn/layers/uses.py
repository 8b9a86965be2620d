"""Users of a layer's units: runs of units on which the scores of the same classes depend."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# Runs (first, last, classes) of units whose values the scores of exactly these classes depend on.
Uses = tuple[tuple[int, int, frozenset[int]], ...]


def joined(runs: Iterable[tuple[int, int, frozenset[int]]]) -> Uses:
    """Runs in order, neighbours of the same classes made one, empty ones left out."""
    found: list[tuple[int, int, frozenset[int]]] = []
    for first, last, classes in runs:
        if found and found[-1][2] == classes:
            found[-1] = (found[-1][0], last, classes)
        elif first < last:
            found.append((first, last, classes))
    return tuple(found)


def grouped(uses: Uses, size: int, count: int) -> list[frozenset[int]]:
    """For each of `count` groups of `size` consecutive units, the classes that use any of them."""
    members: list[list[frozenset[int]]] = [[] for _ in range(count)]
    for first, last, classes in uses:
        for group in range(first // size, -(-last // size)):
            members[group].append(classes)
    return [one[0] if len(one) == 1 else frozenset().union(*one) for one in members]


def used(uses: Uses, classes: frozenset[int], units: int) -> np.ndarray:
    """(units,) bool: which units the scores of `classes` depend on."""
    mask = np.zeros(units, bool)
    for first, last, users in uses:
        mask[first:last] = not classes.isdisjoint(users)
    return mask
