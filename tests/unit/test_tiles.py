"""The pass over tiles of classes against the pass that has all scores at once."""

import tracemalloc

import numpy as np
import pytest
from helpers.tiled import BACKENDS, derive, make_ops

from psmpi.backend import Mirror, NumpyOps
from psmpi.comm.group import Counter, Group
from psmpi.data import Split
from psmpi.data.rows import ArrayRows
from psmpi.layout import Runs, restrict
from psmpi.nn import tail
from psmpi.nn.cut import has_head
from psmpi.nn.head import Head
from psmpi.nn.losses import LOSSES, make_loss
from psmpi.nn.metric import Metric
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.objective import GRADIENT_LIMIT
from psmpi.nn.tiles import TiledObjective
from psmpi.testing.world import run_ranks
from psmpi.training.evaluator import Evaluator

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def network_of(classes, trunk=True, bias=True):
    layers = [{"type": "dense", "units": 7}, {"type": "tanh"}] if trunk else []
    return build("head", (5,), [*layers, {"type": "dense", "units": classes, "bias": bias}], classes)


def problem(network, dtype, batch=33, size=1.0):
    rng = np.random.default_rng(0)
    w = (size * rng.normal(size=network.layout().size)).astype(dtype)
    return w, rng.normal(size=(5, batch)).astype(dtype), rng.integers(0, network.classes, batch)


@pytest.fixture
def tile(monkeypatch):
    """tile(n) sets the size of tiles to n classes."""
    return lambda n: monkeypatch.setattr(tail, "tile_size", lambda batch: n)


@pytest.mark.parametrize("size", [1, 4, 20])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 2e-5)])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_all_scores_at_once(name, dtype, tolerance, backend, size, tile):
    tile(size)
    kappa = {"kappa": 1.5} if "kappa" in LOSSES[name].settings else {}
    for trunk, bias in ((True, True), (False, True), (True, False)):
        network = network_of(13, trunk, bias)
        assert has_head(network)
        w, x, labels = problem(network, dtype)
        make = lambda: make_loss(name, dtype, outputs=13, **kappa)  # noqa: E731
        value, g, _ = derive(network, w, x, labels, make(), NumpyOps(), tiled=False)
        tiled_value, tiled_g, _ = derive(network, w, x, labels, make(), make_ops(backend), tiled=True)
        assert tiled_value == pytest.approx(value, rel=tolerance)
        assert abs(tiled_g - g).max() <= tolerance * abs(g).max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("spread", [10.0, 40.0, 400.0])
def test_large_margins_of_psl_have_tangents_and_gradients_that_are_scaled_down(spread, dtype, backend, tile):
    tile(4)
    # Behind the head such derivatives cancel, and rounding errors remain.
    network = network_of(13, trunk=False)
    w, x, labels = problem(network, dtype, size=spread)
    value, g, clipped = derive(network, w, x, labels, make_loss("psl", dtype), NumpyOps(), tiled=False)
    tiled_value, tiled_g, tiled_clipped = derive(
        network, w, x, labels, make_loss("psl", dtype), make_ops(backend), tiled=True
    )
    assert tiled_value == pytest.approx(value, rel=1e-3 if dtype == F32 else 1e-10) and tiled_clipped == clipped
    assert abs(tiled_g - g).max() <= (1e-3 if dtype == F32 else 1e-10) * abs(g).max()
    assert spread < 400 or clipped or dtype == F64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exp_clip", ["1", "5", "30"])
def test_tangents_begin_where_they_are_asked_for(exp_clip, backend, tile):
    tile(4)
    network = network_of(13)
    w, x, labels = problem(network, F32, size=2.0)
    full_loss, tiled_loss = make_loss("psl", F32, exp_clip=exp_clip), make_loss("psl", F32, exp_clip=exp_clip)
    value, g, clipped = derive(network, w, x, labels, full_loss, NumpyOps(), tiled=False)
    tiled_value, tiled_g, tiled_clipped = derive(network, w, x, labels, tiled_loss, make_ops(backend), tiled=True)
    assert (
        tiled_value == pytest.approx(value, rel=1e-5) and tiled_clipped == clipped and (exp_clip == "30" or clipped > 0)
    )
    assert abs(tiled_g - g).max() <= 1e-5 * abs(g).max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e6, 1e8])
def test_large_scores_of_squared_are_scaled_down_and_limited(size, backend, tile):
    tile(4)
    network = network_of(13, trunk=False)
    w, x, labels = problem(network, F32, size=size)
    _, g, _ = derive(network, w, x, labels, make_loss("squared", F32), NumpyOps(), tiled=False)
    _, tiled_g, _ = derive(network, w, x, labels, make_loss("squared", F32), make_ops(backend), tiled=True)
    assert abs(tiled_g - g).max() <= 1e-5 * abs(g).max() and abs(tiled_g).max() <= GRADIENT_LIMIT[F32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_score_of_a_label_is_an_error_of_psl(backend, tile):
    tile(4)
    network = network_of(13, trunk=False)
    w, x, labels = problem(network, F64)
    model = Model(network, network.layout(), w, None, NumpyOps())
    model.parts[-1].w[0][1][0][labels[3]] = np.inf
    with np.errstate(invalid="ignore"), pytest.raises(FloatingPointError, match="a score is not a finite number"):
        derive(network, w, x, labels, make_loss("psl", F64), make_ops(backend), tiled=True)


@pytest.mark.parametrize("spread", [1.0, 40.0])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_is_made_again_whatever_has_become_of_it(name, backend, spread, tile):
    tile(4)
    network = network_of(13)
    w, x, labels = problem(network, F64, size=spread)
    g = np.empty_like(w)
    model = Model(network, network.layout(), w, g, make_ops(backend), tiled=True)
    objective = TiledObjective(make_loss(name, F64, outputs=13), model)
    objective.reserve(13, len(labels))
    tape = model.forward(x)
    objective.losses(tape.scores, labels, 0.25)
    objective.backward(tape)
    first_g, clipped = g.copy(), objective.loss.clipped
    g.fill(np.nan)
    objective.again(tape)
    assert np.allclose(g, first_g, rtol=1e-12, atol=0) and objective.loss.clipped == clipped


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_score_that_is_no_number_is_an_error_or_a_loss_that_is_none(name, backend, lenient, tile):
    tile(4)
    network = network_of(13)
    w, x, labels = problem(network, F32)
    x[2, 5] = np.nan
    loss = make_loss(name, F32, outputs=13)
    loss.lenient = lenient
    with np.errstate(invalid="ignore"):
        if lenient:
            value, _, _ = derive(network, w, x, labels, loss, make_ops(backend), tiled=True)
            assert np.isnan(value)
        else:
            with pytest.raises(FloatingPointError, match="not a finite number"):
                derive(network, w, x, labels, loss, make_ops(backend), tiled=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_tests_count_as_with_all_scores_at_once(name, backend, tile):
    """Many rows of weights are the same, so that several classes have equal scores."""
    tile(5)
    network, ops = network_of(13), make_ops(backend)
    w, x, labels = problem(network, F32)
    model = Model(network, network.layout(), w, None, ops, tiled=True)
    weights, biases = Head(model).weights, Head(model).biases
    for k in range(4, 13):
        weights[k], biases[k] = weights[k % 4], biases[k % 4]
    all_scores = Model(network, network.layout(), w, None, ops).forward(x).scores
    expected = Metric(make_loss(name, F32, outputs=13), 13).sums(all_scores, labels)
    metric = Metric(make_loss(name, F32, outputs=13), 13)
    tiled_sums = metric.sums_by_tiles(Head(model), model.forward(x).scores, labels, np.arange(13))
    assert tiled_sums[0] == pytest.approx(expected[0], rel=1e-6) and np.array_equal(tiled_sums[1:], expected[1:])
    assert 0 < tiled_sums[1] < tiled_sums[2]


@pytest.fixture(scope="module", params=BACKENDS)
def many(request):
    """A model of many classes."""
    network = network_of(20_000)
    layout = network.layout()
    w = (0.1 * np.random.default_rng(0).normal(size=layout.size)).astype(F32)
    return Model(network, layout, w, np.empty_like(w), make_ops(request.param), tiled=True)


@pytest.mark.parametrize("name", LOSSES)
def test_no_array_of_all_scores_is_ever_made(name, many):
    classes, batch, rng = len(many.classes), 256, np.random.default_rng(0)
    x, labels = rng.normal(size=(5, batch)).astype(F32), rng.integers(0, classes, batch)
    objective = TiledObjective(make_loss(name, F32, outputs=classes), many)
    metric = Metric(make_loss(name, F32, outputs=classes), classes)
    tracemalloc.start()
    try:
        objective.reserve(classes, batch)
        tape = many.forward(x)
        objective.losses(tape.scores, labels, 1 / batch)
        objective.backward(tape)
        metric.sums_by_tiles(Head(many), tape.scores, labels, np.arange(classes))
        assert tracemalloc.get_traced_memory()[1] < 4 * classes * batch / 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["nll", "psl"])
def test_a_test_of_shards_makes_no_array_of_all_scores(name, ranks):
    """The evaluator keeps no scores of all samples either, and its sums are those of all scores at once."""
    classes, n = 40_000, 120
    network, rng = network_of(classes), np.random.default_rng(0)
    layout = network.layout()
    w, values = (rng.normal(size=size).astype(F32) for size in (layout.size, (n, 5)))
    split = Split(rng.integers(0, classes, n), (5,), 1.0, ArrayRows(values))
    shards = Runs(((0, layout.size),)).split(ranks)
    new_metric = lambda: Metric(make_loss(name, F32, outputs=classes), classes)  # noqa: E731

    def work(world):
        weights, ops = Mirror(restrict(w, shards[world.rank]).copy()), NumpyOps()
        group = Group(world, range(ranks), Counter())
        evaluator = Evaluator(network, group, shards, weights, split, new_metric(), ops)
        assert evaluator.nbytes < 4 * classes * 100 / 2
        return evaluator.run()

    expected = Model(network, layout, w, None, NumpyOps()).forward(values.T.copy()).scores
    expected = new_metric().sums(expected, split.labels)
    run_ranks(ranks, work)
    tracemalloc.start()
    try:
        sums = sum(run_ranks(ranks, work))
        # Beside the weights, of which each rank has a shard and gathers those of a layer.
        assert tracemalloc.get_traced_memory()[1] < ranks * (4 * classes * 100 / 2 + 2 * w.nbytes)
    finally:
        tracemalloc.stop()
    assert sums[0] == pytest.approx(expected[0], rel=1e-6) and np.array_equal(sums[1:], expected[1:])
