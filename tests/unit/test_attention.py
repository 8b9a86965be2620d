"""Layers of transformers: attention, layer normalization dealt out over ranks, GELU, and position vectors."""

from dataclasses import replace
from math import erf, exp, pi, sqrt
from threading import Thread

import numpy as np
import pytest
from helpers.layer_examples import attention, dense
from helpers.problems import make_model, random_problem
from helpers.together import Together

from psmpi.backend import CompiledOps, NumpyOps, compiled
from psmpi.backend.compiled import attention as in_c
from psmpi.errors import UserError
from psmpi.nn.layers import LAYERS
from psmpi.nn.layers.workspace import Workspace
from psmpi.nn.model import Model
from psmpi.nn.network import Network, build

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
BACKENDS = [NumpyOps(), *(CompiledOps(level) for level in range(1, compiled.level() + 1))]
backends = pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: ops.description)


def both(ops, x, heads, causal, lengths, dy):
    y, dx = np.full_like(dy, np.nan), np.full_like(x, np.nan)
    space = Workspace(ops, x.dtype)
    ops.attention(x, heads, causal, lengths, y, space.take)
    ops.attention_back(x, heads, causal, lengths, dy, dx, space.take)
    return y, dx


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, size, steps, batch", [(1, 1, 1, 1), (2, 5, 7, 3), (3, 8, 41, 33), (2, 4, 17, 16)])
@pytest.mark.parametrize("ops", BACKENDS[1:], ids=lambda ops: ops.description)
def test_attention_in_c_is_that_of_the_reference(ops, heads, size, steps, batch, causal, ends, dtype):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((k * heads * size, steps, batch)).astype(dtype) for k in (3, 1))
    lengths = rng.integers(1, steps + 1, batch).astype(np.int32) if ends else None
    expected = both(NumpyOps(), x, heads, causal, lengths, dy)
    for actual, reference in zip(both(ops, x, heads, causal, lengths, dy), expected, strict=True):
        assert abs(actual - reference).max() <= {F32: 3e-6, F64: 1e-14}[dtype] * abs(reference).max()


@pytest.mark.parametrize("chunk", [1, 500])
def test_some_samples_after_the_other_are_as_good_as_all(chunk):
    rng, ops = np.random.default_rng(0), NumpyOps()
    x, dy, lengths = rng.standard_normal((12, 6, 9)), rng.standard_normal((4, 6, 9)), np.arange(1, 10, dtype=np.int32)
    lengths[5:] = 6
    expected = both(ops, x, 2, False, lengths, dy)
    ops.chunk = chunk
    for actual, reference in zip(both(ops, x, 2, False, lengths, dy), expected, strict=True):
        np.testing.assert_allclose(actual, reference, rtol=1e-13, atol=1e-14)


@pytest.mark.skipif(not compiled.level(), reason="no compiled kernels, or none for this processor")
def test_threads_compute_the_same_bits(monkeypatch):
    monkeypatch.setattr(in_c, "WORK", 1)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((36, 9, 20)), rng.standard_normal((12, 9, 20))
    serial = both(CompiledOps(), x, 3, True, None, dy)
    for threads in (2, 5, 64):
        for actual, expected in zip(both(CompiledOps(threads=threads), x, 3, True, None, dy), serial, strict=True):
            assert np.array_equal(actual, expected)


@backends
def test_large_products_are_no_infinities(ops):
    x = np.full((3, 4, 2), 1e4, np.float32)
    x[2] = np.arange(8).reshape(4, 2)
    y, dx = both(ops, x, 1, True, None, np.ones((1, 4, 2), np.float32))
    np.testing.assert_allclose(y[0], np.cumsum(x[2], axis=0) / np.arange(1, 5)[:, None], rtol=1e-6)
    assert np.isfinite(dx).all()


@backends
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_gelu_is_that_of_the_error_function(ops, dtype):
    """The error stays within a few units in the last place, to the ends of the range."""
    x = np.concatenate([np.linspace(-9, 9, 3001), np.linspace(-1e-3, 1e-3, 20), [30, -30, 1e30, -1e3]]).astype(dtype)
    wide = x.astype(np.float64)
    phi = np.array([(1 + erf(v / sqrt(2))) / 2 for v in wide])
    y, slope = np.full_like(x, np.nan), np.ones_like(x)
    ops.gelu(x, y)
    ops.gelu_back(x, slope)
    eps = np.finfo(dtype).eps
    assert (abs(y - wide * phi) <= 4 * eps * np.maximum(1, abs(y))).all()
    expected = phi + wide * np.array([exp(-min(v * v, 1e3) / 2) / sqrt(2 * pi) for v in wide])
    assert (abs(slope - expected) <= 6 * eps).all()
    bad = np.array([np.nan], dtype)
    ops.gelu(bad, out := np.zeros(1, dtype))
    assert np.isnan(out).all()
    far = np.array([-1e30, -50, 50, 1e30], dtype)
    ops.gelu(far, out := np.zeros(4, dtype))
    ops.gelu_back(far, slopes := np.ones(4, dtype))
    np.testing.assert_allclose(out, np.maximum(far, 0), atol=1e-30)
    np.testing.assert_allclose(slopes, far > 0, atol=1e-30)


@backends
@pytest.mark.parametrize("n, m", [(1, 1), (3, 17), (70, 150), (300, 7)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_columns_are_normalized_by_their_moments(ops, n, m, dtype):
    rng = np.random.default_rng(0)
    x, gamma, beta = (100 + rng.standard_normal((n, m))).astype(dtype), *rng.standard_normal((2, n)).astype(dtype)
    normal, scale, y, wide = np.empty_like(x), np.empty(m, dtype), np.empty_like(x), x.astype(np.longdouble)
    ops.layer_norm(x, 1e-5, gamma, beta, normal, scale, y)
    exact = (wide - wide.mean(axis=0)) / np.sqrt(wide.var(axis=0) + 1e-5)
    eps = np.finfo(dtype).eps
    # The mean is 100 standard deviations from zero, and its last digits are rounded.
    assert abs(normal - exact).max() <= 4 * eps * 100
    assert abs(y - (gamma[:, None] * exact + beta[:, None])).max() <= 20 * eps * 100
    dy = rng.standard_normal((n, m)).astype(dtype)
    d, sums, n_, wide = gamma[:, None] * dy.astype(np.longdouble), np.empty((2, n), dtype), normal, dy.copy()
    exact = scale * (d - d.mean(axis=0) - n_ * (d * n_).mean(axis=0))
    ops.layer_norm_back(normal, scale, gamma, dy, *sums)
    # A column of one value has no variance, and the factor is 316.
    assert abs(dy - exact).max() <= 20 * eps * max(1, scale.max())
    np.testing.assert_allclose(sums, [(wide * n_).sum(axis=1), wide.sum(axis=1)], rtol=0, atol=eps * 2 * m)


@pytest.mark.parametrize("shape", [(7,), (7, 4)])
def test_a_layer_normalization_may_be_cut_by_units(shape):
    """Ranks with some units each add up two sums a pass, and each unit equals that of the full layer."""
    (layer,) = LAYERS["layer_norm"].read(None, "layer_norm1", shape)
    full_network, cuts, together = Network("net", shape, (layer,)), [slice(0, 2), slice(2, 7)], Together(2)
    layout, w, x, _ = random_problem(full_network, batch=5)
    rng = np.random.default_rng(1)
    dy = rng.standard_normal((*shape, 5))
    model, dx = make_model(full_network, layout, w), np.empty((*shape, 5))
    expected = model.forward(x).scores.copy()
    model.backward(model.forward(x), dy.copy(), dx=dx)
    results = [None, None]

    def work(k):
        own = (cuts[k].stop - cuts[k].start, *shape[1:])
        network = Network("net", own, (layer.restrict(own[0], own),))
        values = np.ascontiguousarray(x.reshape(*shape, 5)[cuts[k]])
        gains = np.ascontiguousarray(w.reshape(2, -1)[:, cuts[k]]).reshape(-1)
        part_model = Model(network, network.layout(), gains, np.empty_like(gains), NumpyOps(), across=together.total(k))
        into = np.empty(values.shape)
        tape = part_model.forward(values.reshape(-1, 5))
        results[k] = [tape.scores.copy()]
        part_model.backward(tape, dy[cuts[k]].copy(), dx=into)
        results[k] += [into, part_model.g.reshape(2, -1).T]

    threads = [Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for k, values in enumerate((expected, dx, model.g.reshape(2, -1).T)):
        np.testing.assert_allclose(np.concatenate([results[0][k], results[1][k]]), values, rtol=1e-12, atol=1e-12)
    steps = 5 * int(np.prod(shape[1:]))
    assert together.numbers == [4 * steps] * 2
    cut = replace(full_network, in_shape=(2, *shape[1:]), layers=(layer.restrict(2, (2, *shape[1:])),))
    with pytest.raises(ValueError, match="2 of 7 units, but its site has no sums"):
        make_model(cut, cut.layout(), w[:4])


def test_heads_are_cut_whole_and_other_units_anywhere():
    layers = [dense(6), *attention(6, 3), {"type": "positions"}, {"type": "gelu"}, dense(2)]
    _, _, heads, positions, gelu, _ = build("net", (3, 5), layers, 2, True).layers
    two = heads.restrict(4, (12, 5))
    assert (two.heads, two.size, two.in_shape, two.out_shape) == (2, 2, (12, 5), (4, 5))
    for units, inputs in ((3, 9), (4, 11), (1, 3)):
        with pytest.raises(UserError, match="heads of 2 and can only be dealt out in whole heads"):
            heads.restrict(units, (inputs, 5))
    assert positions.restrict(2, (2, 5)).parameters()[0].shape == (2, 5)
    assert gelu.restrict(2, (2, 5)).out_shape == (2, 5)


def test_vectors_of_steps_are_for_as_many_steps_as_they_know():
    network = build("net", (3, 5), [dense(4), {"type": "positions", "longest": 6}, dense(2)], 2, True)
    shorter = network.with_steps(3)
    assert shorter.layout() == network.layout() and shorter.in_shape == (3, 3)
    layout, w, x, _ = random_problem(network)
    model, short_model = make_model(network, layout, w), make_model(shorter, layout, w)
    first_steps = np.ascontiguousarray(x.reshape(3, 5, 3)[:, :3])
    np.testing.assert_array_equal(short_model.forward(first_steps).scores, model.forward(x).scores[:, :3])
    with pytest.raises(UserError, match="positions for 6 steps, but the sequences have 7: train it with longest = 7"):
        network.with_steps(7)


@pytest.mark.parametrize(
    "shape, table, said",
    [
        ((3, 5), {"type": "positions", "longest": 4}, "longest = 4, but the sequences have 5 steps: use longest = 5"),
        ((3,), {"type": "positions"}, "positions needs a sequence"),
        ((12, 5), {"type": "attention"}, "needs 'heads'"),
        ((12, 5), {"type": "attention", "heads": 3}, "12 inputs are not queries, keys and values of 3 heads"),
        ((12, 5), {"type": "attention", "heads": 3}, "let the layer before have 9 units"),
        ((12, 5), {"type": "attention", "heads": 2, "causal": 1}, "causal = 1; expected true or false"),
        ((12,), {"type": "attention", "heads": 2}, "attention needs a sequence"),
        ((2, 4, 4), {"type": "layer_norm"}, 'for images use type = "group_norm", groups = 1'),
        ((4, 5), {"type": "group_norm", "groups": 2}, "use layer_norm, which normalizes each step"),
    ],
)
def test_what_a_layer_cannot_take_is_said(shape, table, said):
    with pytest.raises(UserError) as error:
        build("net", shape, [table, dense(2)], 2)
    assert said in str(error.value)
