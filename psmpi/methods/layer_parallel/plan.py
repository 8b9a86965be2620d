"""The plan of the method `layer_parallel`: which layers are solved in parallel, and who has which; pure."""

from __future__ import annotations

from dataclasses import dataclass

from psmpi.errors import UserError, counted
from psmpi.layout import Layout, Runs
from psmpi.nn.layers.residual import Residual
from psmpi.nn.network import Network


@dataclass(frozen=True)
class Plan:
    """`ranks` of a row, one behind the other, each with as many consecutive residual layers; `rows` replicas of these.

    first, behind: of the layers that are solved in parallel. The layers before them are the first rank's, those behind
    the last one's.
    """

    network: Network
    first: int
    behind: int
    ranks: int
    rows: int

    @property
    def depth(self) -> int:
        """Layers that are solved in parallel."""
        return self.behind - self.first

    @property
    def steps(self) -> int:
        """Such layers of each rank."""
        return self.depth // self.ranks

    def position(self, rank: int) -> int:
        """The place of a rank in its row."""
        return rank % self.ranks

    def row(self, rank: int) -> int:
        return rank // self.ranks

    def members(self, row: int) -> range:
        """The ranks of a row."""
        return range(row * self.ranks, (row + 1) * self.ranks)

    def peers(self, position: int) -> range:
        """The ranks with the same layers."""
        return range(position, self.ranks * self.rows, self.ranks)

    def stages(self, position: int) -> dict[str, tuple[int, int]]:
        """(first, behind the last) layer of what a rank has: opening, layers of the march, closing."""
        start = self.first + position * self.steps
        found = {}
        if position == 0 and self.first:
            found["opening"] = (0, self.first)
        found["march"] = (start, start + self.steps)
        if position == self.ranks - 1:
            found["closing"] = (self.behind, len(self.network.layers))
        return found

    def runs(self, layout: Layout, position: int) -> Runs:
        """The elements of the flat vector that a rank has."""
        stages = list(self.stages(position).values())
        return self.network.runs(layout, stages[0][0], stages[-1][1])

    def penalized(self, position: int) -> list[int]:
        """The residual layers of a rank among those of the network's longest run, the serial ones too."""
        first, behind = residual_run(self.network)
        stages = list(self.stages(position).values())
        return list(range(max(first, stages[0][0]), min(behind, stages[-1][1])))


def residual_run(network: Network) -> tuple[int, int]:
    """(first, behind the last) of the longest run of residual layers, whose inputs and outputs are all of one shape."""
    best, start = (0, 0), 0
    for k, layer in enumerate((*network.layers, None)):
        if isinstance(layer, Residual):
            continue
        if k - start > best[1] - best[0]:
            best = start, k
        start = k + 1
    return best


def make_plan(size: int, network: Network, serial_ends: int, rows: int) -> Plan:
    """The plan on `size` ranks; UserError where the ranks or the layers do not fit."""
    first, behind = residual_run(network)
    depth = behind - first - 2 * serial_ends
    if behind - first < 2:
        raise UserError(
            f"--model {network.name} has {'one residual layer' if behind > first else 'no residual layers'} in a row, "
            "and --method layer_parallel solves many at once: use --model deep (--depth, --widths), or --model custom "
            'with [[model.layers]] of type "residual"'
        )
    if depth < 1:
        raise UserError(
            f"--serial-ends {serial_ends} leaves none of {behind - first} residual layers to be solved in parallel: "
            f"use {(behind - first - 1) // 2} or fewer"
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
            f"--method layer_parallel gives each rank as many of {depth} residual layers of --model {network.name} as "
            f"the others, and {ranks} ranks in a row do not divide them: start "
            f"{counted(fit[-1] * rows, 'rank')}, or use a depth that is a multiple of {ranks}"
        )
    return Plan(network, first + serial_ends, behind - serial_ends, ranks, rows)


def inside(network: Network, layout: Layout, stage: tuple[int, int], shard: Runs) -> slice:
    """The slice of a rank's local vector that some layers have; UserError where they have no slice of it."""
    found = network.runs(layout, *stage).inside(shard)
    if found is None:
        raise UserError(
            f"--model {network.name} has layers whose units are of single classes among and behind its residual "
            "layers, and --method layer_parallel takes each layer as a whole: use layers without groups there"
        )
    return found
