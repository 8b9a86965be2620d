"""Layers with private units of each class, by tiles of classes, against a pass of all classes at once."""

import tracemalloc

import numpy as np
import pytest
from helpers.layer_examples import NETWORKS, make
from helpers.tiled import BACKENDS, derive, make_ops

from psmpi.backend import CompiledOps, NumpyOps
from psmpi.layout import restrict
from psmpi.nn import tail
from psmpi.nn.cut import has_head, tail_of
from psmpi.nn.finite import _first_of_tiles, find_cause
from psmpi.nn.losses import LOSSES, make_loss
from psmpi.nn.metric import Metric
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.private_layers import PrivateLayers, tile_of
from psmpi.nn.tiles import TiledObjective, is_tiled, make_tail
from psmpi.nn.zoo import make_network

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
FLAT, TANH = {"type": "flatten"}, {"type": "tanh"}
OWN = {
    "psnet": make_network("psnet", (1, 8, 8), 5),
    "large psnet": make_network("psnet", (1, 28, 28), 3),
    "normalized psnet": make_network("psnet", (1, 8, 8), 5, batch_norm=True),
    "padded": build(
        "padded", (2, 5, 5),
        [{"type": "conv", "channels": 3, "kernel": 3, "pad": 1}, TANH,
         {"type": "conv", "channels": 8, "kernel": 3, "pad": 1}, {"type": "max_pool"}, TANH,
         {"type": "separable_conv", "channels": 4, "kernel": 3, "groups": 4, "pad": 1}, FLAT,
         {"type": "separable_dense", "units": 4, "groups": 4}],
        4,
    ),
    "blocks": build(
        "blocks", (6,),
        [{"type": "dense", "units": 7}, TANH, {"type": "dense", "units": 8},
         {"type": "residual", "layers": [{"type": "separable_dense", "units": 8, "groups": 4}, TANH]},
         {"type": "separable_dense", "units": 4, "groups": 4, "bias": False}],
        4,
    ),
    "one layer": build("one layer", (6,), [TANH, {"type": "dense", "units": 4}, {"type": "relu"}], 4),
}  # fmt: skip
PRIVATE = {**{name: make(name) for name in NETWORKS}, **OWN}
PRIVATE = {name: one for name, one in PRIVATE.items() if tail_of(one) is not None and not has_head(one)}


def problem(network, dtype, batch=9, size=0.5, seed=0):
    rng = np.random.default_rng(seed)
    w = (size * rng.normal(size=network.layout().size)).astype(dtype)
    x = rng.normal(size=(int(np.prod(network.in_shape)), batch)).astype(dtype)
    return w, x, rng.integers(0, network.classes, batch)


@pytest.fixture
def tile(monkeypatch):
    """tile(n) sets the size of tiles to n classes."""
    return lambda n: monkeypatch.setattr(tail, "tile_size", lambda numbers: n)


def test_networks_with_private_layers_have_a_tail():
    """A tail begins at outputs that all classes see, and from there no two classes share a unit."""
    tails = {
        "psnet": (make_network("psnet", (1, 28, 28), 10), (3, 12)),
        "psnet, normalized": (make_network("psnet", (3, 32, 32), 10, batch_norm=True), (4, 17)),
        "head": (make_network("head", (20,), 10), (4, 5)),
        "mlp": (make_network("mlp", (20,), 10), (4, 5)),
        "padded": (OWN["padded"], (3, 11)),
        "inputs of each class": (make("separable dense, ignored inputs"), None),
        "units of two classes": (make("groups of two kinds"), (4, 5)),
        "of some": (make("blocks cut by later blocks"), None),
    }
    for name, (network, expected) in tails.items():
        assert tail_of(network) == expected, name
    assert set(OWN) < set(PRIVATE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 3, 20])
@pytest.mark.parametrize("name", PRIVATE)
def test_all_layers_go_by_tiles(name, size, backend, tile):
    tile(size)
    network = PRIVATE[name]
    w, x, labels = problem(network, F64)
    for kind in ("psl", "nll", "bce"):
        loss = lambda kind=kind: make_loss(kind, F64, outputs=network.classes)  # noqa: E731
        value, g, _ = derive(network, w, x, labels, loss(), NumpyOps(), tiled=False)
        tiled_value, tiled_g, _ = derive(network, w, x, labels, loss(), make_ops(backend), tiled=True)
        assert tiled_value == pytest.approx(value, rel=1e-11)
        assert abs(tiled_g - g).max() <= 1e-10 * abs(g).max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-11), (F32, 5e-5)])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_goes_by_tiles(name, dtype, tolerance, backend, tile):
    """With few samples the labels are in few of the tiles."""
    network = make_network("psnet", (1, 8, 8), 23)
    for size, batch in ((4, 33), (7, 3)):
        tile(size)
        w, x, labels = problem(network, dtype, batch)
        loss = lambda: make_loss(name, dtype, outputs=23)  # noqa: E731
        value, g, _ = derive(network, w, x, labels, loss(), NumpyOps(), tiled=False)
        tiled_value, tiled_g, _ = derive(network, w, x, labels, loss(), make_ops(backend), tiled=True)
        assert tiled_value == pytest.approx(value, rel=tolerance)
        assert abs(tiled_g - g).max() <= tolerance * abs(g).max()


def widened(network, w, spread):
    """The weights with those of the last layer `spread` times as large."""
    wide_w = w.copy()
    for first, stop in network.runs(network.layout(), len(network.layers) - 1, len(network.layers)).intervals:
        wide_w[first:stop] *= spread
    return wide_w


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("spread", "clips"), [(10, False), (25, False), (1000, True)])
def test_large_derivatives_of_psl_are_scaled_down(spread, clips, backend, tile):
    """Terms beyond float32 go on as tangents, and a second pass at the same weights gives the same gradient."""
    tile(4)
    network = make_network("psnet", (1, 8, 8), 10)
    w, x, labels = problem(network, F32)
    w, full_loss, loss = widened(network, w, spread), make_loss("psl", F32), make_loss("psl", F32)
    value, g, _ = derive(network, w, x, labels, full_loss, NumpyOps(), tiled=False)
    tiled_g = np.empty_like(w)
    model = Model(network, network.layout(), w, tiled_g, make_ops(backend), tiled=True)
    objective = TiledObjective(loss, model)
    objective.reserve(10, len(labels))
    tape = model.forward(x)
    objective.losses(tape.scores.reshape(-1, len(labels)), labels, 0.125)
    objective.backward(tape)
    assert objective.value() == pytest.approx(value, rel=1e-3) and loss.clipped == full_loss.clipped
    assert (loss.clipped > 0) == clips and abs(tiled_g - g).max() <= 1e-3 * abs(g).max()
    first_g, clipped = tiled_g.copy(), loss.clipped
    tiled_g.fill(np.nan)
    objective.again(tape)
    assert np.allclose(tiled_g, first_g, rtol=1e-5, atol=1e-6 * abs(first_g).max()) and loss.clipped == clipped


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_no_number_is_found_in_its_class(name, lenient, backend, tile):
    """One class has weights so large that its scores alone are infinite or NaN."""
    tile(4)
    network = make_network("psnet", (1, 8, 8), 10)
    w, x, labels = problem(network, F32)
    layout = network.layout()
    last = len(network.layers) - 1
    for first, stop in (layout.part((6,)) & network.runs(layout, last, last + 1)).intervals:
        w[first:stop] = 3e38
    loss = make_loss(name, F32, outputs=10)
    loss.lenient = lenient
    model = Model(network, layout, w, np.empty_like(w), make_ops(backend), tiled=True)
    objective = TiledObjective(loss, model)
    objective.reserve(10, len(labels))
    with np.errstate(invalid="ignore", over="ignore"):
        tape = model.forward(x)
        value = np.nan
        if lenient:
            objective.losses(tape.scores.reshape(-1, len(labels)), labels, 0.125)
            value = objective.value()
        else:
            with pytest.raises(FloatingPointError):
                objective.losses(tape.scores.reshape(-1, len(labels)), labels, 0.125)
        cause = find_cause(model, objective.tail)
    assert not np.isfinite(value) and not objective.finite
    assert cause.kind == "layer" and cause.text.startswith("layer dense2 (class 6) is the first to put out inf")


def test_what_is_no_number_in_several_tiles_is_told_at_once(tile):
    """The first layer that fails in any tile is named with all of its classes; another class fails in a later layer."""
    tile(4)
    tables = [{"type": "dense", "units": 20}, {"type": "relu"}, {"type": "separable_dense", "units": 10, "groups": 10}]
    network = build("wide", (6,), [{"type": "dense", "units": 6}, TANH, *tables], 10)
    w, x, labels = problem(network, F32)
    layout = network.layout()
    last = len(network.layers) - 1
    for c, first in ((1, last), (5, last - 2), (8, last - 2)):
        for start, stop in (layout.part((c,)) & network.runs(layout, first, first + 1)).intervals:
            w[start:stop] = np.inf
    model = Model(network, layout, w, np.empty_like(w), NumpyOps(), tiled=True)
    objective = TiledObjective(make_loss("nll", F32, outputs=10), model)
    objective.reserve(10, len(labels))
    tape = model.forward(x)
    with np.errstate(invalid="ignore", over="ignore"), pytest.raises(FloatingPointError):
        objective.losses(tape.scores.reshape(-1, len(labels)), labels, 0.125)
    # find_cause would name the weights; _first_of_tiles does not look at them.
    features = tape.scores.reshape(-1, len(labels))
    with np.errstate(invalid="ignore", over="ignore"):
        cause = _first_of_tiles(model, objective.tail, features)
    assert cause.text.startswith("layer dense2 (classes 5 8) is the first to put out NaN")
    assert " in 4 of 20 units, 9 of 9 samples" in cause.text and cause.columns == tuple(range(9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_tests_count_as_with_all_classes_at_once(name, backend, tile):
    """Several classes have the same weights, and so equal scores."""
    tile(5)
    network = make_network("psnet", (1, 8, 8), 13)
    w, x, labels = problem(network, F32, 40)
    layout, own = network.layout(), []
    for c in range(13):
        ((first, stop),) = (layout.part((c,)) & network.runs(layout, 2, len(network.layers))).intervals
        own.append(w[first:stop])
    for c in range(4, 13):
        own[c][...] = own[c % 4]
    all_scores = Model(network, layout, w, None, make_ops(backend)).forward(x).scores
    metric = lambda: Metric(make_loss(name, F32, outputs=13), 13)  # noqa: E731
    expected = metric().sums(all_scores, labels)
    model = Model(network, layout, w, None, make_ops(backend), tiled=True)
    features = model.forward(x).scores.reshape(-1, 40)
    tiled_sums = metric().sums_by_tiles(make_tail(model), features, labels, np.arange(13))
    assert tiled_sums[0] == pytest.approx(expected[0], rel=1e-5) and 0 < tiled_sums[1] < tiled_sums[2]
    if backend != "numpy":
        assert np.array_equal(tiled_sums[1:], expected[1:])
        return
    # A BLAS may give classes with the same weights other bits, by their places in a product: ties may fall either way.
    own_scores = all_scores[labels, np.arange(40)]
    above, near_or_above = (np.count_nonzero(all_scores > own_scores + shift, axis=0) for shift in (1e-4, -1e-4))
    for count, top in zip(tiled_sums[1:], (1, 5), strict=False):
        assert np.count_nonzero(near_or_above - 1 < top) <= count <= np.count_nonzero(above < top)
    assert tiled_sums[3] == 40


@pytest.mark.parametrize("name", ["psl", "nll", "bce"])
def test_memory_beside_weights_and_gradients_does_not_grow_with_classes(name):
    """A step allocates no more than results of a few samples."""
    peaks = []
    for classes in (256, 1024):
        network = make_network("psnet", (1, 8, 8), classes)
        w, x, labels = problem(network, F32, 64)
        model = Model(network, network.layout(), w, np.zeros_like(w), CompiledOps(), tiled=True)
        assert isinstance(make_tail(model), PrivateLayers)
        tracemalloc.start()
        try:
            objective = TiledObjective(make_loss(name, F32, outputs=classes), model)
            objective.reserve(classes, 64)
            for step in range(2):
                tape = model.forward(x)
                objective.losses(tape.scores.reshape(-1, 64), labels, 1 / 64)
                objective.backward(tape)
                if step == 0:
                    tracemalloc.reset_peak()
                    before = tracemalloc.get_traced_memory()[0]
            peaks.append(tracemalloc.get_traced_memory()[1])
            assert peaks[-1] - before < 2e5
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 0.2 * 1024 * 138 * 64 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_of_the_classes_go_by_tiles(backend, tile):
    """The classes are those of a rank or of a part of a network, adjacent or not."""
    tile(2)
    network = make_network("psnet", (1, 8, 8), 12, batch_norm=True)
    w, x, labels = problem(network, F64)
    layout = network.layout()
    for classes in ((1, 2, 3, 4, 5), (0, 2, 3, 7, 11)):
        own = restrict(w, layout.part(classes))
        expected = Model(network, layout, own, None, make_ops(backend), classes).forward(x).scores
        model = Model(network, layout, own, None, make_ops(backend), classes, tiled=True)
        features = model.forward(x).scores.reshape(-1, len(labels))
        tiled_scores = np.concatenate([scores.copy() for _, scores in make_tail(model).tiles(features)])
        assert np.allclose(tiled_scores, expected, rtol=1e-12, atol=1e-14)


def test_tiles_are_taken_where_all_classes_at_once_do_not_fit_the_caches():
    ops, large = NumpyOps(), make_network("psnet", (1, 28, 28), 1200)
    assert is_tiled(large, 1200, 100, ops, "classes") and not is_tiled(large, 1200, 100, ops, "regression")
    assert not is_tiled(large, 300, 100, ops, "classes") and is_tiled(large, 600, 250, ops, "classes")
    assert not is_tiled(make_network("psnet", (1, 28, 28), 10), 10, 10_000, ops, "classes")
    assert tile_of(1000, 8800) == 83 and tile_of(10, 8800) == 10
