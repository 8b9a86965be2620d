"""Ways to lay the work of the method `psl` out on ranks, and their costs in counted operations and bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from psmpi.errors import counted
from psmpi.layout import Roles, Worker, plan_moves
from psmpi.nn.cut import trunk_length
from psmpi.nn.layers.chain import walk
from psmpi.nn.network import Network

# Multiplications in the time of one byte sent or received: a core makes some 3e10 a second, and memory or a link of
# 10 Gb/s moves about 1e9 bytes a second.
BALANCE = 30.0


@dataclass(frozen=True)
class Cost:
    """The most multiplications of a rank in a step, forward and backward, and the most bytes that a rank moves.

    Bytes are those of weights, their gradients and features, sent and received. Sums over classes and of statistics, a
    few numbers a sample or unit, are left out, and so is memory.
    """

    macs: int
    nbytes: int

    @property
    def time(self) -> float:
        """The time of a step in multiplications: ranks compute at the same time, and then exchange."""
        return self.macs + BALANCE * self.nbytes

    def __str__(self) -> str:
        return f"{self.macs / 1e6:,.1f} million multiplications and {self.nbytes / 1e6:,.2f} MB"


@dataclass(frozen=True)
class Arrangement:
    """Replica rows, and whether each row computes the layers that all classes share on slices of its samples."""

    rows: int
    split: bool

    def __str__(self) -> str:
        return f"{'split' if self.split else 'replicated'} in {counted(self.rows, 'replica row')}"


def arrangements(network: Network, workers: int, least: int, replicas: int) -> Iterator[Arrangement]:
    """Yield the arrangements of `workers` workers. least: the fewest rows; replicas: the rows to take, 0 for any."""
    most = least if network.normalized else workers
    for rows in [replicas] if replicas else range(least, most + 1):
        if rows in (replicas, least) or workers % rows == 0:
            yield Arrangement(rows, False)
            # A split trunk would sum the statistics of batch normalization in host memory; ranks may use devices.
            if workers > rows and trunk_length(network) and not network.normalized:
                yield Arrangement(rows, True)


def cost(network: Network, roles: Roles, split: bool, batch: int, itemsize: int) -> Cost:
    """Return the cost of a step on `batch` samples. Convolutions count whole, even if pooling is folded into them."""
    traffic = np.zeros(roles.size, np.int64)
    for move in plan_moves(roles):
        ranks, sizes = list(move.ranks), np.array([b - a for a, b in move.slices])
        if move.kind == "sum":
            traffic[ranks] += 4 * (len(ranks) - 1) * sizes[0] // len(ranks)
        elif move.kind == "deal":
            traffic[ranks] += 2 * sizes
            traffic[move.root] += 2 * sizes.sum()
        else:
            traffic[ranks[1:]] += 2 * sizes[0]
            traffic[move.root] += 2 * sizes[0] * (len(ranks) - 1)
    length = trunk_length(network) if split else 0
    macs = np.zeros(roles.size, np.int64)
    columns: dict[tuple[int, int], int] = {}
    for rank, worker in enumerate(roles.workers):
        if worker is None:
            continue
        peers, samples = len(roles.row(rank)), -(-batch // roles.rows)
        sliced = -(-samples // peers) if samples >= peers else samples
        key = worker.column, peers
        if key not in columns:
            columns[key] = _macs(network, worker, length, samples, sliced)
        macs[rank] = columns[key]
        if length and samples >= peers:
            units = prod(network.layers[length - 1].out_shape)
            traffic[rank] += 4 * units * samples * (peers - 1) // peers
    return Cost(int(macs.max()), int(traffic.max()) * itemsize)


def _macs(network: Network, worker: Worker, length: int, samples: int, sliced: int) -> int:
    """Return the multiplications of a worker's step.

    The first `length` layers process `sliced` samples, the others `samples` samples.
    """
    total, first = 0, True
    for layers, count in (((0, length), sliced), ((length, len(network.layers)), samples)):
        stages = network.stages(worker.classes, fold=False, layers=layers) if layers[0] < layers[1] else ()
        for stage in (one for outer in stages for one in walk(outer)):
            macs = stage.layer.macs // len(stage.outputs) * int(np.count_nonzero(stage.outputs)) * count
            # Samples need no gradient, so the first layer makes two products and not three.
            total += macs * (2 if first else 3)
            first = first and not macs
    return total
