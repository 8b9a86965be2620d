"""Roles: the part of the flat vector that each rank computes with, and the shard that it steps."""

from __future__ import annotations

from dataclasses import dataclass

from psmpi.errors import UserError, counted
from psmpi.layout.grid import Worker, make_grid, private_runs
from psmpi.layout.layout import Layout
from psmpi.layout.ownership import Ownership
from psmpi.layout.runs import Runs


@dataclass(frozen=True, eq=False)
class Roles:
    """Roles of all ranks: rank r computes with `parts[r]`, steps `shards[r]`, and has the grid place `workers[r]`.

    `workers[r]` is None for a master that does not compute. Ranks [0, masters) are masters.
    """

    masters: int
    workers: tuple[Worker | None, ...]
    parts: Ownership
    shards: Ownership

    @property
    def size(self) -> int:
        return len(self.parts)

    def row(self, rank: int) -> list[int]:
        """Return the ranks of `rank`'s replica row, in column order."""
        worker = self.workers[rank]
        return [r for r, w in enumerate(self.workers) if w is not None and worker is not None and w.row == worker.row]

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

    Ranks [0, masters) share the flat vector (placement `master`), or the runs that no worker owns (placement `owner`),
    in equal consecutive shards. The other ranks, or all ranks with `colocate`, are workers in grid order. UserError
    for a number of masters or replicas that does not fit the ranks.
    """
    if masters < 1:
        raise UserError(f"--masters {masters}: at least one rank must hold weights; use --masters 1")
    if masters > size:
        raise UserError(
            f"--masters {masters} with {counted(size, 'rank')}: start at least {counted(masters, 'rank')} or lower "
            "--masters"
        )
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
    whole = Runs.union([(0, layout.size)])
    if placement == "owner":
        owned = [Runs()] * first + private_runs(layout, grid)
        unowned = whole - Ownership(tuple(owned)).union
        if first == 0 and any(w.row > 0 for w in grid[:masters]):
            raise UserError(
                f"--placement owner with --colocate keeps masters in the first replica row: use --masters "
                f"{sum(w.row == 0 for w in grid)} or fewer"
            )
    else:
        owned = [Runs()] * size
        unowned = whole
    shards = list(owned)
    for rank, shard in enumerate(unowned.split(masters)):
        shards[rank] = Runs.union(shard.intervals + owned[rank].intervals)
    return Roles(masters, tuple(workers), Ownership(tuple(parts)), Ownership(tuple(shards)))


def replicate(layout: Layout, size: int) -> Roles:
    """Return roles in which every rank computes with the whole network, on its slice of each minibatch.

    Each rank steps an equal shard of the flat vector.
    """
    whole = Runs.union([(0, layout.size)])
    every = range(layout.classes)
    workers = tuple(Worker(rank, 0, every) for rank in range(size))
    return Roles(size, workers, Ownership((layout.part(every),) * size), Ownership(tuple(whole.split(size))))
