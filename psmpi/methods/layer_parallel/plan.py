"""The plan of the method `layer_parallel`: the layers that are solved in parallel, and the layers of each rank."""

from __future__ import annotations

from dataclasses import dataclass

from psmpi.errors import UserError, counted
from psmpi.layout import Layout, Runs
from psmpi.nn.layers.residual import Residual
from psmpi.nn.network import Network


@dataclass(frozen=True)
class Plan:
    """Deal of layers to a row of `ranks` ranks, each with equally many consecutive residual layers; `rows` such rows.

    first, stop: of the layers that are solved in parallel. The first rank of a row also has the layers before them, the
    last rank those after them.
    """

    network: Network
    first: int
    stop: int
    ranks: int
    rows: int

    @property
    def depth(self) -> int:
        """The number of layers that are solved in parallel."""
        return self.stop - self.first

    @property
    def steps(self) -> int:
        """The number of these layers on each rank."""
        return self.depth // self.ranks

    def position(self, rank: int) -> int:
        """Return the place of a rank in its row."""
        return rank % self.ranks

    def row(self, rank: int) -> int:
        return rank // self.ranks

    def members(self, row: int) -> range:
        """Return the ranks of a row."""
        return range(row * self.ranks, (row + 1) * self.ranks)

    def peers(self, position: int) -> range:
        """Return the ranks with the same layers, one of each row."""
        return range(position, self.ranks * self.rows, self.ranks)

    def stages(self, position: int) -> dict[str, tuple[int, int]]:
        """Return (first, stop) of the layers of a rank: of its "march", and at the ends of "opening" and "closing"."""
        start = self.first + position * self.steps
        stages = {}
        if position == 0 and self.first:
            stages["opening"] = (0, self.first)
        stages["march"] = (start, start + self.steps)
        if position == self.ranks - 1:
            stages["closing"] = (self.stop, len(self.network.layers))
        return stages

    def runs(self, layout: Layout, position: int) -> Runs:
        """Return the runs of the flat vector that a rank has."""
        stages = list(self.stages(position).values())
        return self.network.runs(layout, stages[0][0], stages[-1][1])

    def penalized(self, position: int) -> list[int]:
        """Return the residual layers of a rank that are in the network's longest run, those of serial ends too."""
        first, stop = residual_run(self.network)
        stages = list(self.stages(position).values())
        return list(range(max(first, stages[0][0]), min(stop, stages[-1][1])))


def residual_run(network: Network) -> tuple[int, int]:
    """Return (first, stop) of the longest run of residual layers, whose inputs and outputs all have one shape."""
    best, start = (0, 0), 0
    for k, layer in enumerate((*network.layers, None)):
        if isinstance(layer, Residual):
            continue
        if k - start > best[1] - best[0]:
            best = start, k
        start = k + 1
    return best


def make_plan(size: int, network: Network, serial_ends: int, rows: int) -> Plan:
    """Return the plan on `size` ranks; raise UserError if the ranks or the layers do not fit."""
    first, stop = residual_run(network)
    depth = stop - first - 2 * serial_ends
    if stop - first < 2:
        raise UserError(
            f"--model {network.name} has {'one residual layer' if stop > first else 'no residual layers'} in a row, "
            "and --method layer_parallel solves many at once: use --model deep (--depth, --widths), or --model custom "
            'with [[model.layers]] of type "residual"'
        )
    if depth < 1:
        raise UserError(
            f"--serial-ends {serial_ends} leaves none of {stop - first} residual layers to be solved in parallel: "
            f"use {(stop - first - 1) // 2} or fewer"
        )
    if size % rows:
        fit = [k for k in range(1, size + 1) if size % k == 0]
        raise UserError(
            f"--layer-replicas {rows} cannot share {size} ranks evenly: use one of {', '.join(map(str, fit))}, or "
            f"start {rows * max(1, size // rows)} ranks"
        )
    ranks = size // rows
    if depth % ranks:
        fit = [k for k in range(1, depth + 1) if depth % k == 0 and k <= ranks]
        raise UserError(
            f"--method layer_parallel deals the {depth} residual layers of --model {network.name} evenly to ranks, and "
            f"{ranks} ranks in a row do not divide them: start {counted(fit[-1] * rows, 'rank')}, or use a depth that "
            f"is a multiple of {ranks}"
        )
    return Plan(network, first + serial_ends, stop - serial_ends, ranks, rows)


def inside(network: Network, layout: Layout, stage: tuple[int, int], shard: Runs) -> slice:
    """Return the slice of a rank's local vector with the layers `stage`; raise UserError if they form no slice."""
    part = network.runs(layout, *stage).inside(shard)
    if part is None:
        raise UserError(
            f"--model {network.name} has layers whose units belong to single classes among or after its residual "
            "layers, and --method layer_parallel takes each layer as a whole: use layers without groups there"
        )
    return part
