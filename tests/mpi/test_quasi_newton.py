"""Elements and their gradients against whole networks; partitioned quasi-Newton training, serial and distributed."""

import json
from dataclasses import replace
from itertools import combinations, pairwise

import h5py
import numpy as np
import pytest
from helpers.datasets import real
from helpers.runs import distance, run, usual_config

from psmpi.backend import make_backend
from psmpi.data import Batch, Dataset, open_dataset
from psmpi.methods.psl.element_set import ElementSet
from psmpi.methods.psl.plan import Settings
from psmpi.nn.losses import make_loss
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network
from psmpi.optim.curvature import RULES, Outcome
from psmpi.registry import find_method
from psmpi.training.context import Context

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
PAIRS = list(combinations(range(10), 2))


@pytest.fixture
def train(train):
    """train(ranks, *options) with one thread a rank, which is faster for small elements."""
    return lambda ranks, *options, **more: train(ranks, "--threads", "1", *options, **more)


def problem(shape, dtype, batch=40, seed=0):
    """Return (network, layout, weights, samples, sorted labels)."""
    network = make_network("psnet", shape, 10)
    rng = np.random.default_rng(seed)
    w = (0.2 * rng.standard_normal(network.layout().size)).astype(dtype)
    x = rng.random((int(np.prod(shape)), batch)).astype(dtype)
    return network, network.layout(), w, x, np.sort(rng.integers(0, 10, batch))


def element_set(network, layout, dtype, classes=range(10), pairs=PAIRS, loss=None, **options):
    loss = loss or make_loss("psl", dtype)
    elements = ElementSet(network, layout, tuple(classes), pairs, dtype, make_backend("auto"), loss, **options)
    return elements, np.full((len(elements.elements), elements.size), np.nan, dtype)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("loss", ["psl", "logistic"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_element_gradients_add_up_to_that_of_the_network(shape, dtype, loss, merged):
    network, layout, w, x, labels = problem(shape, dtype)
    network_loss, element_loss = make_loss(loss, dtype, kappa=2), make_loss(loss, dtype, kappa=2)
    g = np.empty_like(w)
    model = Model(network, layout, w, g, make_backend("auto"))
    tape = model.forward(x)
    scores = tape.scores
    dscores = np.empty(scores.shape)
    value = network_loss(scores, labels, 1 / 40, dscores)
    model.backward(tape, dscores.astype(dtype))
    elements, out = element_set(network, layout, dtype, loss=element_loss, merged=merged)
    assert len(elements.elements) == (45 if merged else 90)
    element_value = elements.gradients(w, x, labels, 1 / 40, out)
    tolerance = 1e-12 if dtype == F64 else 1e-6
    assert element_value + network_loss.constant == pytest.approx(value, rel=tolerance)
    assert elements.value(w, x, labels, 1 / 40) == pytest.approx(element_value, rel=tolerance)
    total = np.empty_like(w)
    elements.accumulate(out, total)
    assert np.linalg.norm(total - g) <= tolerance * np.linalg.norm(g)


@pytest.mark.parametrize("merged", [False, True])
def test_an_element_gradient_is_that_of_its_terms(merged):
    """Compare each with a backward pass of its terms through the whole network."""
    network, layout, w, x, labels = problem((1, 8, 8), F64)
    labels[labels == 4] = 5
    elements, out = element_set(network, layout, F64, merged=merged)
    elements.gradients(w, x, labels, 1.0, out)
    model = Model(network, layout, w, np.empty_like(w), make_backend("numpy"))
    for number, (i, j) in enumerate(elements.elements):
        tape = model.forward(x)
        scores = tape.scores.copy()
        dscores = np.zeros_like(scores)
        for a, b in ((i, j), (j, i)) if merged else ((i, j),):
            in_class = labels == a
            term = np.exp(scores[b] - scores[a]) * in_class
            dscores[b] += term
            dscores[a] -= term
        model.backward(tape, dscores)
        single = np.zeros((len(elements.elements), elements.size))
        single[number] = out[number]
        single_gradient = np.empty_like(w)
        elements.accumulate(single, single_gradient)
        assert np.linalg.norm(single_gradient - model.g) <= 1e-12 * max(1e-3, np.linalg.norm(model.g))
    expected = [4 not in e[: 1 + merged] if not merged else e != (4, 4) for e in elements.elements]
    assert elements.seen(labels).tolist() == expected
    assert not out[~elements.seen(labels)].any()


def test_elements_of_different_sizes_and_of_a_worker():
    """Blocks that cut channels make elements of different sizes; a worker sees its own classes only."""
    layers = [
        *({"type": "conv", "channels": 6, "kernel": 4}, {"type": "mean_pool"}, {"type": "sigmoid"}),
        *({"type": "conv", "channels": 16, "kernel": 4}, {"type": "mean_pool"}, {"type": "sigmoid"}),
        *({"type": "flatten"}, {"type": "separable_dense", "units": 200, "groups": 10}, {"type": "sigmoid"}),
        {"type": "separable_dense", "units": 10, "groups": 10},
    ]
    network = build("cut", (1, 28, 28), layers, 10)
    layout, rng = network.layout(), np.random.default_rng(1)
    w = 0.1 * rng.standard_normal(layout.size)
    x, labels = rng.random((784, 30)), np.sort(rng.integers(0, 10, 30))
    classes, pairs = (2, 3, 7), [(2, 7), (3, 7)]
    elements, out = element_set(network, layout, F64, classes, pairs)
    assert len(set(elements.restriction.sizes)) > 1
    own_w = np.concatenate([w[a:b] for a, b in elements.part.intervals])
    own_samples = np.isin(labels, classes)
    numbers = np.searchsorted(classes, labels[own_samples])
    elements.gradients(own_w, np.ascontiguousarray(x[:, own_samples]), numbers, 1.0, out)
    model = Model(network, layout, w, np.empty_like(w), make_backend("numpy"))
    tape = model.forward(x)
    scores = tape.scores
    dscores = np.zeros_like(scores)
    for i, j in ((2, 7), (7, 2), (3, 7), (7, 3)):
        term = np.exp(scores[j] - scores[i]) * (labels == i)
        dscores[j] += term
        dscores[i] -= term
    model.backward(tape, dscores)
    total = np.empty_like(own_w)
    elements.accumulate(out, total)
    expected = np.concatenate([model.g[a:b] for a, b in elements.part.intervals])
    assert np.linalg.norm(total - expected) <= 1e-12 * np.linalg.norm(expected)
    restricted = elements.make_vectors()
    elements.restrict(own_w, restricted)
    for e, size in enumerate(elements.restriction.sizes):
        expected = np.concatenate([w[a:b] for a, b in layout.part(elements.elements[e]).intervals])
        assert np.array_equal(restricted[e, :size], expected) and not restricted[e, size:].any()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "layers",
    [
        [
            {"type": "conv", "channels": 16, "kernel": 3, "bias": False}, {"type": "mean_pool"}, {"type": "sigmoid"},
            {"type": "flatten"}, {"type": "separable_dense", "units": 10, "groups": 10, "bias": False},
        ],
        [
            {"type": "flatten"}, {"type": "separable_dense", "units": 48, "groups": 4, "bias": False},
            {"type": "sigmoid"}, {"type": "separable_dense", "units": 10, "groups": 2, "bias": False},
        ],
    ],
    ids=["convolution", "dense"],
)  # fmt: skip
def test_layers_without_biases_have_the_gradients_of_the_network(layers, merged):
    network = build("without", (1, 8, 8), layers, 10)
    layout, rng = network.layout(), np.random.default_rng(3)
    w, x, labels = 0.3 * rng.standard_normal(layout.size), rng.random((64, 40)), rng.integers(0, 10, 40)
    loss = make_loss("psl", F64)
    model = Model(network, layout, w, np.empty_like(w), make_backend("auto"))
    dscores = np.empty((10, 40))
    tape = model.forward(x)
    loss(tape.scores, labels, 1 / 40, dscores)
    model.backward(tape, dscores)
    elements, out = element_set(network, layout, F64, merged=merged)
    elements.gradients(w, x, labels, 1 / 40, out)
    total = np.empty_like(w)
    elements.accumulate(out, total)
    assert np.linalg.norm(total - model.g) <= 1e-12 * np.linalg.norm(model.g)


@pytest.mark.parametrize(("shape", "shared"), [((1, 28, 28), 1040), ((3, 32, 32), 4560)])
def test_the_matrix_starts_as_the_diagonal_of_multiplicities(shape, shared):
    network = make_network("psnet", shape, 10)
    layout = network.layout()
    elements, v = element_set(network, layout, F64)
    elements.restrict(np.ones(layout.size), v)
    diagonal = np.empty(layout.size)
    elements.accumulate(v, diagonal)
    values, counts = np.unique(diagonal, return_counts=True)
    assert values.tolist() == [18, 90] and counts.tolist() == [layout.size - shared, shared]


def test_huge_terms_give_finite_gradients():
    network, layout, w, x, labels = problem((1, 8, 8), F32)
    elements, out = element_set(network, layout, F32)
    value = elements.gradients(w * 400, x, labels, 1.0, out)
    assert np.isfinite(out).all() and np.isfinite(value) and value > 1e30


class Alone:
    rank, size = 0, 1


def first(split, n):
    """Return a split with the first n samples."""
    return replace(
        split, targets=split.targets[:n], index=(np.arange(split.n) if split.index is None else split.index)[:n]
    )


def make_method(network, dataset, **changes):
    base = usual_config()
    config = replace(
        base,
        data=replace(base.data, batch_size=dataset.train.n),
        model=replace(base.model, dtype="float64"),
        optimization=replace(base.optimization, **changes),
    ).changed(Settings, partition="pairs")
    return find_method("psl")(Context(Alone(), network, dataset, config, make_backend("auto")))


def digits(n=120):
    dataset = open_dataset("digits", "")
    return replace(dataset, train=first(dataset.train, n))


@pytest.mark.parametrize("rule", RULES)
def test_the_secant_equations_hold_after_a_step(rule):
    """B_e s_e = y_e for every element that took its pair, and B s = y where all elements did."""
    network = make_network("psnet", (1, 8, 8), 10)
    method = make_method(network, digits(), optimizer=rule)
    newton, ids, updates, all_updated = method.newton, np.arange(120), 0, 0
    for _ in range(8):
        failed, weights = newton.scalars["failed_steps"], method.w.copy()
        method.step(Batch(ids), 0.0)
        if newton.scalars["failed_steps"] > failed:
            continue
        # Take the step from the elements, because a difference of weights would add rounding errors.
        step, down = newton.s.copy(), newton.elements.restriction.down.table
        s, product = np.zeros(newton.elements.part.size), np.empty_like(step)
        for source, target, length in down:
            s[source : source + length] = step.reshape(-1)[target : target + length]
        newton.operators.product(step, product)
        assert np.linalg.norm(method.w - weights - s) <= 1e-12 * np.linalg.norm(weights)
        np.copyto(newton.p, s)
        newton._product(newton.p, newton.q)
        updated = newton.outcome == Outcome.UPDATED
        updates += updated.sum()
        y = newton.after
        deviation, size = (np.linalg.norm(v, axis=1) for v in (product - y, y))
        # A product starts from sigma s; where sigma s is thousands of times y, it cancels.
        start = newton.operators.sigma * np.linalg.norm(step, axis=1)
        assert (deviation[updated] <= np.maximum(1e-10 * size, 1e-12 * start)[updated]).all()
        if updated.all():
            all_updated += 1
            total = np.empty_like(s)
            newton.elements.accumulate(y, total)
            assert np.linalg.norm(newton.q - total) <= max(1e-10 * np.linalg.norm(total), 1e-12 * start.sum())
    assert updates >= 200 and (all_updated >= 3 or rule == "plbfgs")


@pytest.mark.parametrize("lr", [1e-3, 2.5e-4])
def test_a_first_scaled_step_is_that_of_adam_with_the_multiplicities(lr):
    """Element matrices are the identity, so B is diagonal: multiplicities plus sigma, which rises as lr drops."""
    network = make_network("psnet", (1, 8, 8), 10)
    options = {"cg_tolerance": 1e-13, "line_search": "backtracking", "sigma": 1000.0}
    method = make_method(network, digits(), optimizer="plse", scaling="moments", **options)
    newton, w = method.newton, method.w.copy()
    method.step(Batch(np.arange(120)), lr)
    g = newton.g / newton.root
    multiplicity = np.empty_like(w)
    newton.elements.accumulate(np.ones((90, newton.elements.size)), multiplicity)
    assert sorted(set(multiplicity.tolist())) == [18, 90]
    full_step = -g / (np.abs(g) + 1e-8) / (multiplicity + 1000 * 1e-3 / lr)
    moved = method.w - w
    length = (moved @ full_step) / (full_step @ full_step)
    assert 0 < length <= 1 + 1e-9 and np.linalg.norm(moved - length * full_step) <= 1e-10 * np.linalg.norm(moved)


@pytest.mark.parametrize("scaling", ["none", "moments"])
def test_sigma_is_added_to_the_matrix(scaling):
    network = make_network("psnet", (1, 8, 8), 10)
    methods = [make_method(network, digits(), optimizer="plsr1", scaling=scaling, sigma=s) for s in (0.0, 3.0)]
    products = []
    for method in methods:
        method.newton.p[:] = np.cos(np.arange(len(method.w)))
        method.newton._product(method.newton.p, method.newton.q)
        products.append(method.newton.q.copy())
    assert np.linalg.norm(products[1] - products[0] - 3 * methods[0].newton.p) <= 1e-12 * np.linalg.norm(products[1])


def test_scaled_pairs_satisfy_the_secant_equation_of_the_weights():
    """D^(1/2) B D^(1/2) s = y, with s and y those of the weights, where every element took its pair."""
    network = make_network("psnet", (1, 8, 8), 10)
    method = make_method(network, digits(), optimizer="plse", scaling="moments")
    newton, ids, all_updated = method.newton, np.arange(120), 0
    for _ in range(8):
        before = method.w.copy()
        method.gradient(Batch(ids))
        g = method.g.copy()
        method.step(Batch(ids), 1e-3)
        method.gradient(Batch(ids))
        y, s, root = method.g - g, method.w - before, newton.root.copy()
        if not (newton.moved and (newton.outcome == Outcome.UPDATED).all()):
            continue
        all_updated += 1
        np.copyto(newton.p, s / root)
        newton._product(newton.p, newton.q)
        assert np.linalg.norm(newton.q / root - y) <= 1e-8 * np.linalg.norm(y)
    assert all_updated >= 2


OPTIONS = ("--partition", "pairs", "--dtype", "float64", "--max-steps", "12")
VARIANTS = {
    "plbfgs": ("--optimizer", "plbfgs"),
    # Denominators of SR1 may be a millionth of their terms and multiply rounding by as much: a few steps only.
    "plsr1": ("--optimizer", "plsr1", "--globalization", "trust-region", "--max-steps", "6"),
    "plse": ("--optimizer", "plse", "--merge-pairs", "--curvature", "relative"),
    # Fourth roots of squares of small gradients multiply rounding too.
    "scaled": (
        *(
            "--max-steps",
            "5",
            "--optimizer",
            "plbfgs",
            "--scaling",
            "moments",
            "--sigma",
            "1000",
            "--extrapolation",
            "constant",
        ),
        *("--schedule", "cosine", "--cg-iterations", "5"),
    ),
    "adaptive": ("--optimizer", "plse", "--extrapolation", "adaptive", "--line-search", "backtracking"),
}


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v == "plbfgs")) for v in VARIANTS])
def test_steps_do_not_depend_on_ranks(train, variant):
    options = (*OPTIONS, *VARIANTS[variant])
    serial = train(1, *options)
    layouts: list = [(4, ())]
    if variant == "plbfgs":
        layouts += [(2, ()), (7, ("--masters", "3")), (4, ("--colocate",)), (5, ("--placement", "owner"))]
    for ranks, layout in layouts:
        result = train(ranks, *options, *layout)
        assert distance(serial.tensors(), result.tensors()) <= 1e-10
        assert result.rows[-1]["train_loss"] == pytest.approx(serial.rows[-1]["train_loss"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["plbfgs", "plse", "plsr1"])
def test_training_learns(train, optimizer):
    # SR1 multiplies rounding: accuracies on two processors differ by a tenth, and by more until epoch 12.
    more = ("--globalization", "trust-region", "--epochs", "20") if optimizer == "plsr1" else ("--epochs", "12")
    rows = train(1, "--partition", "pairs", "--optimizer", optimizer, *more).rows
    assert rows[-1]["test_accuracy"] > 0.6 and rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        pytest.param(1, ("--optimizer", "plse", "--extrapolation", "constant"), marks=pytest.mark.slow),
        (3, ("--optimizer", "plsr1", "--globalization", "trust-region", "--dtype", "float32")),
        (4, ("--optimizer", "plbfgs", "--merge-pairs", "--masters", "2", "--placement", "owner")),
        (
            3,
            (
                *("--optimizer", "plse", "--scaling", "moments", "--sigma", "50", "--extrapolation", "adaptive"),
                *("--batch-size", "37", "--dtype", "float32", "--colocate", "--schedule", "cosine"),
            ),
        ),
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(train, ranks, options):
    """Compare weights, vectors and the curvature of every element."""
    full_run = train(ranks, *OPTIONS, *options, "--max-steps", "20")
    first = train(ranks, *OPTIONS, *options, "--max-steps", "9")
    resumed = train(ranks, *OPTIONS, *options, "--max-steps", "20", "--resume", "auto", out=first.out)
    assert "afresh" not in resumed.stdout
    full_tensors, resumed_tensors = full_run.tensors(), resumed.tensors()
    assert {
        f"elements/{name}" for name in ("classes", "pairs", "gram", "middle", "stamps", "sigma")
    } < full_tensors.keys()
    assert full_tensors.keys() == resumed_tensors.keys() and all(
        np.array_equal(full_tensors[k], resumed_tensors[k]) for k in full_tensors
    )
    assert len(full_tensors["elements/classes"]) == (45 if "--merge-pairs" in options else 90)
    assert (full_tensors["elements/pushes"] > 0).sum() > 40


def test_curvature_goes_on_on_another_number_of_ranks(train):
    options = (*OPTIONS, "--optimizer", "plse", "--extrapolation", "constant")
    first = train(1, *options, "--max-steps", "9")
    results = [
        train(ranks, *options, "--max-steps", "11", "--resume", first.checkpoint).tensors() for ranks in (1, 3, 6)
    ]
    for tensors in results[1:]:
        assert (tensors["elements/classes"] == results[0]["elements/classes"]).all()
        assert distance(results[0], tensors) <= 1e-9


def test_the_tools_tell_of_elements(train):
    """`show` lists the elements with their sizes, `diff` compares them, and `cut` leaves them out."""
    runs = [train(1, *OPTIONS, "--max-steps", n, "--optimizer", "plbfgs") for n in ("6", "7")]
    status, out, err = run(1, "-m", "psmpi.inspect", "show", runs[0].checkpoint)
    assert status == 0 and "elements  90 elements" in out and "pairs  float64 90 x 10 x 1056" in out, err
    status, out, err = run(1, "-m", "psmpi.inspect", "diff", runs[0].checkpoint, runs[1].checkpoint, "--json")
    table = {row["name"]: row for row in json.loads(out)["tensors"]}
    assert status == 0 and table["elements/classes"]["identical"] and table["elements/pairs"]["distance"] > 0, err
    pairs = [r.tensors()["elements/pairs"] for r in runs]
    expected = np.linalg.norm(pairs[1] - pairs[0]) / np.linalg.norm(pairs[0])
    assert table["elements/pairs"]["distance"] == pytest.approx(expected, rel=1e-12)
    part = runs[0].checkpoint.parent / "part.h5"
    status, _, err = run(1, "-m", "psmpi.inspect", "cut", runs[0].checkpoint, "--classes", "1", "2", "--out", part)
    assert status == 0, err
    with h5py.File(part) as file:
        assert "elements" not in file


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("--scaling", "moments"), ("--scaling", "none")),
        ((), ("--scaling", "moments")),
        ((), ("--extrapolation", "constant")),
        (("--extrapolation", "constant"), ("--extrapolation", "none")),
    ],
)
def test_a_state_of_other_settings_is_not_taken_up(train, first, then):
    """Pairs of scaled variables are no pairs of the weights."""
    first_run = train(1, *OPTIONS, "--optimizer", "plse", *first)
    resumed = train(1, *OPTIONS, "--optimizer", "plse", *then, "--max-steps", "13", "--resume", first_run.checkpoint)
    output = " ".join(resumed.stdout.split())
    assert "note: the checkpoint's optimizer has " in output and "the optimizer starts afresh" in output
    assert resumed.tensors()["elements/pushes"].max() <= 1


def test_counts_begin_again_in_a_resumed_run(train):
    """Failed steps of plse and of lbfgs-tr are counted in the rows of their epochs."""
    pairs = ("--partition", "pairs", "--optimizer", "plse", "--globalization", "trust-region")
    for options in (pairs, ("--optimizer", "lbfgs-tr")):
        options = (*options, "--kappa", "200", "--max-steps")
        first = train(1, *options, "10")
        failed = first.rows[-1]["events"]["optimizer_failed_steps"]
        assert failed > 0 and f"optimizer failed steps: {failed} so far" in first.stdout
        resumed = train(1, *options, "12", "--resume", first.checkpoint)
        assert resumed.rows[-1]["events"]["optimizer_failed_steps"] <= 2


def test_a_line_search_comes_back_from_steps_far_too_long(train):
    """The first gradients are so large that 46 cuts of the length are too few."""
    options = ("--partition", "pairs", "--optimizer", "plbfgs", "--kappa", "12", "--max-steps", "30")
    assert train(1, *options).rows[-1]["events"]["optimizer_failed_steps"] == 30
    result = train(1, *options, "--first-step", "last")
    assert result.rows[-1]["events"]["optimizer_failed_steps"] < 15
    assert result.rows[-1]["events"]["steps_without_update"] < 15


@pytest.mark.parametrize(("first_step", "firsts"), [("unit", [1.0, 1.0, 1.0]), ("last", [1.0, 0.02, 1.0])])
def test_a_line_search_starts_at_1_unless_told_otherwise(first_step, firsts, monkeypatch):
    """The first two steps have the lengths 0.002 and 0.5."""
    method = make_method(make_network("psnet", (1, 8, 8), 10), digits(), optimizer="plbfgs", first_step=first_step)
    lengths, first_lengths = iter([0.002, 0.5, 0.25]), []

    def search(value, start, slope, *, extend, first):
        first_lengths.append(first)
        return next(lengths), start

    monkeypatch.setattr("psmpi.methods.psl.newton.armijo", search)
    for _ in firsts:
        method.step(Batch(np.arange(120)), 1e-3)
    assert first_lengths == pytest.approx(firsts)


def test_steps_that_bring_no_pair_are_counted_when_they_happen(monkeypatch):
    network = make_network("psnet", (1, 8, 8), 10)
    method = make_method(network, digits(), optimizer="plbfgs")
    skip = np.full(90, Outcome.SKIPPED)
    monkeypatch.setattr(method.newton.operators, "push", lambda *a: skip)
    for count in (1, 2, 3):
        method.step(Batch(np.arange(120)), 1e-3)
        events = method.events()
        assert events["steps_without_update"] == count and events["curvature_pairs_skipped"] == 90 * count
    assert method.events()["steps_without_update"] == 3


@pytest.mark.parametrize("options", [("--memory", "3"), ("--merge-pairs",)])
def test_other_elements_than_the_checkpoint_has_start_afresh(train, options):
    first = train(1, *OPTIONS, "--optimizer", "plse")
    resumed = train(1, *OPTIONS, "--optimizer", "plse", *options, "--max-steps", "14", "--resume", first.checkpoint)
    assert "the curvature of these elements: it starts afresh" in " ".join(resumed.stdout.split())


@pytest.mark.parametrize(
    ("ranks", "options", "says"),
    [
        (1, (), "needs --partition pairs"),
        (3, ("--partition", "pairs", "--replicas", "2"), "use --replicas 1"),
        (1, ("--partition", "pairs", "--damping"), "--damping is an option of --optimizer plbfgs"),
        (1, ("--partition", "pairs", "--scaling", "moments", "--eps", "1e-50"), "rounds to 0 in float32"),
        (1, ("--partition", "pairs", "--sigma", "-1"), "0 or more"),
        (1, ("--partition", "pairs", "--memory", "101"), "1 to 100 pairs"),
        (1, ("--partition", "pairs", "--extrapolation", "adaptive", "--globalization", "trust-region"), "line-search"),
        (1, ("--partition", "pairs", "--first-step", "last", "--globalization", "trust-region"), "line-search"),
        (
            1,
            ("--partition", "pairs", "--line-search", "backtracking", "--globalization", "trust-region"),
            "leave it out, or use --globalization line-search",
        ),
        (1, ("--partition", "pairs", "--memory", "0"), "--memory 0"),
        (1, ("--partition", "pairs", "--cg-tolerance", "2"), "--cg-tolerance 2"),
        (1, ("--partition", "pairs", "--cg-iterations", "0"), "--cg-iterations 0"),
        (1, ("--partition", "pairs", "--weight-decay", "0.1"), "--weight-decay is an option of --optimizer sgd"),
        (1, ("--partition", "pairs", "--loss", "nll"), "--loss psl"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, ranks, options, says):
    status, _, err = run(ranks, "-m", "psmpi.train", "--optimizer", "plse", *options, "--out", tmp_path / "run")
    assert status == 1 and says in " ".join(err.split()) and "Traceback" not in err


CUSTOM = [
    *({"type": "conv", "channels": 6, "kernel": 5}, {"type": "mean_pool"}, {"type": "sigmoid"}),
    *({"type": "conv", "channels": 10, "kernel": 5}, {"type": "mean_pool"}, {"type": "sigmoid"}, {"type": "flatten"}),
    *({"type": "separable_dense", "units": 60, "groups": 10}, {"type": "sigmoid"}),
    *({"type": "separable_dense", "units": 40, "groups": 10}, {"type": "sigmoid"}),
    {"type": "separable_dense", "units": 10, "groups": 10},
]


@pytest.mark.parametrize(
    ("rule", "bound"),
    [("plbfgs", 5.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("plse", 5.0), ("plsr1", 8.0)))],
)
def test_the_loss_of_a_fixed_minibatch_never_increases(rule, bound):
    """Forty iterations on the first 200 training images of MNIST."""
    mnist = open_dataset("mnist", real("mnist"))
    network = build("small", (1, 28, 28), CUSTOM, 10)
    assert network.layout().size == 3016
    dataset = Dataset(name="mnist", outputs=10, shape=mnist.shape, train=first(mnist.train, 200), test=mnist.test)
    method = make_method(network, dataset, optimizer=rule)
    losses, ids = [], np.arange(200)
    for _ in range(41):
        before = method.loss_sum
        method.step(Batch(ids), 0.0)
        losses.append((method.loss_sum - before) / 200)
    assert all(b <= a for a, b in pairwise(losses)), losses
    assert losses[-1] <= bound
    assert method.newton.counts["updated"] > 0
