"""The exchange between shards and parts: the spreads, deals and sums of a plan of roles, in one order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.bridge import Bridge
from psmpi.comm.group import Counter, Group
from psmpi.comm.protocol import World
from psmpi.comm.transfers.base import Message, Step, Transfer
from psmpi.comm.transfers.deal import Deal
from psmpi.comm.transfers.spread import Spread
from psmpi.comm.transfers.sum import Sum
from psmpi.errors import UserError
from psmpi.layout import Move, Roles, Runs, plan_moves


@dataclass(frozen=True)
class Placed:
    """A transfer with its src, a slice of this rank's shard, and its dst, a slice of its part; None without."""

    transfer: Transfer
    src: slice | None
    dst: slice | None

    def vectors(self, shard: Any, part: Any) -> tuple[Any, Any]:
        return None if self.src is None else shard[self.src], None if self.dst is None else part[self.dst]


class Exchange(Transfer):
    """The U_e of all ranks: forward fills parts with U_e w, backward fills shards with sum_e U_e^T g_e.

    A rank has two local vectors of each quantity, one over its shard and one over its part, which share memory if the
    shard is a slice of the part. All messages are contiguous slices of them, without packing.
    """

    def __init__(
        self,
        world: World,
        roles: Roles,
        counter: Counter,
        dtype: np.dtype,
        ops: NumpyOps | None = None,
        bridge: Bridge | None = None,
    ):
        self.ops, self.bridge, self.dtype = ops or NumpyOps(), bridge or Bridge(), np.dtype(dtype)
        self.part, self.shard = roles.parts[world.rank], roles.shards[world.rank]
        groups: dict[tuple[int, ...], Group] = {}
        # The transfers of all ranks, which state messages, and those that this rank takes part in.
        self.transfers: list[Transfer] = []
        self.placed: list[Placed] = []
        self.sums: list[tuple[Group, slice]] = []
        dealt: list[tuple[int, int]] = []
        for move in plan_moves(roles):
            if move.ranks not in groups:
                groups[move.ranks] = Group(world, move.ranks, counter, self.bridge)
            group = groups[move.ranks]
            transfer = self._make(move, group)
            self.transfers.append(transfer)
            if group.rank < 0:
                continue
            src: slice | None = None
            dst: slice | None = None
            if move.kind == "deal" and group.rank == 0:
                # The runs of a deal lie anywhere in the shard.
                src = slice(None)
                dealt += move.slices
            elif move.kind == "deal":
                dst = self.part.local(*move.slices[group.rank])
            elif move.kind == "sum" or group.rank == 0:
                src = self.shard.local(*move.slices[0])
            else:
                dst = self.part.local(*move.slices[0])
            self.placed.append(Placed(transfer, src, dst))
            if move.kind == "sum" and src is not None:
                self.sums.append((group, src))
        self.inside = self.shard.inside(self.part)
        # Weights that this rank both owns and computes with, if its vectors share no memory: they are copied, not sent.
        common = (self.part & self.shard).intervals if self.inside is None else ()
        self.copies = [(self.shard.local(a, b), self.part.local(a, b)) for a, b in common]
        # A sum starts from this rank's own share, which is nothing where its part does not have the run.
        absent = self.shard - self.part - Runs.union(dealt)
        self.cleared = [self.shard.local(a, b) for a, b in absent.intervals]

    def _make(self, move: Move, group: Group) -> Transfer:
        counts = [b - a for a, b in move.slices]
        if move.kind == "deal":
            starts = [0] * len(counts)
            if group.rank == 0:
                starts = [self.shard.local(a, b).start if b > a else 0 for a, b in move.slices]
            return Deal(group, counts, starts, self.dtype)
        return (Sum if move.kind == "sum" else Spread)(group, counts[0], self.dtype)

    def make_vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """Make two vectors of zeros, over the part and over the shard; the shard is a view of the part if possible."""
        part = self.ops.zeros(self.part.size, self.dtype)
        shard = self.ops.zeros(self.shard.size, self.dtype) if self.inside is None else part[self.inside]
        return part, shard

    def forward(self, src: np.ndarray, dst: np.ndarray) -> None:
        """Fill the parts with weights of the shards: U_e w."""
        vectors = [(placed.transfer, *placed.vectors(src, dst)) for placed in self.placed]
        for transfer, shard, _ in vectors:
            transfer.stage(shard)
        for transfer, shard, part in vectors:
            transfer.forward(shard, part)
        for of_shard, of_part in self.copies:
            dst[of_part] = src[of_shard]

    def backward(self, dst: np.ndarray, src: np.ndarray) -> None:
        """Fill the shards with sums of the parts' gradients: sum_e U_e^T g_e."""
        for run in self.cleared:
            src[run] = 0
        for of_shard, of_part in self.copies:
            src[of_shard] = dst[of_part]
        vectors = [(placed.transfer, *placed.vectors(src, dst)) for placed in self.placed]
        for transfer, shard, part in vectors:
            transfer.stage_back(part, shard)
        for transfer, shard, part in vectors:
            transfer.backward(part, shard)

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        return [message for transfer in self.transfers for message in transfer.messages(step, back)]

    def use_nccl(self, stream: Any) -> None:
        """Let NCCL sum over replicas. All ranks call it."""
        for group in dict.fromkeys(group for group, _ in self.sums):
            group.use_nccl(stream)

    def verify(self, shard: np.ndarray) -> None:
        """UserError unless all owners of a run hold the same bits, which they must after the same steps."""
        for group, run in self.sums:
            if not group.same_bits(self.ops.host(shard[run])):
                raise UserError(
                    f"the replicas {group.ranks} of a private block no longer hold the same weights: this MPI's "
                    "Allreduce gives ranks different sums, or their processors do not compute alike; use --placement "
                    "master"
                )
