"""Boxes of parameters, their owners, and the arithmetic of runs."""

from itertools import pairwise, product
from math import prod

import numpy as np
import pytest
from helpers.partitions import boxes, layouts, positions, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from psmpi.errors import UserError
from psmpi.layout import (
    Box,
    Move,
    Ownership,
    Roles,
    Runs,
    assign_roles,
    copy_runs,
    plain_layout,
    plan_moves,
    private_runs,
    restrict,
    tile,
)
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network


def indices(runs):
    return [i for a, b in runs.intervals for i in range(a, b)]


@given(st.data())
def test_boxes_are_the_places_of_their_elements(data):
    layout = data.draw(layouts())
    drawn_boxes = data.draw(st.lists(boxes(layout), max_size=3))
    where, expected = positions(layout), set()
    for box in drawn_boxes:
        elements = where[box.parameter][tuple(slice(*r) for r in box.ranges)]
        expected |= set(elements.ravel().tolist())
    assert indices(layout.runs_of(drawn_boxes)) == sorted(expected)


def test_whole_rows_are_one_run_and_columns_a_run_a_row():
    layout = plain_layout({"a": (7, 3), "w": (100, 30)})
    assert layout.runs_of(Box("w", ((10, 20),))).intervals == ((321, 621),)
    columns = layout.runs_of(Box("w", ((0, 100), (3, 5))))
    assert columns.intervals == tuple((21 + 30 * k + 3, 21 + 30 * k + 5) for k in range(100))


@pytest.mark.parametrize(
    ("box", "says"),
    [
        (Box("w", ((0, 11),)), r"w: \[0, 11\) on axis 0, which has 10"),
        (Box("w", ((0, 10), (3, 2))), r"w: \[3, 2\) on axis 1"),
        (Box("w", ((-1, 10),)), "w: .*axis 0"),
        (Box("w", ((0, 1),) * 3), "w: a box of 3 axes, but the parameter has 2"),
        (Box("v"), "no 'v': it has w"),
    ],
)
def test_boxes_outside_their_parameter_name_it(box, says):
    with pytest.raises(ValueError, match=says):
        plain_layout({"w": (10, 4)}).runs_of(box)


@given(shapes, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_tiles_of_a_grid_hold_every_element_once(shape, grid):
    """The tiles repeat a parameter along the axes of the grid that the parameter lacks."""
    count = np.zeros(shape, int)
    sizes = []
    for place in product(*map(range, grid)):
        box = tile("w", shape, grid, place)
        count[tuple(slice(*r) for r in box.ranges)] += 1
        sizes.append([last - first for first, last in box.ranges])
    assert (count == prod(grid[len(shape) :])).all()
    assert (np.ptp(sizes, axis=0) <= 1).all()


def test_rows_columns_and_tiles_of_any_number_of_ranks():
    layout = plain_layout({"w": (6, 8), "b": (6,)})
    places = positions(layout)
    rows, columns = Ownership.tiles(layout, (3,)), Ownership.tiles(layout, (1, 3))
    tiles = Ownership.tiles(layout, (2, 2))
    assert indices(rows[1]) == [*places["w"][2:4].ravel(), *places["b"][2:4]]
    assert indices(columns[0]) == [*places["w"][:, :3].ravel(), *places["b"]]
    assert indices(tiles[2]) == [*places["w"][3:, :4].ravel(), *places["b"][3:]]
    # A tile of biases is on all ranks of its row; the first of them is its owner of record.
    assert indices(tiles.record[3]) == [*places["w"][3:, 4:].ravel()]
    assert len(Ownership.tiles(layout, (20,))) == 20 and Ownership.tiles(layout, (20,)).union.size == layout.size


some_runs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=6).map(Runs.union)


@given(st.lists(some_runs, max_size=5))
def test_the_owner_of_record_is_the_lowest_rank_that_has_an_element(several):
    ownership = Ownership(tuple(several))
    assert len(ownership) == len(ownership.record) == len(several) and list(ownership) == several
    lowest = {}
    for rank, runs in enumerate(several):
        for i in indices(runs):
            lowest.setdefault(i, rank)
    for rank, runs in enumerate(ownership.record):
        assert indices(runs) == sorted(i for i, r in lowest.items() if r == rank)
        assert Runs.union(runs.intervals) == runs
    assert indices(ownership.union) == sorted(lowest)


@given(some_runs, some_runs, st.integers(0, 60), st.integers(0, 60))
def test_places_in_a_local_vector(outer, other, first, last):
    w, inner = np.arange(60), outer & other
    local = restrict(w, outer)
    places = outer.places(inner.starts, inner.stops)
    assert [local[at] for at in places] == inner.starts.tolist()
    assert np.array_equal(restrict(local, inner.located(outer)), restrict(w, inner))
    for (a, b), at in zip(inner.intervals, places, strict=True):
        assert outer.local(a, b) == slice(at, at + b - a)
    assert indices(outer.cut(first, last)) == local[first:last].tolist()
    if (other - outer).size:
        with pytest.raises(ValueError, match="not inside one of the"):
            other.located(outer)


def test_runs_keep_gaps_between_them():
    with pytest.raises(ValueError, match=r"Runs\.union"):
        Runs(((0, 3), (3, 5)))
    with pytest.raises(ValueError, match=r"not inside one of the 1 runs"):
        Runs(((2, 5),)).local(4, 6)
    assert Runs(((1, 2), (4, 6))) == Runs.union([(4, 6), (1, 2)]) != Runs()
    assert len({Runs(((1, 2),)), Runs.union([(1, 2)]), Runs(((1, 3),))}) == 2


@pytest.mark.parametrize("length", [3, 1000])
def test_many_runs_are_copied(length):
    source, target = np.arange(50_000), np.zeros(50_000, int)
    starts, places = np.array([9000, 0, 40_000]), np.array([0, 20_000, 7000])
    copy_runs(source, starts, target, places, np.array([length, 2 * length, 1]))
    expected = np.zeros(50_000, int)
    for a, b, n in zip(starts, places, (length, 2 * length, 1), strict=True):
        expected[b : b + n] = source[a : a + n]
    assert np.array_equal(target, expected)


def dense(units):
    return {"type": "dense", "units": units}


def separable(units, groups=10):
    return {"type": "separable_dense", "units": units, "groups": groups}


NETWORKS = [
    make_network("psnet", (1, 8, 8), 10).layout(),
    build("cut", (40,), [separable(40, 8), separable(20, 5), dense(5)], 5).layout(),
    build("cut2", (12,), [separable(12, 4), separable(20, 5), separable(5, 5)], 5).layout(),
]


def planned(roles):
    """Compute the plan element by element."""
    size = max(runs.stops.max(initial=0) for runs in [*roles.parts, *roles.shards])
    masks = [np.zeros((roles.size, size), bool) for _ in range(2)]
    for table, ownership in zip(masks, (roles.shards, roles.parts), strict=True):
        for rank, runs in enumerate(ownership):
            table[rank, indices(runs)] = True
    owned, needed = masks
    keys = [(*np.flatnonzero(owned[:, i]), -1, *np.flatnonzero(needed[:, i])) for i in range(size)]
    edges = [0, *(i for i in range(1, size) if keys[i] != keys[i - 1]), size]
    moves, deals = [], {}
    for start, stop in pairwise(edges):
        owners, needing = np.flatnonzero(owned[:, start]), np.flatnonzero(needed[:, start])
        if len(owners) > 1:
            moves.append(Move("sum", tuple(owners), ((start, stop),)))
        elif len(owners) == 1:
            receivers = tuple(r for r in needing if r != owners[0])
            if len(receivers) == 1 and owners[0] not in needing:
                deals.setdefault(owners[0], []).append((receivers[0], start, stop))
            elif receivers:
                moves.append(Move("spread", (owners[0], *receivers), ((start, stop),)))
    for root, dealt in deals.items():
        while dealt:
            first_spans = {}
            for rank, *span in dealt:
                first_spans.setdefault(rank, tuple(span))
            dealt = [d for d in dealt if first_spans[d[0]] != tuple(d[1:])]
            ranks = sorted(first_spans)
            moves.append(Move("deal", (root, *ranks), ((0, 0), *(first_spans[r] for r in ranks))))
    return moves


@settings(max_examples=60)
@given(
    st.sampled_from(NETWORKS), st.integers(1, 13), st.integers(1, 4), st.booleans(), st.integers(0, 4),
    st.sampled_from(["scores", "pairs"]), st.sampled_from(["master", "owner"]),
)  # fmt: skip
def test_a_plan_is_the_one_that_every_element_asks_for(layout, size, masters, colocate, replicas, partition, placement):
    try:
        roles = assign_roles(
            layout, size, partition=partition, placement=placement, masters=masters, colocate=colocate,
            replicas=replicas,
        )  # fmt: skip
    except UserError:
        return
    assert list(plan_moves(roles)) == planned(roles)
    grid = [w for w in roles.workers if w is not None]
    for worker, private in zip(grid, private_runs(layout, grid), strict=True):
        expected = set()
        for block in layout.blocks:
            holders = [w for w in grid if block.classes & set(w.classes)]
            rows = sorted(w.row for w in holders)
            if worker in holders and rows == sorted({w.row for w in grid}):
                expected |= set(range(block.start, block.stop))
        assert indices(private) == sorted(expected)


ranks = st.lists(st.integers(0, 3), min_size=10, max_size=10)


@given(st.sets(st.integers(1, 59), max_size=9), ranks, st.lists(some_runs, min_size=4, max_size=4))
def test_a_plan_deals_as_many_slices_as_there_are(cuts, owners, parts):
    """With arbitrary shards and parts a rank may need several slices of one root."""
    pieces = [(*ends, rank) for ends, rank in zip(pairwise([0, *sorted(cuts), 60]), owners, strict=False)]
    shards = [Runs.union((a, b) for a, b, owner in pieces if owner == rank) for rank in range(4)]
    roles = Roles(1, (None,) * 4, Ownership(tuple(parts)), Ownership(tuple(shards)))
    assert list(plan_moves(roles)) == planned(roles)


def test_ten_thousand_classes_have_roles_and_plans():
    """Each class uses rows of several layers: a layer's parameters are ten thousand runs."""
    layout = make_network("psnet", (1, 8, 8), 10_000).layout()
    roles = assign_roles(layout, 3, placement="owner")
    assert sum(runs.size for runs in roles.shards) == layout.size
    assert [move.kind for move in plan_moves(roles)] == ["spread"]
    assert len(layout.runs_of(Box("dense1.weight")).starts) == 10_000
