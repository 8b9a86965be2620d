"""Weights out to the parts, gradients back to the shards: the moves of a plan on slices of the local vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.bridge import Bridge
from psmpi.comm.group import Counter, Group, pieces
from psmpi.layout import Roles, Runs, plan_moves


@dataclass(frozen=True)
class Prepared:
    """A move with this rank's slices worked out: of its shard where it is the root, else of its part."""

    kind: str
    group: Group
    mine: slice
    counts: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()


class Exchange:
    """What moves between this rank and the others in a step, over roles that all ranks know.

    A rank has two local vectors of each quantity, one over its shard and one over its part; where the shard is a slice
    of the part they share memory. All buffers are contiguous slices of these, nothing is packed.
    """

    def __init__(
        self,
        world: Any,
        roles: Roles,
        counter: Counter,
        ops: NumpyOps | None = None,
        bridge: Bridge | None = None,
    ):
        self.ops, self.bridge = ops or NumpyOps(), bridge or Bridge()
        self.part, self.shard = roles.parts[world.rank], roles.shards[world.rank]
        groups: dict[tuple[int, ...], Group] = {}
        self.moves: list[Prepared] = []
        dealt: list[tuple[int, int]] = []
        for move in plan_moves(roles):
            if world.rank not in move.ranks:
                continue
            if move.ranks not in groups:
                groups[move.ranks] = Group(world, move.ranks, counter, self.bridge)
            group = groups[move.ranks]
            if move.kind == "deal" and group.rank == 0:
                counts = tuple(b - a for a, b in move.slices)
                starts = tuple(self.shard.local(a, b).start if b > a else 0 for a, b in move.slices)
                self.moves.append(Prepared(move.kind, group, slice(0, 0), counts, starts))
                dealt += move.slices
            else:
                mine = move.slices[group.rank if move.kind == "deal" else 0]
                of = self.shard if group.rank == 0 or move.kind == "sum" else self.part
                self.moves.append(Prepared(move.kind, group, of.local(*mine)))
        self.inside = self.shard.inside(self.part)
        # What this rank both owns and computes with, where the vectors are apart: copied, never sent.
        common = (self.part & self.shard).intervals if self.inside is None else ()
        self.copies = [(self.shard.local(a, b), self.part.local(a, b)) for a, b in common]
        # A sum starts from this rank's own share, which is nothing where its part does not have the run.
        absent = self.shard - self.part - Runs.union(dealt)
        self.cleared = [self.shard.local(a, b) for a, b in absent.intervals]

    def make_vectors(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """(part vector, shard vector), zeros; the shard is a view of the part where it can be."""
        part = self.ops.zeros(self.part.size, dtype)
        shard = self.ops.zeros(self.shard.size, dtype) if self.inside is None else part[self.inside]
        return part, shard

    def scatter(self, shard: np.ndarray, part: np.ndarray) -> None:
        """Every part gets its weights from the shards: U_e w."""
        for m in self.moves:
            if m.kind == "spread" and m.group.rank == 0:
                self.bridge.begin(shard[m.mine])
            elif m.kind == "deal" and m.group.rank == 0:
                self.bridge.begin(shard, pieces(m.counts, m.starts))
        for m in self.moves:
            if m.kind == "spread":
                m.group.bcast((shard if m.group.rank == 0 else part)[m.mine])
            elif m.kind == "deal":
                m.group.scatterv(shard, m.counts, m.starts, part[m.mine])
        for of_shard, of_part in self.copies:
            part[of_part] = shard[of_shard]

    def gather(self, part: np.ndarray, shard: np.ndarray) -> None:
        """Every shard gets the sum of the parts' gradients: sum_e U_e^T g_e."""
        for run in self.cleared:
            shard[run] = 0
        for of_shard, of_part in self.copies:
            shard[of_shard] = part[of_part]
        for m in self.moves:
            if m.group.nccl is None and not (m.kind == "deal" and m.group.rank == 0):
                self.bridge.begin(shard[m.mine] if m.kind == "sum" or m.group.rank == 0 else part[m.mine])
        for m in self.moves:
            if m.kind == "sum":
                m.group.allreduce(shard[m.mine])
            elif m.kind == "deal":
                m.group.gatherv(part[m.mine], shard, m.counts, m.starts)
            elif m.group.rank == 0:
                m.group.reduce(shard[m.mine], shard[m.mine])
            else:
                m.group.reduce(part[m.mine], None)

    def use_nccl(self, stream: Any) -> None:
        """Let the sums over replicas go from device to device; all ranks make this call."""
        for group in dict.fromkeys(m.group for m in self.moves if m.kind == "sum"):
            group.use_nccl(stream)

    def verify(self, shard: np.ndarray) -> None:
        """RuntimeError unless all owners of a run hold the same bits of it, as they must after the same steps."""
        for m in self.moves:
            if m.kind == "sum":
                sums = np.zeros(m.group.size)
                sums[m.group.rank] = crc32(self.ops.host(shard[m.mine]).data)
                if len(set(m.group.agree(sums).tolist())) > 1:
                    raise RuntimeError(
                        f"the replicas {m.group.ranks} of a private block no longer hold the same weights: this MPI's "
                        "Allreduce gives ranks different sums; use --placement master"
                    )
