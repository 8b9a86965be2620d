"""The transfers of psmpi, each with the bare MPI calls that move the same bytes as one would write them by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np

from psmpi.comm.group import Counter, Group, float_type, in_place
from psmpi.comm.protocol import World
from psmpi.comm.transfers import (
    Boundary,
    Deal,
    Exchange,
    Gather,
    Halo,
    Neighbours,
    RowExchange,
    Slices,
    Spread,
    Step,
    Subnets,
    Sum,
    Transfer,
)
from psmpi.comm.watch.flight import bare
from psmpi.layout import Runs, assign_roles
from psmpi.methods.ist.dealer import Dealer
from psmpi.nn.zoo import make_network

Call = Callable[[], object]
DTYPE = np.dtype(np.float32)
# Size of a minibatch.
BATCH = 64


@dataclass
class Move:
    """A transfer with this rank's vectors, and the bare MPI calls (forward, backward) that move as many bytes.

    calls: None on ranks that take no part. names: names of the MPI functions, "" for a direction that moves nothing.
    """

    transfer: Transfer
    src: Any
    dst: Any
    names: tuple[str, str]
    calls: tuple[Call | None, Call | None]
    batch: int = BATCH

    def own(self, back: bool) -> None:
        """Run the transfer once, backward if `back`."""
        if back:
            self.transfer.backward(self.dst, self.src)
        else:
            self.transfer.forward(self.src, self.dst)

    def bare(self, back: bool) -> None:
        """Run the bare calls once, backward if `back`."""
        call = self.calls[back]
        if call is not None:
            call()

    def nbytes(self, back: bool) -> int:
        """Sum of the bytes of all messages of the transfer."""
        return sum(size for _, _, size in self.transfer.messages(Step(self.batch), back))


def spread(world: World, n: int) -> Move:
    """Send the same n elements from rank 0 to all ranks."""
    vector, first = np.zeros(n, DTYPE), world.rank == 0
    made = Spread(_everyone(world), n, DTYPE)
    return Move(made, vector if first else None, vector, ("Bcast", "Reduce"), _of_root(world, made, vector))


def deal(world: World, n: int) -> Move:
    """Send different n elements from rank 0 to each rank."""
    counts, first = [n] * world.size, world.rank == 0
    vector = np.zeros(n * world.size if first else n, DTYPE)
    made = Deal(_everyone(world), counts, [n * k for k in range(world.size)], DTYPE)
    src, dst = (vector, vector[:n]) if first else (None, vector)
    return Move(made, src, dst, ("Scatterv", "Gatherv"), _of_root(world, made, vector))


def exchange(world: World, n: int) -> Move:
    """Send the weights of a network, of about n elements, from rank 0 to ranks with some of its classes each."""
    width = max(world.size, isqrt(n))
    network = make_network("head", (1,), width, widths=(width,))
    made = Exchange(world, assign_roles(network.layout(), world.size, colocate=True), Counter(), DTYPE)
    part, shard = made.make_vectors()
    ways = []
    for placed in made.placed:
        src, dst = placed.vectors(shard, part)
        ways.append(_of_root(world, placed.transfer, dst if src is None else src))

    def all_of(back: bool) -> None:
        for way in ways:
            way[back]()

    names = ("Bcast, Scatterv", "Reduce, Gatherv")
    return Move(made, shard, part, names, (lambda: all_of(False), lambda: all_of(True)))


def _of_root(world: World, transfer: Transfer, vector: np.ndarray) -> tuple[Call, Call]:
    """The bare calls of a spread or deal from rank 0. vector: the values that this rank sends or receives."""
    comm, first = bare(world), world.rank == 0
    if isinstance(transfer, Deal):
        runs = [vector, transfer.counts, transfer.starts, float_type(vector)] if first else None
        return (
            lambda: comm.Scatterv(runs, in_place() if first else vector, root=0),
            lambda: comm.Gatherv(in_place() if first else vector, runs, root=0),
        )
    return (
        lambda: comm.Bcast(vector, 0),
        lambda: comm.Reduce(in_place() if first else vector, vector if first else None, root=0),
    )


def total(world: World, n: int) -> Move:
    """Sum n elements over all ranks."""
    comm, vector = bare(world), np.zeros(n, DTYPE)
    made = Sum(_everyone(world), n, DTYPE)
    return Move(made, vector, vector, ("", "Allreduce"), (None, lambda: comm.Allreduce(in_place(), vector)))


def gather(world: World, n: int) -> Move:
    """Send n elements, an equal share from each rank, to all ranks."""
    comm, whole, every = bare(world), np.zeros(n, DTYPE), Runs.union([(0, n)])
    shards = every.split(world.size)
    made = Gather(_everyone(world), shards, every, DTYPE)
    counts = [shard.size for shard in shards]
    starts = [sum(counts[:k]) for k in range(world.size)]
    runs = [whole, counts, starts, float_type(whole)]
    own = whole[starts[world.rank] : starts[world.rank] + counts[world.rank]]
    calls = (lambda: comm.Allgatherv(in_place(), runs), lambda: comm.Reduce_scatter(in_place(), whole, counts))
    return Move(made, own, whole, ("Allgatherv", "Reduce_scatter"), calls)


def rows(world: World, n: int) -> Move:
    """Send about n scores of a minibatch to all ranks, where each rank has an equal share of the classes."""
    units = max(1, n // BATCH // world.size)
    src, dst = np.zeros((units, BATCH), DTYPE), np.zeros((units * world.size, BATCH), DTYPE)
    made = RowExchange(_everyone(world), [units] * world.size, DTYPE)
    return Move(made, src, dst, ("Allgather", "Reduce_scatter_block"), _gathers(world, src, dst))


def slices(world: World, n: int) -> Move:
    """Send about n values of a minibatch to all ranks, where each rank has an equal share of the samples."""
    batch, units = max(1, BATCH // world.size) * world.size, max(1, n // BATCH)
    src, dst = np.zeros((units, batch // world.size), DTYPE), np.zeros((units, batch), DTYPE)
    made = Slices(_everyone(world), units, DTYPE)
    return Move(made, src, dst, ("Allgather", "Reduce_scatter_block"), _gathers(world, src, dst), batch)


def _gathers(world: World, src: np.ndarray, dst: np.ndarray) -> tuple[Call, Call]:
    comm = bare(world)
    return lambda: comm.Allgather(src, dst), lambda: comm.Reduce_scatter_block(dst, src)


def boundary(world: World, n: int) -> Move:
    """Send about n values of a minibatch from rank 0 to rank 1."""
    comm, units = bare(world), max(1, n // BATCH)
    values = np.zeros((units, BATCH), DTYPE)
    made = Boundary(_everyone(world), 0, 1, units, DTYPE)
    src, dst = (values if world.rank == rank else None for rank in (0, 1))
    out, into = lambda: comm.Send(values, 1 - world.rank), lambda: comm.Recv(values, 1 - world.rank)
    calls = ((out, into), (into, out), (None, None))[min(world.rank, 2)]
    return Move(made, src, dst, ("Send, Recv", "Send, Recv"), calls)


def neighbours(world: World, n: int) -> Move:
    """Send n elements of every rank to both neighbours on a ring."""
    edges = {(k, (k + d) % world.size) for k in range(world.size) for d in (-1, 1)}
    made = Neighbours(_everyone(world), [(a, b) for a, b in edges if a != b], n, DTYPE)
    src, dst = np.zeros((1, n), DTYPE), np.zeros((len(made.sources), n), DTYPE)
    graph = bare(world).Create_dist_graph_adjacent(made.sources, [rank for _, rank in made.targets])

    def back() -> None:
        room = np.empty_like(dst)
        graph.Neighbor_alltoall(dst, room)
        np.sum(room, axis=0, out=src[0])

    calls = (lambda: graph.Neighbor_allgather(src, dst), back)
    return Move(made, src, dst, ("Neighbor_allgather", "Neighbor_alltoall"), calls)


def halo(world: World, n: int) -> Move:
    """Send about n values of a minibatch from every rank to each neighbour on a line."""
    edge, size, rank = max(1, n // BATCH), world.size, world.rank
    starts = [4 * edge * k for k in range(size + 1)]
    needs = [np.arange(max(0, starts[k] - edge), min(starts[-1], starts[k + 1] + edge)) for k in range(size)]
    made = Halo(_everyone(world), np.repeat(np.arange(size), 4 * edge), needs, DTYPE)
    src, dst = np.zeros((4 * edge, BATCH), DTYPE), np.zeros((len(needs[rank]), BATCH), DTYPE)
    others = [k for k in (rank - 1, rank + 1) if 0 <= k < size]
    graph = bare(world).Create_dist_graph_adjacent(others, others)
    out, into = (np.zeros((len(others), edge, BATCH), DTYPE) for _ in range(2))
    own = slice(starts[rank] - int(needs[rank][0]), starts[rank + 1] - int(needs[rank][0]))
    # For each neighbour, the rows of src that are sent to it, and the rows of dst that come from it.
    ends = [
        (slice(0, edge), slice(0, edge)) if k < rank else (slice(3 * edge, None), slice(-edge, None)) for k in others
    ]

    def forth() -> None:
        for k, (part, _) in enumerate(ends):
            out[k] = src[part]
        graph.Neighbor_alltoall(out, into)
        dst[own] = src
        for k, (_, other) in enumerate(ends):
            dst[other] = into[k]

    def back() -> None:
        for k, (_, other) in enumerate(ends):
            out[k] = dst[other]
        graph.Neighbor_alltoall(out, into)
        src[...] = dst[own]
        for k, (part, _) in enumerate(ends):
            src[part] += into[k]

    return Move(made, src, dst, ("Neighbor_alltoall", "Neighbor_alltoall"), (forth, back))


def subnets(world: World, n: int) -> Move:
    """Send subnetworks of a network of about n elements from rank 0 to the ranks, one to each."""
    comm, ranks = bare(world), range(world.size)
    network = make_network("mlp", (256,), 10, widths=(max(world.size, n // 266),))
    dealer = Dealer(network, world.size, 0, "units")
    made = Subnets(_everyone(world), [0], ranks, network.layout(), dealer.layouts, dealer.deal, DTYPE)
    src, dst = np.zeros(made.shards[world.rank].size, DTYPE), np.zeros(dealer.layouts[world.rank].size, DTYPE)
    starts = [[sum(counts[:k]) for k in ranks] for counts in (made.sent, made.received)]
    out, into = (
        [vector, counts, begin, float_type(vector)]
        for vector, counts, begin in zip((made.sending.copy(), dst), (made.sent, made.received), starts, strict=True)
    )
    calls = (lambda: comm.Alltoallv(out, into), lambda: comm.Alltoallv(into, out))
    return Move(made, src, dst, ("Alltoallv", "Alltoallv"), calls)


def _everyone(world: World) -> Group:
    return Group(world, range(world.size), Counter())


MOVES: dict[str, Callable[[World, int], Move]] = {
    "spread": spread, "deal": deal, "sum": total, "exchange": exchange, "gather": gather, "rows": rows,
    "slices": slices, "boundary": boundary, "neighbours": neighbours, "halo": halo, "subnets": subnets,
}  # fmt: skip
