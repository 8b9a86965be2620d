"""Index sets, layouts, grids, roles and plans."""

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psmpi.errors import UserError
from psmpi.layout import Classes, Runs, accumulate, assign_roles, make_grid, plan_moves, restrict
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network


def conv(channels, kernel):
    return [{"type": "conv", "channels": channels, "kernel": kernel}, {"type": "mean_pool"}, {"type": "sigmoid"}]


def dense(units):
    return {"type": "dense", "units": units}


def separable(units, groups=10):
    return {"type": "separable_dense", "units": units, "groups": groups}


FLAT = {"type": "flatten"}
MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def sizes(layout, number):
    return {layout.part(classes).size for classes in combinations(range(10), number)}


@pytest.mark.parametrize(
    ("model", "shape", "n"),
    [("lenet", MNIST, 44426), ("psnet", MNIST, 46740), ("lenet", CIFAR, 104182), ("psnet", CIFAR, 81750),
     ("psnet-24", MNIST, 46740), ("psnet-35", MNIST, 53780)],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(model, shape, n):
    assert make_network(model, shape, 10).layout().size == n


@pytest.mark.parametrize(
    ("model", "shape", "shared", "private"),
    [("psnet", MNIST, 1040, 4570), ("psnet", CIFAR, 4560, 7719), ("psnet-35", MNIST, 1040, 5274)],
)
def test_index_sets_of_the_psnets_are_the_published_ones(model, shape, shared, private):
    layout = make_network(model, shape, 10).layout()
    assert layout.blocks[0].classes == Classes.of(range(10))
    assert layout.blocks[0].stop == shared
    assert {b.stop - b.start for b in layout.blocks[1:]} == {private}
    assert sizes(layout, 1) == {shared + private}
    assert sizes(layout, 2) == {shared + 2 * private}
    multiplicity = np.zeros(layout.size, int)
    for i, j in combinations(range(10), 2):
        accumulate(multiplicity, layout.part((i, j)), np.full(shared + 2 * private, 2))
    assert set(multiplicity[:shared]) == {90}
    assert set(multiplicity[shared:]) == {18}
    assert multiplicity.sum() == 90 * (shared + 2 * private)


def test_sums_over_the_ordered_elements_are_the_published_ones():
    for shape, total in ((MNIST, 916_200), (CIFAR, 1_799_820)):
        layout = make_network("psnet", shape, 10).layout()
        assert sum(2 * layout.part(pair).size for pair in combinations(range(10), 2)) == total


@pytest.mark.parametrize(
    ("layers", "shape", "n", "v", "u"),
    [
        ([dense(50), dense(10)], (784,), 39760, {39301}, None),
        ([*conv(20, 5), *conv(50, 5), FLAT, dense(500), dense(10)], MNIST, 431080, {426571}, None),
        (
            [*conv(20, 4), *conv(50, 4), FLAT, separable(400), separable(200), separable(10)],
            MNIST,
            57200,
            {6026},
            {11712},
        ),
        (
            [*conv(6, 4), *conv(16, 4), FLAT, separable(200), separable(100), separable(10)],
            MNIST,
            9064,
            {1037, 1134},
            {1972, 2069, 2166},
        ),
    ],
)
def test_index_sets_of_other_networks_are_the_published_ones(layers, shape, n, v, u):
    layout = build("net", shape, layers, 10).layout()
    assert layout.size == n
    assert sizes(layout, 1) == v
    if u:
        assert sizes(layout, 2) == u


def test_blocks_that_cut_a_channel_share_it_between_neighbours():
    layers = [*conv(6, 4), *conv(16, 4), FLAT, separable(200), separable(100), separable(10)]
    layout = build("net", MNIST, layers, 10).layout()
    multiplicity = np.zeros(layout.size, int)
    for pair in combinations(range(10), 2):
        part = layout.part(pair)
        accumulate(multiplicity, part, np.full(part.size, 2))
    counts = dict(zip(*np.unique(multiplicity, return_counts=True), strict=True))
    assert counts == {90: 102, 34: 873, 18: 8089}


def test_dense_networks_name_the_layer_that_ties_the_classes():
    assert make_network("lenet", MNIST, 10).tie() == "dense2"
    assert make_network("psnet", MNIST, 10).tie() is None
    assert make_network("psnet", (1, 8, 8), 10).tie() is None


intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=6)


def test_networks_that_share_nothing_or_not_all_can_be_partitioned():
    """Rows of a single layer; groups that serve two classes each; a last layer without weights changes nothing."""
    assert build("net", (5,), [{"type": "dense", "units": 4}], 4).tie() is None
    halves = [
        {"type": "separable_dense", "units": 6, "groups": 2},
        {"type": "separable_dense", "units": 4, "groups": 2},
    ]
    assert build("net", (8,), halves, 4).tie() is None
    dense = [{"type": "dense", "units": 6}, {"type": "dense", "units": 4}]
    assert build("net", (8,), dense, 4).tie() == "dense1"
    assert build("net", (8,), [*dense, {"type": "identity"}], 4).tie() == "dense1"


def test_the_analysis_of_many_classes_needs_little_memory():
    """The users of units are kept as runs, without a table of classes times units."""
    network = make_network("psnet", (1, 8, 8), 1000)
    tracemalloc.start()
    layout = network.layout()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert layout.size * 4 > 1.8e6 and peak < 3e6
    assert layout.part([7]).size == 120 + 468


@given(intervals, intervals, st.integers(1, 5))
def test_runs_behave_as_sets_of_indices(first, second, pieces):
    a, b = Runs.union(first), Runs.union(second)

    def indices(runs):
        return {i for x, y in runs.intervals for i in range(x, y)}

    assert indices(a) == {i for x, y in first for i in range(x, y)}
    assert a.size == len(indices(a))
    assert indices(a & b) == indices(a) & indices(b)
    assert indices(a - b) == indices(a) - indices(b)
    cut = a.split(pieces)
    for runs in (a & b, b & a, a - b, *cut):
        assert Runs(runs.intervals) == runs, "sorted, with gaps, none empty"
    assert set().union(*map(indices, cut)) == indices(a)
    assert sum(c.size for c in cut) == a.size
    assert max(c.size for c in cut) - min(c.size for c in cut) <= 1


@given(intervals, st.integers(0, 1000))
def test_restrict_and_accumulate_are_adjoint(which, seed):
    rng, runs = np.random.default_rng(seed), Runs.union(which)
    x, y, scattered = rng.normal(size=60), rng.normal(size=runs.size), np.zeros(60)
    accumulate(scattered, runs, y)
    assert np.isclose(restrict(x, runs) @ y, x @ scattered)


@given(intervals, intervals)
def test_a_vector_inside_another_is_the_same_slice(first, second):
    a, b = Runs.union(first), Runs.union(second)
    place, w = a.inside(b), np.arange(60)
    if place is not None:
        assert restrict(w, b)[place].tolist() == restrict(w, a).tolist()


@given(st.integers(2, 12), st.integers(1, 60), st.integers(0, 6))
def test_every_class_is_computed_once_in_each_row(classes, workers, replicas):
    try:
        grid = make_grid("scores", classes, workers, replicas)
    except UserError:
        assert replicas and (replicas > workers or -(-workers // replicas) > classes)
        return
    assert len(grid) == workers
    for row in range(1 + max(w.row for w in grid)):
        columns = [w.classes for w in grid if w.row == row]
        assert [c for group in columns for c in group] == list(range(classes))
        assert max(map(len, columns)) - min(map(len, columns)) <= 1


@given(st.integers(2, 12), st.integers(1, 70), st.integers(0, 3))
def test_every_pair_of_classes_belongs_to_one_worker_of_each_row(classes, workers, replicas):
    try:
        grid = make_grid("pairs", classes, workers, replicas)
    except UserError:
        return
    for row in range(1 + max(w.row for w in grid)):
        pairs = [pair for w in grid if w.row == row for pair in w.elements]
        assert sorted(pairs) == list(combinations(range(classes), 2))
        for w in grid:
            assert {c for pair in w.elements for c in pair} == set(w.classes)


@pytest.mark.parametrize(("groups", "workers", "most"), [(5, 10, 19320), (4, 6, 28460), (3, 3, 33030), (10, 45, 10180)])
def test_pair_workers_hold_what_the_table_of_groups_says(groups, workers, most):
    layout = make_network("psnet", MNIST, 10).layout()
    grid = make_grid("pairs", 10, workers)
    assert max(layout.part(w.classes).size for w in grid) == most


NETWORKS = [
    make_network("psnet", (1, 8, 8), 10).layout(),
    build("cut", (1, 12, 12), [*conv(7, 3), FLAT, separable(40), separable(20, 5), dense(5)], 5).layout(),
    build("cut2", (1, 12, 12), [*conv(4, 3), *conv(16, 2), FLAT, separable(20, 5), separable(5, 5)], 5).layout(),
]


def play(roles, layout, w, grads):
    """Carry out a plan on plain arrays; return what parts receive and what shards receive back."""
    shards = [restrict(w, runs) for runs in roles.shards]
    parts = [np.full(runs.size, np.nan) for runs in roles.parts]
    back = [np.zeros(runs.size) for runs in roles.shards]

    def view(runs, vector, span):
        return vector[runs.local(*span)]

    for rank in range(roles.size):
        for span in (roles.parts[rank] & roles.shards[rank]).intervals:
            view(roles.parts[rank], parts[rank], span)[:] = view(roles.shards[rank], shards[rank], span)
            view(roles.shards[rank], back[rank], span)[:] = view(roles.parts[rank], grads[rank], span)
    for move in plan_moves(roles):
        for k, rank in enumerate(move.ranks):
            span = move.slices[k] if move.kind == "deal" else move.slices[0]
            if span[0] == span[1]:
                continue
            if move.kind == "sum":
                total = sum(view(roles.parts[r], grads[r], span) for r in move.ranks)
                view(roles.shards[rank], back[rank], span)[:] = total
            elif rank != move.root:
                view(roles.parts[rank], parts[rank], span)[:] = view(roles.shards[move.root], shards[move.root], span)
                view(roles.shards[move.root], back[move.root], span)[:] += view(roles.parts[rank], grads[rank], span)
    return parts, back


@settings(max_examples=150)
@given(
    st.sampled_from(NETWORKS), st.integers(1, 40), st.integers(1, 4), st.booleans(), st.integers(0, 4),
    st.sampled_from(["scores", "pairs"]), st.sampled_from(["master", "owner"]), st.integers(0, 99),
)  # fmt: skip
def test_scatter_and_gather_of_any_plan_are_adjoint(layout, size, masters, colocate, replicas, partition, place, seed):
    """Parts receive U_e w exactly, shards receive sum_e U_e^T g_e, each owned element once a replica group."""
    try:
        roles = assign_roles(
            layout, size, partition=partition, placement=place, masters=masters, colocate=colocate, replicas=replicas
        )
    except UserError:
        return
    rng = np.random.default_rng(seed)
    w = rng.normal(size=layout.size)
    grads = [rng.normal(size=runs.size) for runs in roles.parts]
    parts, back = play(roles, layout, w, grads)
    total = np.zeros(layout.size)
    for runs, part, grad in zip(roles.parts, parts, grads, strict=True):
        assert np.array_equal(part, restrict(w, runs))
        accumulate(total, runs, grad)
    owned = np.zeros(layout.size, int)
    for runs, received in zip(roles.shards, back, strict=True):
        np.testing.assert_allclose(received, restrict(total, runs), rtol=1e-12, atol=1e-12)
        accumulate(owned, runs, np.ones(runs.size, int))
    assert owned.min() >= 1, "every weight has an owner"


@pytest.mark.parametrize("size", range(1, 41))
@pytest.mark.parametrize("partition", ["scores", "pairs"])
def test_any_number_of_ranks_up_to_forty_has_work_for_all(size, partition):
    roles = assign_roles(make_network("psnet", MNIST, 10).layout(), size, partition=partition)
    workers = [w for w in roles.workers if w is not None]
    assert len(workers) == max(1, size - 1)
    assert all(w.classes for w in workers)


def test_owner_placement_leaves_the_shared_block_to_the_masters():
    layout = make_network("psnet", MNIST, 10).layout()
    roles = assign_roles(layout, 11, placement="owner")
    assert roles.shards[0].intervals == ((0, 1040),)
    assert [s.size for s in roles.shards[1:]] == [4570] * 10


def test_several_masters_share_the_vector_equally():
    layout = make_network("psnet", MNIST, 10).layout()
    assert [s.size for s in assign_roles(layout, 7, masters=3).shards] == [15580] * 3 + [0] * 4


@pytest.mark.parametrize(
    ("size", "options", "says"),
    [
        (3, {"masters": 4}, "at least 4 ranks"),
        (3, {"masters": 3}, "start 4 or more ranks, or add --colocate"),
        (3, {"masters": 0}, "use --masters 1"),
        (3, {"replicas": 5}, "use --replicas 2 or fewer"),
        (22, {"replicas": 1}, "use --replicas 3 or more, or 10 workers or fewer"),
        (4, {"masters": 4, "colocate": True, "placement": "owner", "replicas": 2}, "use --masters 2 or fewer"),
    ],
)
def test_impossible_roles_say_what_would_do(size, options, says):
    with pytest.raises(UserError, match=says):
        assign_roles(make_network("psnet", MNIST, 10).layout(), size, **options)


@pytest.mark.parametrize("classes", [2, 3, 7, 10, 12])
def test_more_workers_never_have_larger_slices_or_more_pairs(classes):
    """Every pair belongs to one worker, for any number of workers; full sets of groups have the sizes of the table."""
    previous, pairs = (classes + 1, classes**2), set(combinations(range(classes), 2))
    for workers in range(1, len(pairs) + 1):
        grid = make_grid("pairs", classes, workers, 1)
        assert len(grid) == workers and min(len(w.elements) for w in grid) >= 1
        assert sum(len(w.elements) for w in grid) == len(pairs) == len(set().union(*(w.elements for w in grid)))
        assert all(set(w.classes) == {c for pair in w.elements for c in pair} for w in grid)
        largest = max((len(w.classes), len(w.elements)) for w in grid)
        assert largest <= previous
        previous = largest
    if classes == 10:
        sizes = {n: max(len(w.classes) for w in make_grid("pairs", 10, n, 1)) for n in (1, 3, 6, 10, 15, 45)}
        assert sizes == {1: 10, 3: 7, 6: 6, 10: 4, 15: 4, 45: 2}
