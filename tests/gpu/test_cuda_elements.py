"""CUDA kernels of elements, on the CPU, and the operations that launch them, on a stand-in for CuPy."""

from itertools import combinations

import numpy as np
import pytest
from helpers import cuda_host
from test_cuda_kernels import OPS, SHAPES, TOLERANCE, Guarded, blocks, draw, near, real_types
from test_device import cupy, put, relative_error  # noqa: F401

from psmpi.backend import CompiledOps, NumpyOps, compiled, gpu
from psmpi.backend.reference import Im2col
from psmpi.methods.psl.element_set import ElementSet
from psmpi.nn.losses import make_loss
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network
from psmpi.optim.curvature import RULES, CurvatureOps, ElementOperators, curvature_ops

F64 = np.dtype(np.float64)
CURVATURE = CurvatureOps(OPS)
pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no g++ to run the CUDA kernels on the CPU")


@pytest.fixture
def device(dtype):
    return Guarded(dtype)


@real_types
@pytest.mark.parametrize("add", [0, 1])
def test_runs_are_copied_or_added_in_their_order(add, dtype, device):
    """Two runs of `out`, the first with one source and the second with three."""
    rng = np.random.default_rng(0)
    values, out = draw(rng, dtype, 700), draw(rng, dtype, 640)
    table = np.array([[3, 300, 0, 1, 0], [303, 13, 0, 1, 300], [400, 240, 1, 4, 0]])
    sources = np.array([5, 0, 321, 460])
    expected = out.copy()
    if add:
        expected[3:316] += values[5:318]
        for source in (0, 321, 460):
            expected[400:640] += values[source : source + 240]
    else:
        expected[3:316], expected[400:640] = values[5:318], values[460:700]
    device_out = device.of(out)
    device("transfer", (3,), (64,), device.of(table), device.of(sources), device.of(values), device_out, add)
    assert np.array_equal(device_out, expected)


@real_types
@pytest.mark.parametrize(("count", "memory", "size"), [(1, 1, 1), (3, 2, 300), (2, 5, 1030)])
def test_pairs_are_multiplied_and_kept(count, memory, size, dtype, device):
    rng, rows = np.random.default_rng(0), 2 * memory
    pairs, v = draw(rng, dtype, count, rows, size), draw(rng, dtype, count, size)
    middle, sigma = draw(rng, F64, count, rows, rows), draw(rng, F64, count)
    for splits in (1, 3):
        partial, dots = device.array((count * rows, splits), F64), device.array((count, rows), F64)
        device("pair_dots", (count * rows, splits), (256,), rows, size, device.of(pairs), device.of(v), partial)
        device("pair_sums", (1,), (32,), count * rows, splits, partial, dots)
        near(dots, np.einsum("eri,ei->er", pairs.astype(F64), v.astype(F64)), 1e-12)
    weights = device.array((count, rows), F64)
    device("pair_weights", (1,), (32,), count, rows, device.of(middle), dots, weights)
    near(weights, np.einsum("ers,es->er", middle, dots), 1e-12)
    out = device.array((count, size))
    arrays = (device.of(pairs), device.of(sigma), weights, device.of(v), out)
    device("pair_combine", (2,), (64,), count, rows, size, *arrays)
    near(out, sigma[:, None] * v + np.einsum("er,eri->ei", weights, pairs), 10 * TOLERANCE[dtype])

    s, y = draw(rng, dtype, count, size), draw(rng, dtype, count, size)
    for slots, cleared in (([-1, 0, memory - 1], [1, 0, 1]), ([0, -1, 0], [1, 0, 0])):
        slots, cleared = np.array(slots[:count]), np.array(cleared[:count], bool)
        expected, on_device = pairs.copy(), device.of(pairs)
        CURVATURE.keep_pairs(expected, slots, cleared, s, y)
        where = (device.of(slots), device.of(cleared.view(np.uint8)))
        device("keep_pairs", (2,), (64,), count, memory, size, *where, device.of(s), device.of(y), on_device)
        assert np.array_equal(on_device, expected)
    a, b = draw(rng, F64, count), draw(rng, F64, count)
    expected, on_device = y.copy(), device.of(y)
    CURVATURE.mix_rows(a, s, b, expected)
    device("mix_rows", (2,), (64,), count, size, device.of(a), device.of(s), device.of(b), on_device)
    near(on_device, expected, TOLERANCE[dtype])


@real_types
@pytest.mark.parametrize("peak", [1.0, 2.0**70])
@pytest.mark.parametrize("wide", [9, 32])
def test_terms_of_the_loss_have_their_weights(wide, peak, dtype, device):
    rng, batch = np.random.default_rng(0), 9
    grad, labels = draw(rng, F64, 4, batch) * peak, rng.integers(0, 4, batch)
    report = np.array([0, 0, 0, abs(grad).max()])
    other_classes = np.array([0, 0, 2, 3])
    lost, won = np.array([-1, 0, -1, 0], dtype), np.array([0, 1, 1, 1], dtype)
    expected, out = np.empty((4, wide), dtype), device.array((4, wide))
    CURVATURE.term_weights(grad, labels, report, 1, other_classes, lost, won, expected)
    assert abs(expected).max() <= 4
    arrays = (device.of(other_classes), device.of(lost), device.of(won), out)
    device(
        "term_weights", (2,), (32,), 4, batch, wide, device.of(grad), device.of(labels), device.of(report), 1, *arrays
    )
    assert np.array_equal(out, expected)


@real_types
@pytest.mark.parametrize(("many", "count", "n", "batch"), [(1, 1, 1, 1), (3, 2, 5, 7), (2, 1, 4, 600)])
def test_samples_are_weighted(many, count, n, batch, dtype, device):
    rng = np.random.default_rng(0)
    y, weights = draw(rng, dtype, count, n, batch), draw(rng, dtype, many, batch)
    expected, out = np.empty((many, count, n, batch), dtype), device.array((many, count, n, batch))
    OPS.scale_samples(y, weights, expected)
    device("scale_samples", (2,), (64,), many, count * n, batch, device.of(y), device.of(weights), out)
    assert np.array_equal(out, expected)
    # The sums go to strided places between other numbers.
    storage = draw(rng, dtype, many * 100)
    steps = (100, 41, 3)
    sums, device_sums = storage.copy(), device.of(storage)
    places = np.arange(many)[:, None, None] * 100 + np.arange(count)[:, None] * 41 + np.arange(n) * 3
    row_sums = np.empty((many, count, n), dtype)
    OPS.weighted_sums(y, weights, row_sums)
    sums[places] = row_sums
    device("weighted_sums", (count * n, many), (256,), n, batch, device.of(y), device.of(weights), device_sums, *steps)
    near(device_sums, sums, 10 * TOLERANCE[dtype])
    images, totals = draw(rng, dtype, n, 3, 4, batch), device.array((n, batch))
    device("position_sums", (2,), (64,), n, 12, batch, device.of(images), totals)
    near(totals, images.sum(axis=(1, 2)), TOLERANCE[dtype])


@real_types
def test_variables_are_scaled_by_moments(dtype, device):
    rng = np.random.default_rng(0)
    g, squares = draw(rng, dtype, 301), draw(rng, dtype, 301) ** 2
    expected, root = squares.copy(), np.empty_like(g)
    CURVATURE.moment_scale(g, expected, root, 0.99, 0.3, 1e-6)
    device_squares, device_root = device.of(squares), device.array((301,))
    device("moment_scale", (2,), (64,), 301, device.of(g), device_squares, device_root, 0.99, 0.3, 1e-6)
    near(device_squares, expected, TOLERANCE[dtype])
    near(device_root, root, TOLERANCE[dtype])


@real_types
@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize("name", SHAPES)
def test_samples_have_the_gradients_of_the_reference(name, batch, dtype, device):
    s, channels, (height, width), k, stride = SHAPES[name]
    rows, columns = (height - k) // stride + 1, (width - k) // stride + 1
    own_count, units = s.count * s.n, s.out + s.count * s.n + 1
    rng = np.random.default_rng(0)
    x, dy = draw(rng, dtype, channels, height, width, batch), draw(rng, dtype, units, rows, columns, batch)
    reference = Im2col([s], x.shape[:3], dy.shape[:3], k, stride, dtype, ops=OPS)
    reference.reserve(batch)
    expected, dbias = np.zeros((units, s.n_in, k, k, batch), dtype), np.zeros((units, batch), dtype)
    reference.samples(x, dy, expected, dbias)
    dims = (s.count, s.n, s.n_in, s.source, s.source_step, s.out, height, width, rows, columns, k, stride, batch)
    out = device.array(expected.shape)
    grid = (blocks(s.n_in * k * k * batch, 128), blocks(s.n, 4), s.count)
    device("conv_samples", grid, (128,), *dims, device.of(x), device.of(dy), out)
    own_units = slice(s.out, s.out + own_count)
    near(out[own_units], expected[own_units], TOLERANCE[dtype])
    assert np.isnan(out[: s.out]).all() and np.isnan(out[s.out + own_count :]).all()


@real_types
def test_transfers_are_those_of_the_reference(cupy, dtype):  # noqa: F811
    """Runs that overlap in their target, and runs of more elements than one block copies."""
    rng, ops = np.random.default_rng(0), gpu.CupyOps()
    for table in (
        [[0, 10, 3000], [17, 0, 30], [5, 2990, 40], [40, 10, 3000], [9, 500, 0]],
        [[k * 37, (k * 101) % 3000, 1 + k * 7] for k in range(60)],
        np.empty((0, 3)),
    ):
        table = np.array(table, np.int64)
        values, out = draw(rng, dtype, 4000), draw(rng, dtype, 4000)
        device_out = put(ops, out)
        ops.run_copies(table).add(put(ops, values), device_out)
        expected = out.copy()
        NumpyOps().run_copies(table).add(values, expected)
        assert np.array_equal(ops.host(device_out), expected)
        device_out = put(ops, out)
        ops.run_copies(table).copy(put(ops, values), device_out)
        expected = out.copy()
        for begin, to, length in table:
            expected[to : to + length] = values[begin : begin + length]
        assert np.array_equal(ops.host(device_out), expected)


@real_types
@pytest.mark.parametrize("rows", [2, 10])
def test_products_of_elements_are_those_of_the_reference(cupy, rows, dtype):  # noqa: F811
    runs = [[(0, 5), (30, 71)], [(3, 90)], [], [(0, 5), (50, 50), (60, 61)], [(0, 1500)]]
    rng, results = np.random.default_rng(0), []
    p = draw(rng, dtype, 1500)
    pairs, (count, size) = draw(rng, dtype, 5, rows, 1500), (5, 1500)
    for e, element_runs in enumerate(runs):
        pairs[e, :, sum(b - a for a, b in element_runs) :] = 0
    middle, sigma = draw(rng, F64, count, rows, rows), rng.random(count)
    for ops in (NumpyOps(), gpu.CupyOps()):
        curvature = curvature_ops(ops)
        elements, operators = curvature.restriction(runs, size), [put(ops, a) for a in (pairs, middle, sigma)]
        v, out, coefficients = (put(ops, np.zeros(s, d)) for s, d in (((5, size), dtype),) * 2 + (((5, rows), F64),))
        total, q = (put(ops, np.full_like(p, np.nan)) for _ in range(2))
        elements.restrict(put(ops, p), v)
        elements.accumulate(v, total)
        curvature.products(*operators, coefficients, v, out)
        curvature.restricted_products(elements, *operators, coefficients, put(ops, p), q)
        dots = [curvature.row_dots(v, out), curvature.pair_dots(operators[0], v)]
        results.append([ops.host(a) for a in (v, total, out, coefficients, q)] + dots)
    for actual, expected in zip(results[1], results[0], strict=True):
        assert relative_error(actual, expected) <= 10 * TOLERANCE[dtype]


@real_types
@pytest.mark.parametrize("damping", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_operators_on_a_device_are_those_of_the_host(cupy, rule, damping, dtype):  # noqa: F811
    """Without damping, pairs with s^T y of both signs have all outcomes: skipped, updated, rejected and reset."""
    if damping and rule != "plbfgs":
        return
    backends = [NumpyOps(), gpu.CupyOps()] + ([CompiledOps()] if compiled.level() else [])
    operators = [ElementOperators(4, 37, dtype, rule, ops, memory=3, damping=damping) for ops in backends]
    rng, outcomes = np.random.default_rng(2), set()
    for step in range(24):
        s, v = draw(rng, dtype, 4, 37), draw(rng, dtype, 4, 37)
        y = (s * rng.random((4, 37)) * rng.choice([-1, 1, 1])).astype(dtype)
        if step > 12:
            y[0] = -s[0] if rule == "plbfgs" else np.nan
        seen, results = rng.random(4) < 0.8, []
        seen[0] = True
        for op in operators:
            outcome = op.push(put(op.ops, s), put(op.ops, y.copy()), seen)
            out = put(op.ops, np.empty_like(v))
            op.product(put(op.ops, v), out)
            results.append((outcome, op.ops.host(out), op.ops.host(op.pairs), op.stamps, op.sigma, op.middle))
        outcomes |= set(results[0][0].tolist())
        for result in results[1:]:
            for actual, expected in zip(result, results[0], strict=True):
                assert relative_error(actual, expected) <= 2000 * TOLERANCE[dtype], step
    assert outcomes == {0, 1, 2, 3} if not damping else {0, 1} <= outcomes


# Convolutions with and without biases.
CUT = [
    *({"type": "conv", "channels": 6, "kernel": 4}, {"type": "mean_pool"}, {"type": "sigmoid"}),
    *({"type": "conv", "channels": 16, "kernel": 4, "bias": False}, {"type": "max_pool"}, {"type": "relu"}),
    *({"type": "flatten"}, {"type": "separable_dense", "units": 200, "groups": 10}, {"type": "sigmoid"}),
    {"type": "separable_dense", "units": 10, "groups": 10},
]


@real_types
@pytest.mark.parametrize(
    ("name", "loss", "merged", "compute"),
    [
        ("psnet", "psl", False, "float32"),
        ("psnet", "logistic", True, "float32"),
        ("cut", "psl", True, "float32"),
        ("cut", "logistic", False, "float32"),
        ("cut", "psl", False, "tf32"),
    ],
)
def test_element_gradients_on_a_device_are_those_of_the_host(cupy, name, loss, merged, compute, dtype):  # noqa: F811
    """Elements of equal and of different sizes, all classes and some, more samples than labels."""
    network = build("cut", (1, 28, 28), CUT, 10) if name == "cut" else make_network("psnet", (1, 8, 8), 5)
    classes, pairs = (2, 3, 7), [(2, 7), (3, 7)]
    if name == "psnet":
        classes, pairs = tuple(range(5)), list(combinations(range(5), 2))
    layout, rng = network.layout(), np.random.default_rng(1)
    size = layout.part(classes).size
    w, x = (0.3 * draw(rng, dtype, size)), rng.random((int(np.prod(network.in_shape)), 16)).astype(dtype)
    results_by_backend = []
    for ops in (NumpyOps(), gpu.CupyOps(compute=compute, convolution="measured")):
        arrays, results = [put(ops, a) for a in (w, x)], []
        # With kappa 60, derivatives are so large that the backward pass scales them down.
        for kappa in (2.0, 60.0):
            objective = make_loss(loss, dtype, kappa=kappa)
            elements = ElementSet(network, layout, classes, pairs, dtype, ops, objective, merged=merged)
            out = elements.make_vectors()
            for b in (16, 11, 13):
                labels = np.random.default_rng(b).integers(0, len(classes), b)
                value = elements.gradients(*arrays, labels, 1 / b, out)
                results += [np.array([value, elements.value(*arrays, labels, 1 / b)]), ops.host(out).copy()]
            assert (abs(results[-1]).max() > 2.0**20) == (loss == "psl" and kappa > 2)
        results.append(np.array([elements.gradients(*arrays, labels[:0], 1.0, out), abs(ops.host(out)).max()]))
        assert elements.nbytes > size * w.itemsize
        results_by_backend.append(results)
    # With tf32 the stand-in multiplies float32 numbers, and a GPU rounds them to 10 bits first.
    tolerance = 100 * TOLERANCE[dtype] if compute == "float32" or cupy.__version__ == "fake" else 0.1
    for actual, expected in zip(results_by_backend[1], results_by_backend[0], strict=True):
        assert np.isfinite(expected).all() and relative_error(actual, expected) <= tolerance


def test_gradients_of_elements_are_recorded(stand_in):
    """A recorded call reads the current weights, samples and labels, and writes to the given array."""
    network, rng = make_network("psnet", (1, 8, 8), 10), np.random.default_rng(0)
    layout, classes = network.layout(), (1, 4, 5, 8)
    pairs, size = list(combinations(classes, 2)), layout.part(classes).size
    backends = (NumpyOps(), gpu.CupyOps())
    sets = [ElementSet(network, layout, classes, pairs, F64, ops, make_loss("psl", F64)) for ops in backends]
    outputs = [[e.make_vectors() for _ in range(2)] for e in sets]
    mirrors = [
        [backend_ops.mirror(backend_ops.zeros(int(np.prod(n)), F64).reshape(n)) for n in ((size,), (64, 16))]
        for backend_ops in backends
    ]
    before = backends[1].stream.launches
    for step in range(5):
        w, x, labels = 0.3 * rng.standard_normal(size), rng.random((64, 16)), rng.integers(0, len(classes), 12)
        values = []
        for elements, out, inputs in zip(sets, outputs, mirrors, strict=True):
            for mirror, array in zip(inputs, (w, x), strict=True):
                mirror.settle()
                mirror.host[...] = array
                mirror.push()
            arrays = [mirror.array for mirror in inputs]
            losses = [elements.gradients(*arrays, labels, 1 / 12, vector) for vector in out]
            values.append([*losses, elements.value(*arrays, labels, 1 / 12)])
        assert relative_error(np.array(values[1]), np.array(values[0])) <= 1e-12
        for expected, device_vector in zip(*outputs, strict=True):
            assert relative_error(backends[1].host(device_vector), expected) <= 1e-11, step
    # Three calls a step. The first step launches no graph, and the second step only two: the first call allocates
    # memory, and so has one more call before it is recorded.
    assert backends[1].stream.launches - before == 4 * 3 - 1
