"""Layers, models and initial weights."""

import numpy as np
import pytest
from scipy.signal import correlate2d

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.nn.init import bounds, initial_weights
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network
from psmpi.partition import Runs, accumulate, restrict

FLAT, TANH = {"type": "flatten"}, {"type": "tanh"}


def conv(channels, kernel, pool="mean_pool", size=2, activation="sigmoid"):
    kind = {"type": pool, "size": size}
    return [{"type": "conv", "channels": channels, "kernel": kernel}, kind, {"type": activation}]


def separable(units, groups):
    return {"type": "separable_dense", "units": units, "groups": groups}


def dense(units):
    return {"type": "dense", "units": units}


NETWORKS = {
    "dense": ((7,), [dense(6), {"type": "tanh"}, dense(4)], 4),
    "identity": ((7,), [{"type": "identity"}, dense(4), {"type": "identity"}], 4),
    "separable dense, ignored inputs": ((11,), [separable(8, 4), {"type": "relu"}, separable(4, 4)], 4),
    "groups of two kinds": ((24,), [separable(16, 8), TANH, separable(12, 4), TANH, dense(4)], 4),
    "blocks cut by later blocks": ((12,), [separable(12, 2), {"type": "tanh"}, separable(4, 4)], 4),
    "separable after dense": ((6,), [dense(9), {"type": "tanh"}, dense(8), {"type": "tanh"}, separable(4, 4)], 4),
    "mean pooling": ((2, 9, 9), [*conv(3, 3), *conv(8, 2), FLAT, separable(4, 4)], 4),
    "mean pooling by three": ((2, 11, 11), [*conv(8, 2, size=3), FLAT, separable(4, 4)], 4),
    "max pooling": ((2, 9, 9), [*conv(3, 3, "max_pool", activation="relu"), FLAT, dense(4)], 4),
    "pooling first": ((2, 8, 8), [{"type": "mean_pool"}, *conv(4, 2, activation="tanh"), FLAT, dense(4)], 4),
    "no pooling": ((1, 5, 5), [{"type": "conv", "channels": 4, "kernel": 3}, TANH, FLAT, separable(4, 4)], 4),
    "separable convolution": (
        (4, 8, 8),
        [{"type": "separable_conv", "channels": 8, "kernel": 3, "groups": 4}, {"type": "mean_pool"}, TANH,
         {"type": "separable_conv", "channels": 8, "kernel": 2, "groups": 4}, TANH, FLAT, separable(4, 4)],
        4,
    ),
    "activations in a row": ((7,), [dense(6), {"type": "sigmoid"}, TANH, {"type": "relu"}, dense(4)], 4),
    "activations around a flatten": (
        (2, 5, 5),
        [TANH, {"type": "conv", "channels": 4, "kernel": 3}, {"type": "sigmoid"}, FLAT, TANH, separable(4, 4)],
        4,
    ),
    "channels cut by blocks": ((1, 8, 8), [*conv(3, 3), *conv(7, 2), FLAT, separable(5, 5)], 5),
    "small psnet": ((1, 8, 8), None, 10),
}  # fmt: skip


def make(name):
    shape, layers, classes = NETWORKS[name]
    return make_network("psnet", shape, classes) if layers is None else build(name, shape, layers, classes)


def random_problem(network, batch=3, dtype=np.float64, seed=0):
    layout = network.layout()
    rng = np.random.default_rng(seed)
    w = rng.normal(size=layout.size).astype(dtype)
    x = rng.normal(size=(int(np.prod(network.in_shape)), batch)).astype(dtype)
    d = rng.normal(size=(network.classes, batch)).astype(dtype)
    return layout, w, x, d


def make_model(network, layout, w, classes=None, fold=True):
    """A model of `classes` over its own copy of its part of w, its gradient not yet filled."""
    part = layout.part(range(network.classes) if classes is None else classes)
    return Model(
        network, layout, restrict(w, part), np.full(part.size, np.nan, w.dtype), NumpyOps(), classes, fold=fold
    )


def plain_scores(network, layout, w, x):
    """The network sample by sample, written from the definitions with SciPy's correlation."""
    tensors = {}
    for k, p in enumerate(layout.parameters):
        rows = np.empty((p.units, p.unit_size))
        for piece in layout.pieces():
            if piece.parameter == k:
                count = piece.last - piece.first
                rows[piece.first : piece.last] = w[piece.offset : piece.offset + count * p.unit_size].reshape(count, -1)
        tensors[p.name] = rows.reshape(p.shape)
    scores = []
    for sample in x.T:
        a = sample.reshape(network.in_shape)
        for layer in network.layers:
            kind = type(layer).__name__
            if kind == "Dense":
                weight, bias = tensors[f"{layer.name}.weight"], tensors[f"{layer.name}.bias"]
                blocks = weight.reshape(layer.groups, -1, layer.group_inputs)
                used = a[: layer.groups * layer.group_inputs].reshape(layer.groups, -1)
                a = np.concatenate([m @ v for m, v in zip(blocks, used, strict=True)]) + bias
            elif kind == "Conv":
                weight, bias = tensors[f"{layer.name}.weight"], tensors[f"{layer.name}.bias"]
                outs = []
                for u in range(layer.units):
                    first = u // (layer.units // layer.groups) * layer.group_inputs
                    maps = [correlate2d(a[first + c], weight[u, c], "valid") for c in range(layer.group_inputs)]
                    outs.append(sum(maps) + bias[u])
                a = np.stack(outs)
            elif kind == "Pool":
                c, h, width = layer.out_shape
                windows = a[:, : h * layer.size, : width * layer.size].reshape(c, h, layer.size, width, layer.size)
                a = windows.mean(axis=(2, 4)) if layer.kind == "mean" else windows.max(axis=(2, 4))
            elif kind == "Flatten":
                a = a.reshape(-1)
            else:
                act = {"sigmoid": lambda v: 1 / (1 + np.exp(-v)), "tanh": np.tanh, "relu": lambda v: v * (v > 0)}
                a = act.get(layer.kind, lambda v: v)(a)
        scores.append(a)
    return np.array(scores).T


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_follow_the_definitions(name, fold):
    network = make(name)
    layout, w, x, _ = random_problem(network)
    model = make_model(network, layout, w, fold=fold)
    np.testing.assert_allclose(model.forward(x), plain_scores(network, layout, w, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_match_central_differences(name, fold):
    network = make(name)
    layout, w, x, d = random_problem(network)
    model = make_model(network, layout, w, fold=fold)
    model.forward(x)
    model.backward(d.copy())
    h, w, g = 1e-6, model.w, model.g
    chosen = np.random.default_rng(1).permutation(len(w))[:60]
    for i in chosen:
        w[i] += h
        above = (model.forward(x) * d).sum()
        w[i] -= 2 * h
        below = (model.forward(x) * d).sum()
        w[i] += h
        assert abs((above - below) / (2 * h) - g[i]) <= 1e-7 * max(1, np.abs(g).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_restricted_to_classes_is_the_same_model(name):
    """Scores and gradients of the subnetworks of any classes add up to those of the whole network."""
    network = make(name)
    layout, w, x, d = random_problem(network)
    whole = make_model(network, layout, w)
    scores = whole.forward(x).copy()
    whole.backward(d.copy())
    total, g = np.zeros_like(w), np.zeros_like(w)
    accumulate(g, whole.part, whole.g)
    every = list(range(network.classes))
    for classes in ([every[0], every[-1]], every[1:-1]):
        model = make_model(network, layout, w, classes)
        np.testing.assert_allclose(model.forward(x), scores[classes], rtol=1e-12, atol=1e-13)
        model.backward(d[classes])
        accumulate(total, model.part, model.g)
    np.testing.assert_allclose(total, g, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_follows_float64(name):
    network = make(name)
    layout, w, x, d = random_problem(network)
    results = []
    for dtype in (np.float64, np.float32):
        model = make_model(network, layout, w.astype(dtype))
        scores = model.forward(x.astype(dtype)).copy()
        model.backward(d.astype(dtype))
        assert scores.dtype == model.g.dtype == dtype
        results.append((scores, model.g))
    for double, single in zip(*results, strict=True):
        assert np.linalg.norm(single - double) <= 1e-5 * np.linalg.norm(double)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_samples_are_those_of_minibatches_of_one(name):
    network = make(name)
    layout, w, x, d = random_problem(network, batch=5)
    for classes in (None, (1,)):
        part = layout.part(range(network.classes) if classes is None else classes)
        mine = np.concatenate([w[a:b] for a, b in part.intervals])
        model = Model(network, layout, mine, np.full_like(mine, np.nan), NumpyOps(), classes)
        rows = slice(None) if classes is None else slice(1, 2)
        apart, sums = np.full((5, part.size), np.nan), np.full((3, part.size), np.nan)
        weights = np.random.default_rng(1).standard_normal((3, 5))
        model.forward(x)
        model.backward(d[rows].copy(), (np.eye(5), apart))
        model.backward(d[rows].copy(), (weights, sums))
        assert np.isnan(model.g).all(), "the gradient of the minibatch is not asked for"
        assert np.linalg.norm(sums - weights @ apart) <= 1e-12 * np.linalg.norm(sums)
        for k in range(5):
            model.forward(np.ascontiguousarray(x[:, k : k + 1]))
            model.backward(np.ascontiguousarray(d[rows, k : k + 1]))
            assert np.linalg.norm(apart[k] - model.g) <= 1e-12 * np.linalg.norm(model.g)
            model.g.fill(np.nan)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_that_borrows_has_the_gradient_of_one_that_computes(name):
    """Also where its units do not lie side by side in the lender's."""
    network = make(name)
    layout, w, x, d = random_problem(network, batch=5)
    whole = make_model(network, layout, w)
    whole.forward(x)
    for classes in ((1,), (0, 2), tuple(range(network.classes))):
        part = layout.part(classes)
        mine = np.concatenate([w[a:b] for a, b in part.intervals])
        models = [
            Model(network, layout, mine, np.full_like(mine, np.nan), NumpyOps(), classes, lender=lender)
            for lender in (None, whole)
        ]
        models[0].forward(x)
        models[1].borrow()
        for model in models:
            model.backward(d[list(classes)].copy())
        assert np.array_equal(models[1].outputs[-1], whole.outputs[-1][list(classes)])
        assert np.linalg.norm(models[1].g - models[0].g) <= 1e-12 * np.linalg.norm(models[0].g)


def test_any_batch_size_uses_the_same_buffers():
    network = make("mean pooling")
    layout, w, x, d = random_problem(network, batch=9)
    model = make_model(network, layout, w)
    model.reserve(9)
    whole = model.forward(x).copy()
    held = model.activation_bytes + model.buffer_bytes
    for batch in (1, 4, 9):
        np.testing.assert_allclose(model.forward(np.ascontiguousarray(x[:, :batch])), whole[:, :batch], rtol=1e-12)
        model.backward(d[:, :batch].copy())
    assert model.activation_bytes + model.buffer_bytes == held


def test_max_pooling_sends_a_tie_to_the_first_entry():
    ops, x = NumpyOps(), np.ones((1, 2, 2, 1))
    y, dx = np.empty((1, 1, 1, 1)), np.empty_like(x)
    ops.max_pool(x, 2, y)
    ops.max_pool_back(x, y, np.full((1, 1, 1, 1), 5.0), 2, dx)
    assert dx.ravel().tolist() == [5, 0, 0, 0]


@pytest.mark.parametrize(("forward", "back"), [("im2col", "col2im"), ("fold", "unfold")])
def test_data_movements_have_their_adjoints(forward, back):
    ops, rng = NumpyOps(), np.random.default_rng(0)
    if forward == "im2col":
        x, y = rng.normal(size=(2, 9, 8, 3)), rng.normal(size=(2, 3, 3, 3, 3, 3))
        moved, returned = np.empty_like(y), np.zeros_like(x)
        NumpyOps().im2col(x, 2, 0, moved)
        NumpyOps().col2im(y, 2, 0, returned)
    else:
        x, y = rng.normal(size=(4, 2, 5, 5)), rng.normal(size=(4, 2, 6, 6))
        moved, returned = np.empty_like(y), np.empty_like(x)
        ops.fold(x, 2, moved)
        ops.unfold(y, 2, returned)
    assert np.isclose((moved * y).sum(), (x * returned).sum())


def test_sigmoid_and_loss_do_not_overflow_for_large_inputs():
    ops, y = NumpyOps(), np.array([-1e30, -1e3, 0, 1e3, 1e30], np.float32)
    ops.activate("sigmoid", y)
    assert y.tolist() == [0, 0, 0.5, 1, 1]


def test_initial_weights_depend_on_seed_and_place_alone():
    network = make_network("psnet", (1, 28, 28), 10)
    layout = network.layout()
    whole = np.empty(layout.size)
    initial_weights(network, layout, Runs(((0, layout.size),)), whole, seed=3)
    for runs in (layout.part([2, 7]), Runs(((1000, 1100), (20001, 30003)))):
        some = np.empty(runs.size)
        initial_weights(network, layout, runs, some, seed=3)
        assert np.array_equal(some, restrict(whole, runs))
    other = np.empty(layout.size)
    initial_weights(network, layout, Runs(((0, layout.size),)), other, seed=4)
    assert not np.array_equal(whole, other)


def test_initial_weights_fill_their_published_ranges():
    network = make_network("psnet", (1, 28, 28), 10)
    a = bounds(network, "xavier", 1.0)
    assert a["conv1.weight"] == pytest.approx(np.sqrt(6 / (25 + 1000)))
    assert a["conv2.weight"] == pytest.approx(np.sqrt(6 / (1000 + 750)))
    assert a["dense1.weight"] == pytest.approx(np.sqrt(6 / (48 + 24)))
    assert a["dense3.weight"] == pytest.approx(np.sqrt(6 / (15 + 1)))
    assert bounds(network, "he", 1.0)["dense1.weight"] == pytest.approx(np.sqrt(6 / 48))
    gained = bounds(network, "xavier", 4.0)
    assert gained["dense2.weight"] == 4 * a["dense2.weight"] and gained["dense3.weight"] == a["dense3.weight"]
    layout = network.layout()
    w = np.empty(layout.size)
    initial_weights(network, layout, Runs(((0, layout.size),)), w, seed=0)
    first = w[:1000]
    assert np.abs(first).max() <= a["conv1.weight"] and first.std() == pytest.approx(
        a["conv1.weight"] / np.sqrt(3), rel=0.1
    )
    assert (w[1000:1040] == 0).all(), "biases of the first convolution"


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([{"type": "dens", "units": 3}], "unknown layer type 'dens'"),
        ([{"type": "dense"}], "needs 'units'"),
        ([{"type": "dense", "units": 0}], "whole number above 0"),
        ([{"type": "dense", "units": 4, "color": 1}], "unknown setting\\(s\\) color"),
        ([{"type": "conv", "channels": 3, "kernel": 3}], "needs \\(channels, height, width\\)"),
        ([dense(5)], "has 4 classes"),
        ([separable(10, 3)], "cannot be cut into 3 groups"),
    ],
)
def test_a_wrong_layer_table_is_named(layers, says):
    with pytest.raises(UserError, match=says):
        build("net", (7,), layers, 4)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [("psnet", (1, 9, 9), "use --model mlp"), ("resnet", (1, 28, 28), "choose one of"), ("custom", (4,), "layers")],
)
def test_a_model_that_does_not_fit_says_what_to_use(name, shape, says):
    with pytest.raises(UserError, match=says):
        make_network(name, shape, 10)


def test_backward_through_some_steps_is_that_of_all():
    tanh = {"type": "tanh"}
    layers = [
        {"type": "conv", "channels": 4, "kernel": 3}, {"type": "max_pool"}, tanh, tanh, {"type": "max_pool"}, FLAT,
        dense(4),
    ]  # fmt: skip
    network = build("pools", (1, 14, 14), layers, 4)
    layout, w, x, d = random_problem(network)
    models = [make_model(network, layout, w) for _ in range(2)]
    for model in models:
        model.forward(x)
    models[0].backward(d.copy())
    first, last = models[1].steps, len(models[1].steps) - 1
    top = next(k for k, step in enumerate(first) if step.linear is not None and k > 0)
    below = np.full(models[1].outputs[top].shape, np.nan)
    models[1].backward_through(d.copy(), top, last, below)
    models[1].backward_through(below, 0, top - 1)
    np.testing.assert_array_equal(models[1].g, models[0].g)
