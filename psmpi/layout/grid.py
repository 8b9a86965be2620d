"""Grids of workers: the replica row, the column, and the scores or class pairs of each worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import combinations, pairwise

import numpy as np

from psmpi.errors import UserError
from psmpi.layout.layout import Layout
from psmpi.layout.ownership import Ownership, holders
from psmpi.layout.runs import Runs
from psmpi.layout.split import even_edges, split_evenly

Pair = tuple[int, int]


@dataclass(frozen=True)
class Worker:
    """A worker computes the scores of `classes` for replica row `row`; `elements` are its pairs {i, j}, or None."""

    row: int
    column: int
    classes: Sequence[int]
    elements: frozenset[Pair] | None = None


def _pair(i: int, j: int) -> Pair:
    return (i, j) if i < j else (j, i)


def all_pairs(classes: int) -> int:
    return classes * (classes - 1) // 2


def score_columns(classes: int, columns: int) -> list[Worker]:
    """Return the workers of one replica row (row 0) of the score partition: consecutive groups of classes."""
    return [Worker(0, k, range(a, b)) for k, (a, b) in enumerate(pairwise(even_edges(classes, columns)))]


def pair_columns(classes: int, columns: int) -> list[Worker]:
    """Return the workers of one replica row (row 0) of the pair partition: each pair of classes {i, j} has one worker.

    The classes form G groups; a worker owns the pairs between two groups, and the pairs inside group g go to the groups
    (g, g+1 mod G). If there are more workers than pairs of groups, the largest sets are cut in two. G is chosen to
    make the largest set smallest, first by its number of classes (the worker's part), then by its number of pairs.
    """
    most = max(g for g in range(2, max(2, classes) + 1) if all_pairs(g) <= columns)
    # Slightly fewer groups with more cuts sometimes balance better, so a few smaller G are tried as well.
    tried = [_cut(group_pairs(classes, number), columns) for number in range(most, max(1, most - 4), -1)]
    best = min(tried, key=lambda sets: max(map(_weight, sets)))
    return [Worker(0, k, tuple(sorted(_classes(pairs))), frozenset(pairs)) for k, pairs in enumerate(best)]


def group_pairs(classes: int, number: int) -> list[list[Pair]]:
    """Return the pairs of classes that belong to each pair of `number` groups of consecutive classes."""
    groups = split_evenly(range(classes), number)
    owned: dict[Pair, set[Pair]] = {
        (a, b): {_pair(i, j) for i in groups[a] for j in groups[b]} for a, b in combinations(range(number), 2)
    }
    for g, members in enumerate(groups):
        owned[_pair(g, (g + 1) % number)] |= set(combinations(members, 2))
    return [sorted(pairs) for pairs in owned.values()]


def _classes(pairs: Iterable[Pair]) -> set[int]:
    return {c for pair in pairs for c in pair}


def _weight(pairs: Sequence[Pair]) -> tuple[int, int]:
    return len(_classes(pairs)), len(pairs)


def _cut(sets: list[list[Pair]], columns: int) -> list[list[Pair]]:
    """Halve the largest set of pairs until there are `columns` sets."""
    heap = [(tuple(-n for n in _weight(pairs)), pairs) for pairs in sets]
    heapify(heap)
    single_pairs: list[list[Pair]] = []
    while len(heap) + len(single_pairs) < columns:
        _, pairs = heappop(heap)
        if len(pairs) == 1:
            single_pairs.append(pairs)
            continue
        for half in (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]):
            heappush(heap, (tuple(-n for n in _weight(half)), half))
    return sorted(single_pairs + [pairs for _, pairs in heap])


# For each partition: the workers of one replica row, from (classes, columns), and the most columns, from (classes).
PARTITIONS: dict[str, tuple[Callable[[int, int], list[Worker]], Callable[[int], int]]] = {
    "scores": (score_columns, lambda classes: classes),
    "pairs": (pair_columns, all_pairs),
}


def make_grid(partition: str, classes: int, workers: int, replicas: int = 0) -> list[Worker]:
    """Spread `workers` over replica rows and, in each row, over the partition's columns.

    Rows may differ by one in their number of columns, so any number of workers is used in full. `replicas` = 0 takes
    the smallest number of rows that has work for every worker. UserError for too few classes, for more rows than
    workers, and for more columns in a row than the partition has.
    """
    columns_of, most = PARTITIONS[partition]
    limit = most(classes)
    if limit < 1:
        raise UserError(f"--partition {partition} needs more than {classes} class(es): check the labels")
    least = -(-workers // limit)
    rows = replicas or least
    if rows > workers:
        raise UserError(
            f"--replicas {rows} needs at least {rows} workers, there are {workers}: "
            f"use --replicas {workers} or fewer, or start more ranks"
        )
    if rows < least:
        raise UserError(
            f"{workers} workers in {rows} replica row(s) is more than the {limit} columns that --partition "
            f"{partition} has for {classes} classes: use --replicas {least} or more, or {rows * limit} workers or fewer"
        )
    grid = []
    for row, members in enumerate(split_evenly(range(workers), rows)):
        grid += [Worker(row, w.column, w.classes, w.elements) for w in columns_of(classes, len(members))]
    return grid


def private_runs(layout: Layout, grid: Sequence[Worker]) -> list[Runs]:
    """Return for each worker the runs that it can own: of its part, the runs that one worker of every row holds."""
    used = [layout.part(worker.classes) for worker in grid]
    private = Runs.union([(0, layout.size)])
    for row in sorted({w.row for w in grid}):
        parts = [part for worker, part in zip(grid, used, strict=True) if worker.row == row]
        edges, spans, _ = holders([Ownership(tuple(parts))])
        once = np.flatnonzero(np.bincount(spans, minlength=max(0, len(edges) - 1)) == 1)
        private &= Runs.covering(edges[once], edges[once + 1])
    return [part & private for part in used]
