"""Index arithmetic of partitioned networks: layouts, blocks, parts, grids and who owns what.

Everything here is pure data about the flat vector: no arrays of weights, no devices, no messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import combinations, pairwise
from math import prod

import numpy as np

from psmpi.errors import UserError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Parameter:
    """A named tensor of the network; its leading axes count `units` rows that are used or unused as a whole."""

    name: str
    shape: tuple[int, ...]
    units: int

    @property
    def unit_size(self) -> int:
        return prod(self.shape) // self.units


@dataclass(frozen=True)
class Piece:
    """Units [first, last) of one parameter, contiguous in the flat vector from `offset` on."""

    parameter: int
    first: int
    last: int
    offset: int


@dataclass(frozen=True)
class Block:
    """The run [start, stop) of the flat vector that exactly `classes` use."""

    classes: frozenset[int]
    start: int
    stop: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """Where every parameter lies in the flat vector: [shared by all | shared by some and private, by class | dead].

    A block that all classes use comes first, blocks of no class last; in between, blocks follow their smallest and
    then their largest class, so that the part of neighbouring classes is a few runs.
    """

    parameters: tuple[Parameter, ...]
    blocks: tuple[Block, ...]
    classes: int

    @property
    def size(self) -> int:
        return self.blocks[-1].stop if self.blocks else 0

    def part(self, classes: Iterable[int]) -> Runs:
        """The runs that the scores of `classes` depend on (V_i for one class, U_ij for two)."""
        wanted = frozenset(classes)
        return Runs.union((b.start, b.stop) for b in self.blocks if b.classes & wanted)

    @cached_property
    def dead(self) -> Runs:
        """The runs that no score depends on."""
        return Runs.union((b.start, b.stop) for b in self.blocks if not b.classes)

    @cached_property
    def by_parameter(self) -> list[list[Piece]]:
        """The pieces of each parameter, in the order of its units."""
        found: list[list[Piece]] = [[] for _ in self.parameters]
        for piece in self.pieces():
            found[piece.parameter].append(piece)
        return [sorted(pieces, key=lambda piece: piece.first) for pieces in found]

    def pieces(self) -> Iterator[Piece]:
        for block in self.blocks:
            yield from block.pieces


def make_layout(
    parameters: Sequence[Parameter], uses: Sequence[Iterable[tuple[int, int, frozenset[int]]]], classes: int
) -> Layout:
    """Lay out `parameters` by who uses them; `uses[k]` are runs (first unit, last unit, classes) of parameter k.

    Units with the same set of using classes form one block (the general rule of partial separability: shared, private
    or dead coordinates), parameters in their given order inside a block.
    """
    members: dict[frozenset[int], list[tuple[int, int, int]]] = {}
    for k, runs in enumerate(uses):
        for first, last, signature in runs:
            members.setdefault(signature, []).append((k, first, last))

    def order(signature: frozenset[int]) -> tuple:
        if not signature:
            return (2,)
        if len(signature) == classes:
            return (0,)
        return (1, min(signature), max(signature), sorted(signature))

    blocks, offset = [], 0
    for signature in sorted(members, key=order):
        start, pieces = offset, []
        for k, first, last in members[signature]:
            pieces.append(Piece(k, first, last, offset))
            offset += (last - first) * parameters[k].unit_size
        blocks.append(Block(signature, start, offset, tuple(pieces)))
    return Layout(tuple(parameters), tuple(blocks), classes)


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


def split_evenly(items: Sequence[int], pieces: int) -> list[list[int]]:
    """Consecutive groups whose lengths differ by at most one, the longer ones first."""
    return [list(map(int, g)) for g in np.array_split(np.asarray(items, dtype=int), pieces)]


def even_edges(count: int, pieces: int) -> list[int]:
    """Where such groups of `count` things begin, and the end of the last."""
    return [k * (count // pieces) + min(k, count % pieces) for k in range(pieces + 1)]


@dataclass(frozen=True)
class Worker:
    """A worker computes the scores of `classes` for replica row `row`; `elements` are its pairs {i, j}, or None."""

    row: int
    column: int
    classes: tuple[int, ...]
    elements: frozenset[Pair] | None = None


def _pair(i: int, j: int) -> Pair:
    return (i, j) if i < j else (j, i)


def all_pairs(classes: int) -> int:
    return classes * (classes - 1) // 2


def score_columns(classes: int, columns: int) -> list[Worker]:
    """One replica row of the score partition: consecutive groups of classes (row 0)."""
    return [Worker(0, k, tuple(group)) for k, group in enumerate(split_evenly(range(classes), columns))]


def pair_columns(classes: int, columns: int) -> list[Worker]:
    """One replica row of the pair partition: every unordered pair of classes belongs to exactly one worker (row 0).

    The classes form G groups; a worker owns the pairs between two groups, and the pairs inside group g go to the groups
    (g, g+1 mod G). Where there are more workers than pairs of groups, the largest sets are cut in two. G is the one
    that makes the largest set smallest, by its classes (the slice) and then its pairs.
    """
    most = max(g for g in range(2, max(2, classes) + 1) if all_pairs(g) <= columns)
    # Fewer groups with more cuts can win by a little, never by much.
    tried = [_cut(group_pairs(classes, number), columns) for number in range(most, max(1, most - 4), -1)]
    best = min(tried, key=lambda sets: max(map(_weight, sets)))
    return [Worker(0, k, tuple(sorted(_classes(pairs))), frozenset(pairs)) for k, pairs in enumerate(best)]


def group_pairs(classes: int, number: int) -> list[list[Pair]]:
    """The pairs of classes that belong to each pair of `number` groups of consecutive classes."""
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
    """Halve the largest set of pairs until there are `columns`."""
    heap = [(tuple(-n for n in _weight(pairs)), pairs) for pairs in sets]
    heapify(heap)
    alone: list[list[Pair]] = []
    while len(heap) + len(alone) < columns:
        _, pairs = heappop(heap)
        if len(pairs) == 1:
            alone.append(pairs)
            continue
        for half in (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]):
            heappush(heap, (tuple(-n for n in _weight(half)), half))
    return sorted(alone + [pairs for _, pairs in heap])


PARTITIONS = {"scores": (score_columns, lambda classes: classes), "pairs": (pair_columns, all_pairs)}


def make_grid(partition: str, classes: int, workers: int, replicas: int = 0) -> list[Worker]:
    """Spread `workers` over replica rows and, in each row, over the partition's columns.

    Rows may differ by one in their number of columns, so any number of workers is used in full. `replicas` = 0 takes
    the smallest number of rows that has work for every worker. UserError where a row would have more columns than the
    partition has (it says which number of replicas would do).
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
    """For each worker, the runs that no other worker of its own row holds, in every row: those it can own."""
    rows = sorted({w.row for w in grid})
    private = []
    for worker in grid:
        mine = []
        for block in layout.blocks:
            if not block.classes & set(worker.classes):
                continue
            if all(sum(bool(block.classes & set(w.classes)) for w in grid if w.row == r) == 1 for r in rows):
                mine.append((block.start, block.stop))
        private.append(Runs.union(mine))
    return private


@dataclass(frozen=True)
class Roles:
    """Who does what: `parts[r]` is what rank r computes with, `shards[r]` what it optimizes, `workers[r]` its place."""

    masters: int
    workers: tuple[Worker | None, ...]
    parts: tuple[Runs, ...]
    shards: tuple[Runs, ...]

    @property
    def size(self) -> int:
        return len(self.parts)

    def row(self, rank: int) -> list[int]:
        """The ranks of `rank`'s replica row, in column order."""
        mine = self.workers[rank]
        return [r for r, w in enumerate(self.workers) if w is not None and mine is not None and w.row == mine.row]

    @property
    def rows(self) -> int:
        return 1 + max(w.row for w in self.workers if w is not None)


def assign_roles(
    layout: Layout,
    size: int,
    *,
    partition: str = "scores",
    placement: str = "master",
    masters: int = 1,
    colocate: bool = False,
    replicas: int = 0,
) -> Roles:
    """Give each of `size` ranks its part and its shard.

    Ranks [0, masters) share the flat vector (placement `master`) or what no single worker of a row holds (placement
    `owner`) in equal consecutive shards; the other ranks, or all with `colocate`, are workers in grid order.
    """
    if masters < 1:
        raise UserError(f"--masters {masters}: at least one rank must hold weights; use --masters 1")
    if masters > size:
        raise UserError(f"--masters {masters} with {size} rank(s): start at least {masters} ranks or lower --masters")
    if size == masters:
        if size > 1 and not colocate:
            raise UserError(
                f"--masters {masters} with {size} ranks leaves no worker: start {masters + 1} or more ranks, or add "
                "--colocate so that masters compute as well"
            )
        colocate = True
    first = 0 if colocate else masters
    grid = make_grid(partition, layout.classes, size - first, replicas)
    workers: list[Worker | None] = [None] * first + list(grid)
    parts = [Runs()] * first + [layout.part(w.classes) for w in grid]
    everything = Runs.union([(0, layout.size)])
    if placement == "owner":
        owned = [Runs()] * first + private_runs(layout, grid)
        held = everything
        for runs in owned:
            held = held - runs
        if first == 0 and any(w.row > 0 for w in grid[:masters]):
            raise UserError(
                f"--placement owner with --colocate keeps masters in the first replica row: use --masters "
                f"{sum(w.row == 0 for w in grid)} or fewer"
            )
    else:
        owned = [Runs()] * size
        held = everything
    shards = list(owned)
    for rank, shard in enumerate(held.split(masters)):
        shards[rank] = Runs.union(shard.intervals + owned[rank].intervals)
    return Roles(masters, tuple(workers), tuple(parts), tuple(shards))


def replicate(layout: Layout, size: int) -> Roles:
    """Every rank computes with the whole network, on its own slice of each minibatch, and keeps an equal share of w."""
    whole = Runs.union([(0, layout.size)])
    every = tuple(range(layout.classes))
    workers = tuple(Worker(rank, 0, every) for rank in range(size))
    return Roles(size, workers, (layout.part(every),) * size, tuple(whole.split(size)))


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


@dataclass(frozen=True)
class Rows:
    """Which rank holds which rows of tables: of each rank the numbers of its rows, together 0, 1, ..., each once."""

    of: tuple[tuple[int, ...], ...] = ()

    @property
    def total(self) -> int:
        return sum(map(len, self.of))

    def runs(self, rank: int) -> list[tuple[int, int, int]]:
        """The rows of a rank as (number of the first, its place among the rank's own, how many side by side)."""
        found: list[tuple[int, int, int]] = []
        for k, row in enumerate(self.of[rank]):
            if found and row == found[-1][0] + found[-1][2]:
                found[-1] = (*found[-1][:2], found[-1][2] + 1)
            else:
                found.append((row, k, 1))
        return found
