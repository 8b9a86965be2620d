"""The compiled kernels against the NumPy reference, for both types and all instruction sets of this processor."""

import threading

import numpy as np
import pytest
from helpers.layer_examples import INDEPENDENT, NETWORKS, make

from psmpi.backend import CompiledOps, NumpyOps, Stripes, compiled, make_backend
from psmpi.backend.compiled import convolution, library
from psmpi.backend.compiled.team import Team
from psmpi.backend.reference import Im2col
from psmpi.errors import UserError
from psmpi.nn.layers import SampleSums
from psmpi.nn.model import Model
from psmpi.optim import Hyper, make_optimizer
from psmpi.optim.curvature import curvature_ops

LEVELS = range(1, compiled.level() + 1)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
OPS = NumpyOps()
TOLERANCE = {F32: 1e-5, F64: 1e-10}

pytestmark = pytest.mark.skipif(not compiled.level(), reason="no compiled kernels, or none for this processor")

# Stripes, channels, height and width, units, kernel, stride.
SHAPES = {
    "one group": ([Stripes(1, 7, 5, 0, 0, 0)], 5, (9, 8), 7, 3, 2),
    "one channel, many units": ([Stripes(1, 40, 1, 0, 0, 0)], 1, (28, 28), 40, 6, 2),
    "groups": ([Stripes(4, 3, 2, 0, 2, 0)], 8, (7, 7), 12, 2, 1),
    "groups of more than a block": ([Stripes(2, 23, 13, 0, 13, 0)], 26, (6, 5), 46, 3, 1),
    "rows and columns that no output sees": ([Stripes(1, 2, 3, 0, 0, 0)], 3, (10, 11), 2, 4, 3),
    "a kernel as large as the image": ([Stripes(1, 5, 2, 0, 0, 0)], 2, (4, 4), 5, 4, 1),
    "pointwise": ([Stripes(10, 24, 48, 0, 48, 0)], 480, (1, 1), 240, 1, 1),
    "segments": ([Stripes(1, 2, 3, 0, 0, 0), Stripes(3, 1, 2, 3, 2, 2)], 9, (5, 5), 5, 2, 1),
    "shared channels": ([Stripes(1, 2, 4, 0, 0, 0), Stripes(1, 3, 3, 2, 0, 2)], 5, (5, 5), 5, 2, 1),
    "unseen channels": ([Stripes(2, 2, 2, 1, 3, 0)], 7, (5, 5), 4, 2, 1),
    "stride larger than the kernel": ([Stripes(1, 3, 2, 0, 0, 0)], 2, (9, 9), 3, 2, 3),
}


def relative_error(actual, expected):
    return abs(actual - expected).max(initial=0.0) / max(1e-30, abs(expected).max(initial=0.0))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 3, 7, 16, 20, 33, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_convolutions_are_those_of_the_reference(name, batch, level, dtype):
    stripes, channels, (height, width), units, k, stride = SHAPES[name]
    rows, columns = (height - k) // stride + 1, (width - k) // stride + 1
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    n_in = max(s.n_in for s in stripes)
    x, dy, bias = normal(channels, height, width, batch), normal(units, rows, columns, batch), normal(units)
    if any(s.n_in != n_in for s in stripes):
        # Kernels of different depths do not form one array, so each segment is checked alone.
        for s in stripes:
            only = [Stripes(s.count, s.n, s.n_in, s.source, s.source_step, 0)]
            check(
                only,
                x,
                dy[s.out :][: s.count * s.n],
                bias[: s.count * s.n],
                normal(s.count * s.n, s.n_in, k, k),
                stride,
                level,
            )
        return
    check(stripes, x, dy, bias, normal(units, n_in, k, k), stride, level)


def check(stripes, x, dy, bias, kernels, stride, level):
    dtype, shapes, k, batch = x.dtype, (x.shape[:3], dy.shape[:3]), kernels.shape[2], x.shape[-1]
    y, dkernels, dx = np.empty_like(dy), np.empty_like(kernels), np.zeros_like(x)
    # Each stripe alone, on the channels that it sees: nothing overlaps, nothing is unseen.
    for s in stripes:
        for j in range(s.count):
            source, out = s.source + j * s.source_step, s.out + j * s.n
            channels, units = slice(source, source + s.n_in), slice(out, out + s.n)
            shape = ((s.n_in, *shapes[0][1:]), (s.n, *shapes[1][1:]))
            single = Im2col([Stripes(1, s.n, s.n_in, 0, 0, 0)], *shape, k, stride, dtype, ops=OPS)
            single.reserve(batch)
            into = np.empty((s.n_in, *x.shape[1:]), dtype)
            single.forward(x[channels], kernels[units], bias[units], y[units])
            single.backward(x[channels], dy[units], kernels[units], dkernels[units], into)
            dx[channels] += into
    reference = Im2col(stripes, *shapes, k, stride, dtype, ops=OPS)
    reference.reserve(batch)
    # Buffers may start with any values.
    reference.dcols.fill(np.nan)
    plan = CompiledOps(level).convolution(stripes, *shapes, k, stride, dtype)
    for implementation in (reference, plan):
        results = [np.full_like(a, np.nan) for a in (y, dkernels, dx)]
        implementation.forward(x, kernels, bias, results[0])
        implementation.backward(x, dy, kernels, results[1], results[2])
        for actual, expected in zip(results, (y, dkernels, dx), strict=True):
            assert relative_error(actual, expected) <= TOLERANCE[dtype]
    again = np.full_like(dkernels, np.nan)
    plan.backward(x, dy, kernels, again, None)
    assert np.array_equal(again, results[1])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("shape", "size"), [((3, 8, 6, 20), 2), ((2, 7, 9, 5), 2), ((1, 9, 10, 33), 3), ((4, 5, 5, 1), 5)]
)
def test_max_pooling_is_that_of_the_reference(shape, size, level, dtype):
    rng, outputs = np.random.default_rng(0), []
    # Whole numbers, so that windows have ties.
    x = rng.integers(-2, 3, shape).astype(dtype)
    dy = rng.standard_normal((shape[0], shape[1] // size, shape[2] // size, shape[3])).astype(dtype)
    for ops in (NumpyOps(), CompiledOps(level)):
        y, dx = np.empty_like(dy), np.full_like(x, np.nan)
        ops.max_pool(x, size, y)
        outputs.append((y.copy(), dx))
        ops.max_pool_back(x, y, dy, size, dx)
    assert all(np.array_equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 17])
@pytest.mark.parametrize("name", NETWORKS)
def test_models_give_the_scores_and_gradients_of_the_reference(name, batch, level, dtype):
    network = make(name)
    layout = network.layout()
    rng = np.random.default_rng(0)
    w = rng.standard_normal(layout.size).astype(dtype)
    x = rng.random((int(np.prod(network.in_shape)), batch)).astype(dtype)
    for classes in (tuple(range(network.classes)), (1,), (0, 2)):
        part = layout.part(classes)
        part_weights = np.concatenate([w[a:b] for a, b in part.intervals])
        results = []
        for ops in (NumpyOps(), CompiledOps(level)):
            model = Model(network, layout, part_weights, np.full_like(part_weights, np.nan), ops, classes)
            tape = model.forward(x)
            scores = tape.scores.copy()
            model.backward(tape, np.cos(np.arange(scores.size)).reshape(scores.shape).astype(dtype))
            results.append((scores, model.g))
        for actual, expected in zip(results[1], results[0], strict=True):
            assert relative_error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", INDEPENDENT)
def test_gradients_of_samples_are_those_of_the_reference(name, level, dtype):
    network = make(name)
    layout = network.layout()
    rng = np.random.default_rng(0)
    w = rng.standard_normal(layout.size).astype(dtype)
    x = rng.random((int(np.prod(network.in_shape)), 19)).astype(dtype)
    for classes in (tuple(range(network.classes)), (1,)):
        part = layout.part(classes)
        part_weights = np.concatenate([w[a:b] for a, b in part.intervals])
        results = []
        for ops in (NumpyOps(), CompiledOps(level)):
            model = Model(network, layout, part_weights, np.full_like(part_weights, np.nan), ops, classes)
            sums = np.full((19, part.size), np.nan, dtype)
            tape = model.forward(x)
            scores = tape.scores
            dscores = np.cos(np.arange(scores.size)).reshape(scores.shape).astype(dtype)
            model.backward(tape, dscores, sums=SampleSums(np.eye(19, dtype=dtype), sums))
            results.append(sums)
        assert relative_error(results[1], results[0]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 20, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_threads_compute_the_same_bits(name, batch, level, dtype, monkeypatch):
    """This holds also where a call uses fewer threads than there are."""
    stripes, channels, (height, width), units, k, stride = SHAPES[name]
    if len({s.n_in for s in stripes}) > 1:
        stripes, units = stripes[:1], stripes[0].n
    rows, columns = (height - k) // stride + 1, (width - k) // stride + 1
    rng, results = np.random.default_rng(0), []
    shapes = (channels, height, width), (units, rows, columns)
    x, dy = (rng.standard_normal((*shape, batch)).astype(dtype) for shape in shapes)
    kernels = rng.standard_normal((units, stripes[0].n_in, k, k)).astype(dtype)
    for threads, members in ((1, 1), (2, 2), (3, 3), (8, 8), (8, 1), (8, 3), (5, 4)):
        plan = CompiledOps(level, threads).convolution(stripes, *shapes, k, stride, dtype)
        monkeypatch.setattr(convolution, "WORK", max(1, plan.work * batch // members))
        assert plan._members(batch) >= members or plan.work * batch < members
        arrays = [np.full_like(a, np.nan) for a in (dy, kernels, x)]
        plan.forward(x, kernels, kernels[:, 0, 0, 0].copy(), arrays[0])
        plan.backward(x, dy, kernels, arrays[1], arrays[2])
        arrays.append(np.full((*kernels.shape, batch), np.nan, dtype))
        arrays.append(np.full((units, batch), np.nan, dtype))
        plan.samples(x, dy, *arrays[3:])
        assert relative_error(arrays[3].sum(axis=-1), arrays[1]) <= TOLERANCE[dtype]
        assert relative_error(arrays[4], dy.sum(axis=(1, 2))) <= TOLERANCE[dtype]
        results.append(arrays)
    for arrays in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(arrays, results[0], strict=True))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [2, 10, 14])
def test_element_products_are_those_of_the_reference(rows, level, dtype):
    """The elements have several sizes, one is empty, and their runs overlap in the vector."""
    runs = [[(0, 5), (30, 71)], [(3, 90)], [], [(0, 5), (50, 50), (60, 61)], [(0, 1500)]]
    rng, results = np.random.default_rng(0), []
    p = rng.standard_normal(1500).astype(dtype)
    count, size = len(runs), 1500
    pairs = rng.standard_normal((count, rows, size)).astype(dtype)
    middle, sigma = rng.standard_normal((count, rows, rows)), rng.random(count)
    for ops in (NumpyOps(), CompiledOps(level)):
        curvature = curvature_ops(ops)
        elements = curvature.restriction(runs, size)
        v, out = np.zeros((count, size), dtype), np.zeros((count, size), dtype)
        elements.restrict(p, v)
        for e, element_runs in enumerate(runs):
            pairs[e, :, elements.sizes[e] :] = 0
            assert np.array_equal(
                v[e, : elements.sizes[e]], np.concatenate([p[a:b] for a, b in [(0, 0), *element_runs]])
            )
        total, q = np.full_like(p, np.nan), np.full_like(p, np.nan)
        elements.accumulate(v, total)
        coefficients = np.full((count, rows), np.nan)
        curvature.products(pairs, middle, sigma, coefficients, v, out)
        curvature.restricted_products(elements, pairs, middle, sigma, np.empty_like(coefficients), p, q)
        results.append((v, total, coefficients, out, q))
        assert relative_error(curvature.row_dots(v, out), (v.astype(np.float64) * out).sum(axis=1)) <= TOLERANCE[dtype]
        again = np.empty_like(p)
        elements.accumulate(out, again)
        assert relative_error(again, q) <= TOLERANCE[dtype]
    assert elements.sizes.tolist() == [46, 87, 0, 6, 1500]
    for actual, expected in zip(results[1], results[0], strict=True):
        assert relative_error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_match_central_differences(level):
    network = make("separable convolution")
    layout = network.layout()
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal(layout.size), rng.random((int(np.prod(network.in_shape)), 5))
    d = rng.standard_normal((network.classes, 5))
    model = Model(network, layout, w, np.empty_like(w), CompiledOps(level))
    model.backward(model.forward(x), d.copy())
    g = model.g.copy()
    for k in rng.choice(layout.size, 12, replace=False):
        values = []
        for h in (1e-5, -1e-5):
            w[k] += h
            values.append(float((model.forward(x).scores * d).sum()))
            w[k] -= h
        assert abs((values[0] - values[1]) / 2e-5 - g[k]) <= 1e-9 * max(1, abs(g).max())


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("n", [0, 1, 37, 5000])
def test_adam_steps_as_the_reference_does(name, n, level, dtype):
    rng = np.random.default_rng(0)
    start, steps = rng.standard_normal(n).astype(dtype), rng.standard_normal((5, n)).astype(dtype)
    results = []
    for ops in (NumpyOps(), CompiledOps(level)):
        optimizer, w = make_optimizer(name, n, dtype, Hyper(weight_decay=0.1, eps=1e-4), ops), start.copy()
        for g in steps:
            optimizer.step(w, g.copy(), 0.01, lambda values: values)
        results.append((w, *optimizer.vectors.values()))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert relative_error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["sigmoid", "tanh", "relu"])
@pytest.mark.parametrize("n", [1, 15, 1000])
def test_activations_are_those_of_the_reference(kind, n, level, dtype):
    rng, results = np.random.default_rng(0), []
    x, dy = (rng.standard_normal(n) * 5).astype(dtype), rng.standard_normal(n).astype(dtype)
    x[:: max(2, n // 7)] = 0
    x[n // 2] = np.nan
    for ops in (NumpyOps(), CompiledOps(level)):
        y, dx = x.copy(), dy.copy()
        ops.activate(kind, y)
        results.append((y.copy(), dx))
        ops.activate_back(kind, y, dx)
    for actual, expected in zip(results[1], results[0], strict=True):
        assert np.array_equal(np.isnan(actual), np.isnan(expected)) and np.isnan(actual).any()
        assert relative_error(np.nan_to_num(actual), np.nan_to_num(expected)) <= {F32: 4e-7, F64: 1e-15}[dtype]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_the_sigmoid_holds_at_both_ends(level, dtype):
    """The sigmoid is within 4 units in the last place of the formula in a wider type, without overflow."""
    x = np.concatenate([np.linspace(-80, 80, 4001), np.linspace(-1, 1, 4001)]).astype(dtype)
    y = x.copy()
    CompiledOps(level).activate("sigmoid", y)
    wide = 1 / (1 + np.exp(-x.astype(np.longdouble)))
    assert (abs(y - wide) <= 4 * np.finfo(dtype).eps * wide).all()
    ends = np.array([-np.inf, -1e30, 1e30, np.inf, np.nan], dtype)
    CompiledOps(level).activate("sigmoid", ends)
    assert np.isnan(ends[4]) and (ends[2:4] == 1).all() and (ends[:2] < 1e-37).all() and (ends[:2] >= 0).all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [1, 5, 16, 100, 5003])
def test_sums_and_biases_are_those_of_the_reference(n, level, dtype):
    rng, results = np.random.default_rng(0), []
    y, bias = rng.standard_normal((3, 4, n)).astype(dtype), rng.standard_normal((5, 9)).astype(dtype)
    for ops in (NumpyOps(), CompiledOps(level)):
        # Rows and columns of a larger array, as the biases of a part lie in the flat vector.
        sums, biased = bias.copy(), y.copy()
        ops.row_sums(y, sums[1:4, 1::2])
        ops.add_bias(biased, bias[1:4, 1::2])
        results.append((sums, biased))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert relative_error(actual, expected) <= TOLERANCE[dtype] / 10


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("m", [1, 5, 16, 700])
def test_rows_of_unit_length_are_those_of_the_reference(m, level, dtype):
    rng, ops = np.random.default_rng(0), CompiledOps(level)
    # A number that is no part of the row follows each row.
    w, g = (rng.standard_normal((*shape, m + 1)).astype(dtype)[..., :m] for shape in ((2, 3), (4, 2, 3)))
    actual, expected, gradient = np.empty((2, 3), dtype), np.empty((2, 3), dtype), g.copy()
    OPS.row_factors(w, 0.5, 3.0, expected)
    ops.row_factors(w, 0.5, 3.0, actual)
    assert relative_error(actual, expected) <= TOLERANCE[dtype]
    OPS.project_rows(w, expected, 3.0, gradient)
    ops.project_rows(w, expected, 3.0, g)
    assert relative_error(g, gradient) <= TOLERANCE[dtype]
    # A row whose length overflows has no factor.
    w[1, 2] = np.finfo(dtype).max / 4
    for backend in (OPS, ops):
        with np.errstate(over="ignore"):
            backend.row_factors(w, 0.5, 3.0, actual)
        assert np.isnan(actual).tolist() == [[False] * 3, [False, False, True]]
    with pytest.raises(ValueError, match="contiguous rows"):
        ops.row_factors(np.repeat(w, 2, axis=-1)[..., ::2], 0.5, 3.0, actual)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_folded_kernels_are_those_of_the_reference(k, pool, level, dtype):
    rng, results = np.random.default_rng(0), []
    wide = k + pool - 1
    flat, dfolded = rng.standard_normal((3, 7, 6 * k * k)).astype(dtype), rng.standard_normal((2, 4, 5, wide, wide))
    for ops in (NumpyOps(), CompiledOps(level)):
        w, out = flat.copy(), np.full((2, 4, 5, wide, wide), np.nan, dtype)
        images = w[1:, 2:6, : 5 * k * k].reshape(2, 4, 5, k, k)
        assert np.shares_memory(w, images)
        ops.fold(images, pool, out)
        ops.unfold(dfolded.astype(dtype), pool, images)
        results.append((out, w))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert relative_error(actual, expected) <= TOLERANCE[dtype] / 10


@pytest.mark.parametrize("level", LEVELS)
def test_sums_do_not_lose_digits_with_the_size_of_images_and_minibatches(level):
    """Sums of positive numbers grow, and additions one by one would lose 1e-5 of the sum."""
    rng = np.random.default_rng(0)
    x, dy = rng.random((1, 58, 58, 5000), np.float32), rng.random((1, 56, 56, 5000), np.float32)
    plan = CompiledOps(level).convolution([Stripes(1, 1, 1, 0, 0, 0)], x.shape[:3], dy.shape[:3], 3, 1, F32)
    dkernels = np.empty((1, 1, 3, 3), np.float32)
    plan.backward(x, dy, dkernels, dkernels, None)
    for i, j in ((0, 0), (1, 2)):
        exact = np.einsum("hwb,hwb->", x[0, i : i + 56, j : j + 56], dy[0], dtype=np.float64)
        assert abs(dkernels[0, 0, i, j] - exact) <= 1e-6 * exact
    y = rng.random((1, 1, 3_000_000), np.float32)
    out = np.empty((1, 1), np.float32)
    CompiledOps(level).row_sums(y, out)
    assert out[0, 0] == pytest.approx(y.sum(dtype=np.float64), rel=2e-7)


@pytest.mark.parametrize("level", LEVELS)
def test_max_pooling_keeps_what_is_not_a_number(level):
    x = np.ones((1, 2, 4, 3), np.float32)
    x[0, 1, 1, 1] = np.nan
    y = np.empty((1, 1, 2, 3), np.float32)
    CompiledOps(level).max_pool(x, 2, y)
    assert np.isnan(y[0, 0, 0, 1]) and np.isnan(y).sum() == 1


def test_arrays_of_another_kind_are_refused():
    """C would read arrays of other types and strides as its own."""
    ops = CompiledOps()
    wide, narrow = np.ones((2, 3, 4)), np.ones((2, 3, 4), np.float32)
    with pytest.raises(ValueError, match="a kernel needs contiguous"):
        ops.row_sums(wide, np.empty((2, 3), np.float32))
    with pytest.raises(ValueError, match="a kernel needs contiguous"):
        ops.activate_back("sigmoid", narrow, wide)
    with pytest.raises(ValueError, match="a kernel needs contiguous"):
        ops.activate("sigmoid", wide[:, :, ::2])
    with pytest.raises(ValueError, match="a kernel needs contiguous"):
        ops.fold(np.ones((1, 2, 3, 4, 4))[..., ::2, ::2], 1, np.empty((1, 2, 3, 2, 2)))
    network = make("separable convolution")
    w = np.zeros(network.layout().size, np.float32)
    model = Model(network, network.layout(), w, w.copy(), ops)
    with pytest.raises(ValueError, match="a kernel needs contiguous"):
        model.forward(np.zeros((int(np.prod(network.in_shape)), 2)))


def test_threads_work_at_the_same_time():
    barrier = threading.Barrier(3, timeout=20)
    Team(3).run(lambda k: barrier.wait(), 3)


def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(library, "crc32", lambda text: 1)
    library._library.cache_clear()
    library.level.cache_clear()
    try:
        assert compiled.level() == 0 and "built from other sources" in compiled.missing()
        with pytest.raises(UserError, match="install psmpi again"):
            make_backend("compiled")
        assert make_backend("auto").name == "numpy"
    finally:
        library._library.cache_clear()
        library.level.cache_clear()


def test_auto_takes_the_kernels_where_they_are():
    assert make_backend("auto").name == "compiled"
    assert make_backend("numpy").name == "numpy"
    assert make_backend("compiled").description == f"compiled ({compiled.NAMES[compiled.level()]})"
