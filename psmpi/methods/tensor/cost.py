"""The numbers that ranks of a grid receive, and the grid with the fewest."""

from __future__ import annotations

from math import prod

from psmpi.errors import UserError
from psmpi.layout import even_edges
from psmpi.methods.tensor.grid import all_grids
from psmpi.methods.tensor.plan import Plan, make_plan
from psmpi.nn.network import Network


def received(plan: Plan, rank: int, batch: int, keeps: bool) -> int:
    """Return the numbers that a rank receives for its products in a training step on `batch` samples.

    Sums of vectors over samples and over units do not count: they are few. keeps: whether gathered arrays are kept.
    """
    grid, place, numbers = plan.grid, plan.grid.place(rank), 0
    samples = even_edges(batch, grid.size("i"))
    own = samples[place["i"] + 1] - samples[place["i"]]
    tiles = list(plan.tiles.values())
    for number, tile in enumerate(tiles):
        columns, wanted = own * prod(tile.layer.in_shape[1:]), not tile.reads_samples
        rows, inputs = tile.product(place)
        (a, b), (c, d) = tile.box(place).ranges
        if grid.products == "panels":
            other_rows = grid.size("i") - 1
            own_inputs = tile.inputs.counts[place["j"]]
            panels = (inputs - (d - c)) * rows
            numbers += panels * (1 + wanted) + (d - c) * rows * other_rows
            numbers += 0 if tile.reads_samples else 2 * (inputs - own_inputs) * columns
            numbers += other_rows * own_inputs * columns * wanted
            continue
        gathers = 1 + (wanted and not keeps and number < len(tiles) - 2)
        numbers += (rows - (b - a)) * inputs * gathers + (b - a) * inputs * (grid.size("i") - 1)
        for axis, cut, back in ((tile.input_axis, tile.inputs, False), (tile.output_axis, tile.outputs, True)):
            if not axis:
                continue
            shares, at = tile.shares(cut, place), place[axis]
            gather = (sum(shares) - shares[at]) * columns
            scatter = shares[at] * (len(shares) - 1) * columns
            if grid.products == "whole":
                numbers += gather + scatter if back or wanted else 0
            elif back:
                numbers += gather + scatter
            else:
                numbers += gather * (1 if keeps else 2) + scatter * wanted
    return numbers


def cheapest(size: int, network: Network, batch: int, keeps: bool) -> Plan:
    """Return the plan of least bytes, and among equals of fewest axes; raise UserError if no grid fits."""
    best, least, wrong = None, 0, None
    for grid in all_grids(size):
        if grid.size("i") > batch:
            continue
        try:
            plan = make_plan(network, grid)
        except UserError as error:
            wrong = wrong or error
            continue
        # Pieces get shorter from rank to rank, so the first and the last rank are the extremes.
        moved = max(received(plan, rank, batch, keeps) for rank in {0, size - 1})
        if best is None or moved < least:
            best, least = plan, moved
    if best is None:
        raise wrong or UserError(f"--batch-size {batch} is too few for {size} ranks: use --batch-size {size} or more")
    return best
