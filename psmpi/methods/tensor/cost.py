"""The bytes of grids, and the grid that has the fewest."""

from __future__ import annotations

from math import prod

from psmpi.errors import UserError
from psmpi.layout import even_edges
from psmpi.methods.tensor.grid import all_grids
from psmpi.methods.tensor.plan import Plan, make_plan
from psmpi.nn.network import Network


def received(plan: Plan, rank: int, batch: int, keeps: bool) -> int:
    """Numbers that a rank receives in a training step for its products, on minibatches of `batch` samples.

    Of the sums of vectors over samples, and over units, it does not tell: they are few.
    """
    grid, place, found = plan.grid, plan.grid.place(rank), 0
    samples = even_edges(batch, grid.size("i"))
    own = samples[place["i"] + 1] - samples[place["i"]]
    tiles = list(plan.tiles.values())
    for number, tile in enumerate(tiles):
        columns, wanted = own * prod(tile.layer.in_shape[1:]), not tile.given
        rows, inputs = tile.product(place)
        (a, b), (c, d) = tile.box(place).ranges
        if grid.products == "panels":
            others = grid.size("i") - 1
            mine = tile.inputs.counts[place["j"]]
            panels = (inputs - (d - c)) * rows
            found += panels * (1 + wanted) + (d - c) * rows * others
            found += 0 if tile.given else 2 * (inputs - mine) * columns
            found += others * mine * columns * wanted
            continue
        again = 1 + (wanted and not keeps and number < len(tiles) - 2)
        found += (rows - (b - a)) * inputs * again + (b - a) * inputs * (grid.size("i") - 1)
        for axis, of, back in ((tile.before, tile.inputs, False), (tile.behind, tile.outputs, True)):
            if not axis:
                continue
            shares, at = tile.shares(of, place), place[axis]
            gather = (sum(shares) - shares[at]) * columns
            scatter = shares[at] * (len(shares) - 1) * columns
            if grid.products == "whole":
                found += gather + scatter if back or wanted else 0
            elif back:
                found += gather + scatter
            else:
                found += gather * (1 if keeps else 2) + scatter * wanted
    return found


def cheapest(size: int, network: Network, batch: int, keeps: bool) -> Plan:
    """The plan of least bytes, of those with the fewest axes where several have as few; UserError where none fits."""
    best, least, wrong = None, 0, None
    for grid in all_grids(size):
        if grid.size("i") > batch:
            continue
        try:
            plan = make_plan(network, grid)
        except UserError as error:
            wrong = wrong or error
            continue
        # Longer pieces come first.
        moved = max(received(plan, rank, batch, keeps) for rank in {0, size - 1})
        if best is None or moved < least:
            best, least = plan, moved
    if best is None:
        raise wrong or UserError(f"--batch-size {batch} is too few for {size} ranks: use --batch-size {size} or more")
    return best
