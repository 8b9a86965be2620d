"""Test every transfer on random plans. Rank 0 prints, as JSON, the names of the transfers and the failed claims.

A transfer selects elements of a vector w that all ranks share: src of a rank has the elements `owners[rank]`, and dst
the elements `users[rank]`. So the results of a transfer and of its adjoint follow from these indices alone.
"""

import json
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from psmpi.comm.group import Counter, Group
from psmpi.comm.transfers import (
    Boundary,
    Deal,
    Exchange,
    Gather,
    Halo,
    Neighbours,
    Overlapping,
    RowExchange,
    Slices,
    Spread,
    Step,
    Subnets,
    Sum,
    totals,
)
from psmpi.comm.watch.flight import bare
from psmpi.comm.world import start
from psmpi.layout import Runs, assign_roles
from psmpi.methods.ist.dealer import Dealer
from psmpi.nn.zoo import make_network

SEEDS = 6
# Seconds to wait for a transfer that is polled.
PATIENCE = 20


@dataclass
class Case:
    """A transfer, and for each rank the indices in w of its src (owners) and dst (users), or None.

    writes_all: backward writes all elements of src, not only those that are moved. shared: the slice of dst that is src
    on this rank, or None. pairs: the messages are point-to-point, with tags by the number of the minibatch.
    """

    transfer: object
    owners: list
    users: list
    shapes: tuple = ((-1,), (-1,))
    step: Step = field(default_factory=Step)
    writes_all: bool = False
    shared: slice | None = None
    pairs: bool = False


def ranks_of(world, rng, least=1):
    """At least `least` ranks of the job, in random order."""
    count = rng.integers(min(least, world.size), world.size + 1)
    return rng.permutation(world.size)[:count].tolist()


def by_rank(world, ranks, entries):
    """For every rank of the job its entry, or None outside the group `ranks`. entries: one a rank of the group."""
    return [entries[ranks.index(r)] if r in ranks else None for r in range(world.size)]


def spread(world, counter, rng, dtype):
    ranks, n, b = ranks_of(world, rng), int(rng.integers(1, 9)), int(rng.integers(1, 4))
    root, separate = int(rng.integers(len(ranks))), bool(rng.integers(2))
    transfer = Spread(Group(world, ranks, counter), n, dtype, root, per_sample=True)
    elements = np.arange(n * b)
    owners = by_rank(world, ranks, [elements if k == root else None for k in range(len(ranks))])
    at_root = world.rank == ranks[root]
    case = Case(transfer, owners, by_rank(world, ranks, [elements] * len(ranks)), step=Step(b), writes_all=True)
    return case if separate or not at_root else replace(case, shared=slice(0, n * b))


def deal(world, counter, rng, dtype):
    ranks = ranks_of(world, rng)
    counts = rng.integers(0, 5, len(ranks)).tolist()
    # The parts are in random order in the root's vector, with gaps.
    starts, at = [0] * len(ranks), 0
    for k in rng.permutation(len(ranks)):
        at += int(rng.integers(0, 3))
        starts[k], at = at, at + counts[k]
    transfer = Deal(Group(world, ranks, counter), counts, starts, dtype)
    owners = [np.arange(at + 2) if r == ranks[0] else None for r in range(world.size)]
    return Case(
        transfer, owners, by_rank(world, ranks, [np.arange(a, a + n) for a, n in zip(starts, counts, strict=True)])
    )


def total(world, counter, rng, dtype):
    ranks, n = ranks_of(world, rng), int(rng.integers(1, 9))
    elements = by_rank(world, ranks, [np.arange(n)] * len(ranks))
    return Case(Sum(Group(world, ranks, counter), n, dtype), elements, elements, writes_all=True)


def random_runs(rng, size, kept):
    edges = np.unique(np.concatenate([[0, size], rng.integers(0, size, 12)])).tolist()
    return Runs.union((a, b) for k, (a, b) in enumerate(pairwise(edges)) if kept(k))


def indices(runs):
    return np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in runs.intervals)])


def roles_of(world, rng):
    """The roles of a plan of psl, or random roles.

    In random roles a run has one owner and some users, or it has several owners, and only owners use it.
    """
    ranks = range(world.size)
    layout = make_network("psnet", (1, 8, 8), 10).layout()
    roles = assign_roles(layout, world.size, colocate=True, masters=int(rng.integers(1, world.size + 1)))
    if rng.integers(3) == 0:
        placed = {"placement": "owner", "replicas": int(rng.choice([1, world.size]))}
        return assign_roles(layout, world.size, colocate=True, partition=rng.choice(["scores", "pairs"]), **placed)
    parts, shards = [[] for _ in ranks], [[] for _ in ranks]
    edges = np.cumsum([0, *rng.integers(1, 6, 12)]).tolist()
    for span in pairwise(edges):
        owners = ranks_of(world, rng) if rng.integers(2) else [int(rng.integers(world.size))]
        for rank in owners:
            shards[rank].append(span)
        for rank in owners if len(owners) > 1 else ranks_of(world, rng):
            if rng.integers(4):
                parts[rank].append(span)
    collection = type(roles.parts)
    kept = {"parts": parts, "shards": shards}
    return replace(roles, **{name: collection(tuple(map(Runs.union, of))) for name, of in kept.items()})


def exchange(world, counter, rng, dtype):
    roles = roles_of(world, rng)
    transfer = Exchange(world, roles, counter, dtype)
    owners, users = ([indices(runs) for runs in of] for of in (roles.shards, roles.parts))
    return Case(transfer, owners, users, writes_all=True, shared=transfer.inside)


def row_exchange(world, counter, rng, dtype):
    ranks, b = ranks_of(world, rng), int(rng.integers(1, 4))
    counts = rng.integers(1, 4, len(ranks)).tolist()
    ends = np.cumsum([0, *counts]) * b
    own_elements = [np.arange(ends[k], ends[k + 1]) for k in range(len(ranks))]
    elements = by_rank(world, ranks, [np.arange(ends[-1])] * len(ranks))
    transfer = RowExchange(Group(world, ranks, counter), counts, dtype)
    return Case(transfer, by_rank(world, ranks, own_elements), elements, ((-1, b), (-1, b)), Step(b), writes_all=True)


def slices(world, counter, rng, dtype):
    """Slices of a minibatch; some ranks may have no sample."""
    ranks, units, b = ranks_of(world, rng), int(rng.integers(1, 5)), int(rng.integers(1, 8))
    transfer = Slices(Group(world, ranks, counter), units, dtype)
    elements = np.arange(units * b).reshape(units, b)
    own_elements = [elements[:, columns].reshape(-1) for columns in np.array_split(np.arange(b), len(ranks))]
    own_samples = len(np.array_split(np.arange(b), len(ranks))[ranks.index(world.rank)]) if world.rank in ranks else 0
    users = by_rank(world, ranks, [elements.reshape(-1)] * len(ranks))
    return Case(
        transfer,
        by_rank(world, ranks, own_elements),
        users,
        ((units, own_samples), (units, b)),
        Step(b),
        writes_all=True,
    )


def boundary(world, counter, rng, dtype):
    ranks, units, b = ranks_of(world, rng), int(rng.integers(1, 6)), int(rng.integers(1, 4))
    source, target = rng.integers(0, len(ranks), 2).tolist()
    transfer = Boundary(Group(world, ranks, counter), source, target, units, dtype)
    elements = np.arange(units * b)
    owners, users = ([elements if r == ranks[k] else None for r in range(world.size)] for k in (source, target))
    return Case(transfer, owners, users, ((units, b), (units, b)), Step(b), writes_all=True, pairs=True)


def gather(world, counter, rng, dtype):
    ranks, size = ranks_of(world, rng), int(rng.integers(4, 40))
    if rng.integers(2):
        shards = Runs.union([(0, size)]).split(len(ranks))
    else:
        of = rng.integers(0, len(ranks), 40)
        edges = np.unique(rng.integers(0, size, 12)).tolist()
        spans = list(zip([0, *edges], [*edges, size], strict=True))
        shards = [Runs.union(s for s, k in zip(spans, of, strict=False) if k == r) for r in range(len(ranks))]
    runs = random_runs(rng, size, lambda k: k == 0 or rng.integers(4))
    transfer = Gather(Group(world, ranks, counter), shards, runs, dtype)
    return Case(
        transfer, by_rank(world, ranks, list(map(indices, shards))), by_rank(world, ranks, [indices(runs)] * len(ranks))
    )


def neighbours(world, counter, rng, dtype):
    """Random places on ranks, of which some may have none; the first plan is replaced by a second one."""
    ranks, n = ranks_of(world, rng), int(rng.integers(1, 6))
    owners = sorted(rng.integers(0, len(ranks), rng.integers(1, 8)).tolist())
    places = range(len(owners))
    draws = [[(a, b) for a in places for b in places if a != b and rng.integers(2)] for _ in range(2)]
    transfer = Neighbours(Group(world, ranks, counter), draws[0], n, dtype, owners=owners)
    transfer.plan(draws[1])
    needed = [sorted({a for a, b in draws[1] if owners[b] == k != owners[a]}) for k in range(len(ranks))]
    owned = [[a for a in places if owners[a] == k] for k in range(len(ranks))]
    users, owns = ([(np.array(of, int)[:, None] * n + np.arange(n)).reshape(-1) for of in x] for x in (needed, owned))
    return Case(
        transfer,
        by_rank(world, ranks, owns),
        by_rank(world, ranks, users),
        ((-1, n), (-1, n)),
        writes_all=True,
        pairs=True,
    )


def halo(world, counter, rng, dtype):
    """Random units on ranks, of which some may have none; each rank needs random units."""
    ranks, b, units = ranks_of(world, rng), int(rng.integers(1, 4)), int(rng.integers(1, 20))
    owners = rng.integers(0, len(ranks), units)
    if rng.integers(2):
        owners.sort()
    needs = [np.flatnonzero(rng.random(units) < rng.choice([0.0, 0.4, 1.0])) for _ in ranks]
    transfer = Halo(Group(world, ranks, counter), owners, needs, dtype)
    owned = [np.flatnonzero(owners == k) for k in range(len(ranks))]
    users, owns = ([(of[:, None] * b + np.arange(b)).reshape(-1) for of in x] for x in (needs, owned))
    shapes = (-1, b), (-1, b)
    return Case(
        transfer,
        by_rank(world, ranks, owns),
        by_rank(world, ranks, users),
        shapes,
        Step(b),
        writes_all=True,
        pairs=True,
    )


def matrices(layout, values):
    """The parameters in a flat vector by name, each (units, weights of a unit)."""
    by_name = {p.name: np.zeros((p.units, p.unit_size), int) for p in layout.parameters}
    for piece in layout.pieces():
        p = layout.parameters[piece.parameter]
        size = (piece.last - piece.first) * p.unit_size
        by_name[p.name][piece.first : piece.last] = values[piece.offset : piece.offset + size].reshape(-1, p.unit_size)
    return by_name


def subnets(world, counter, rng, dtype):
    """Random holders and workers, with subnetworks by units or by blocks; several workers may have the same block."""
    ranks = list(range(world.size))
    holders = ranks[: rng.integers(1, world.size + 1)]
    workers = ranks[rng.integers(0, len(holders) + 1) if len(holders) < world.size else 0 :]
    blocks = bool(rng.integers(2))
    network = make_network("resnet", (1, 8, 8), 4, widths=(6,), blocks=(3,))
    if not blocks:
        network = make_network("mlp", (5,), 4, widths=(11, 7), batch_norm=bool(rng.integers(2)))
    deal = "blocks" if blocks else "units"
    dealer = Dealer(network, len(workers), int(rng.integers(99)), deal)
    layout, number = network.layout(), int(rng.integers(9))
    transfer = Subnets(Group(world, ranks, counter), holders, workers, layout, dealer.layouts, dealer.deal, dtype)
    transfer.plan(number)
    positions, users = matrices(layout, np.arange(layout.size)), [None] * world.size
    for worker, own, shares in zip(workers, dealer.layouts, dealer.deal(number), strict=True):
        places, users[worker] = matrices(own, np.arange(own.size)), np.full(own.size, -1)
        for name, share in shares.items():
            source = positions[share.source]
            rows, columns = (
                np.arange(n) if which is None else which
                for n, which in zip(source.shape, (share.rows, share.columns), strict=True)
            )
            users[worker][places[name]] = source[np.ix_(rows, columns)]
    return Case(transfer, [indices(shard) for shard in transfer.shards], users, step=Step(round=number))


TRANSFERS = {
    "spread": spread, "deal": deal, "sum": total, "exchange": exchange, "rows": row_exchange, "slices": slices,
    "boundary": boundary, "gather": gather, "neighbours": neighbours, "halo": halo, "subnets": subnets,
}  # fmt: skip


class Trial:
    """One case on this rank: random values of all ranks, and vectors for them."""

    def __init__(self, world, case, dtype, seed):
        self.world, self.case, self.dtype, self.rng = world, case, dtype, np.random.default_rng([seed, 77])
        owned, used = (np.concatenate([np.arange(0), *present(of)]) for of in (case.owners, case.users))
        self.size = 1 + int(np.concatenate([owned, used]).max(initial=-1))
        self.moved = np.zeros(self.size, bool)
        self.moved[used] = True
        self.own, self.used = case.owners[world.rank], case.users[world.rank]
        self.part = self.own is not None or self.used is not None

    def vectors(self):
        """New vectors src and dst, filled with NaN."""
        src, dst = (
            None if index is None else np.full(len(index), np.nan, self.dtype).reshape(shape)
            for index, shape in zip((self.own, self.used), self.case.shapes, strict=True)
        )
        return (dst[self.case.shared] if self.case.shared is not None else src), dst

    def forward_values(self):
        """The values of src on this rank, equal on all owners of an element, and the expected values of dst."""
        w = self.rng.standard_normal(self.size).astype(self.dtype)
        return [None if index is None else w[index] for index in (self.own, self.used)]

    def backward_values(self):
        """The values of dst on this rank, and the expected values of src after backward."""
        sums, y = np.zeros(self.size), [None] * self.world.size
        for rank, index in enumerate(self.case.users):
            if index is not None:
                y[rank] = self.rng.standard_normal(len(index)).astype(self.dtype)
                np.add.at(sums, index, y[rank])
        return y[self.world.rank], None if self.own is None else sums[self.own]

    def dot(self, a, b, mask=None):
        """The scalar product of a and b, summed over all ranks. mask: the elements of a and b that count, None: all."""
        product = 0.0
        if a is not None:
            a, b = a.reshape(-1).astype(float), b.reshape(-1).astype(float)
            product = float((a * b if mask is None else (a * b)[mask]).sum())
        return bare(self.world).allreduce(product)

    def counted_elements(self):
        """The mask of moved elements of src that no lower rank owns, so that the ranks together count each once."""
        if self.own is None:
            return None
        before = np.concatenate([np.arange(0), *present(self.case.owners[: self.world.rank])])
        return self.moved[self.own] & ~np.isin(self.own, before)


def present(entries):
    return [index for index in entries if index is not None]


def fill(vector, values):
    if vector is not None:
        vector.reshape(-1)[:] = values


def largest_error(vector, expected):
    return 0.0 if vector is None else float(np.abs(vector.reshape(-1) - expected).max(initial=0.0))


def check(world, case, counter, dtype, seed, failed):
    """Check forward and backward of a case; add a text for each failure to its claim in `failed`."""
    trial, tolerance = Trial(world, case, dtype, seed), 1e-12 if dtype == np.float64 else 1e-4
    transfer, rank = case.transfer, world.rank
    src, dst = trial.vectors()
    x, expected = trial.forward_values()
    fill(dst, np.nan)
    fill(src, x)
    before = counter.sent, counter.received
    if trial.part:
        transfer.forward(src, dst)
    if largest_error(dst, expected) != 0:
        failed["forward"].append("dst")
    counted = counter.sent - before[0], counter.received - before[1]
    if counted != totals(transfer.messages(case.step), rank):
        failed["bytes"].append(f"forward {counted}")
    fx = None if dst is None else dst.copy()

    y, expected = trial.backward_values()
    if src is not None:
        src[...] = np.nan if case.writes_all else 7
    fill(dst, y)
    before = counter.sent, counter.received
    if trial.part:
        transfer.backward(dst, src)
    counted = counter.sent - before[0], counter.received - before[1]
    if counted != totals(transfer.messages(case.step, back=True), rank):
        failed["bytes"].append(f"backward {counted}")
    if src is not None and not case.writes_all:
        expected = np.where(trial.moved[trial.own], expected, 7)
    # The comparison also fails if an element is still NaN.
    if not largest_error(src, expected) <= tolerance:
        failed["backward"].append("src")
    mask = trial.counted_elements()
    left, right = trial.dot(fx, y), trial.dot(x, src, mask)
    if not abs(left - right) <= tolerance * max(1.0, abs(left)):
        failed["adjoint"].append(f"{left} {right}")


def check_overlap(world, case, counter, dtype, seed, failed):
    """Check three transfers in flight at once that end in another order than they begin."""
    trials = [Trial(world, case, dtype, 100 * seed + k) for k in range(3)]
    if not trials[0].part:
        return
    # Backward runs twice: at the second time the buffers exist.
    for back in (False, True, True):
        in_flight, order = {}, [0, 1, 2]
        if case.pairs and world.rank % 2:
            order.reverse()
        vectors = [trial.vectors() for trial in trials]
        values = [trial.backward_values() if back else trial.forward_values() for trial in trials]
        before = counter.sent, counter.received
        for k in order:
            src, dst = vectors[k]
            fill(dst if back else src, values[k][0])
            begin = case.transfer.begin_back if back else case.transfer.begin
            in_flight[k] = begin(*((dst, src) if back else (src, dst)), 40_000 + k)
        end = time.monotonic() + PATIENCE
        while not in_flight[1].poll():
            assert time.monotonic() < end, "a message that was begun never comes"
        for k in (2, 0, 1):
            in_flight[k].finish()
            assert in_flight[k].poll()
        counted = counter.sent - before[0], counter.received - before[1]
        if counted != tuple(3 * n for n in totals(case.transfer.messages(case.step, back), world.rank)):
            failed["bytes"].append(f"in flight {counted}")
        for (src, dst), (_, expected) in zip(vectors, values, strict=True):
            if not largest_error(src if back else dst, expected) <= 1e-12:
                failed["in flight"].append("back" if back else "forward")


def trials(world):
    """Check all transfers on all ranks of a world; return their names, the failures [claim, text], and the bytes."""
    counter = Counter()
    wrong, tried = [], []
    for name, make in TRANSFERS.items():
        for seed in range(SEEDS):
            for dtype in (np.dtype(np.float64), np.dtype(np.float32)):
                failed = {claim: [] for claim in ("forward", "backward", "adjoint", "bytes", "in flight", "messages")}
                case = make(world, counter, np.random.default_rng([seed, len(name)]), dtype)
                check(world, case, counter, dtype, seed, failed)
                if isinstance(case.transfer, Overlapping) and dtype == np.float64:
                    check_overlap(world, case, counter, dtype, seed, failed)
                messages_json = json.dumps([case.transfer.messages(case.step, back) for back in (False, True)])
                if len(set(bare(world).allgather(messages_json))) > 1:
                    failed["messages"].append("not the same on all ranks")
                for rank, failures in enumerate(bare(world).allgather(failed)):
                    where = f"{name}, seed {seed}, {dtype}, rank {rank}"
                    wrong += [[claim, f"{where}: {text}"] for claim, of in failures.items() for text in of]
        tried.append(name)
    return {"tried": tried, "wrong": wrong, "bytes": counter.sent + counter.received}


if __name__ == "__main__":
    world = start()
    results = trials(world)
    if world.rank == 0:
        print(json.dumps(results))
