"""Updates of shared weights: the reference against gradients by differences, and the kernels against it."""

import threading

import numpy as np
import pytest

from psmpi.backend import SLOPES, CompiledOps, Descent, NumpyOps, Pairs, Room, Rows, compiled

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
REFERENCE = NumpyOps()
kernels = pytest.mark.skipif(not compiled.level(), reason="no compiled kernels, or none for this processor")
LEVELS = range(1, compiled.level() + 1)


def some_rows(dtype=F64, samples=40, features=30, seed=0, most=9):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, most, samples)
    columns = [np.sort(rng.choice(features, n, replace=False)) for n in sizes]
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    targets = rng.choice([-1, 1], samples).astype(dtype)
    often = rng.uniform(1, 3, features).astype(dtype)
    values = rng.standard_normal(starts[-1]).astype(dtype)
    return Rows(starts, np.concatenate(columns).astype(np.int32), values, targets, often)


def loss_of(rows, sample, w, bias, descent):
    """The loss of a sample without and with its penalty, from the definition."""
    entries = slice(rows.starts[sample], rows.starts[sample + 1])
    columns = rows.columns[entries]
    z = float(rows.values[entries] @ w[columns] + bias)
    t = rows.targets[sample]
    value = {
        "logistic": np.log1p(np.exp(-t * z)),
        "hinge": max(0, 1 - t * z),
        "squared": (z - t) ** 2,
    }[descent.loss]
    value *= descent.scale
    return value, value + descent.penalty / 2 * ((rows.often[columns] * w[columns] ** 2).sum() + bias**2)


@pytest.mark.parametrize("loss", SLOPES)
def test_a_step_is_along_the_gradient_of_the_sample(loss):
    rows, descent = some_rows(), Descent(0.1, 0.02, 0.0, loss, 0.7)
    rng, eps = np.random.default_rng(1), 1e-6
    for sample in range(8):
        w, bias = rng.standard_normal(30), rng.standard_normal(1)
        before = np.concatenate([w, bias])
        value = REFERENCE.sparse_steps(np.array([sample]), rows, w, bias, descent, False)
        gradient = (before - np.concatenate([w, bias])) / descent.lr
        assert value == pytest.approx(loss_of(rows, sample, before[:-1], before[-1], descent)[0])
        for k in range(31):
            shift = np.eye(31)[k] * eps
            up, down = (loss_of(rows, sample, (v := before + s)[:-1], v[-1], descent)[1] for s in (shift, -shift))
            assert gradient[k] == pytest.approx((up - down) / (2 * eps), abs=1e-6)


def test_factors_step_along_the_gradient_of_the_pair():
    rng, eps, penalty = np.random.default_rng(1), 1e-6, 0.3
    pairs = Pairs(np.array([[1, 5], [2, 4]], np.int32), np.array([0.7, -1.2]), rng.uniform(1, 2, 6))
    w, descent = rng.standard_normal((3, 6)), Descent(0.1, penalty, 0.0, "squared")

    def loss(w):
        a, b = w[:, 2], w[:, 4]
        squares = pairs.often[2] * (a @ a) + pairs.often[4] * (b @ b)
        return (a @ b + 1.2) ** 2 + penalty / 2 * squares

    stepped = w.copy()
    assert REFERENCE.factor_steps(np.array([1]), pairs, stepped, descent, False) == pytest.approx(
        (w[:, 2] @ w[:, 4] + 1.2) ** 2
    )
    for index in np.ndindex(w.shape):
        shift = np.zeros_like(w)
        shift[index] = eps
        expected = (loss(w + shift) - loss(w - shift)) / (2 * eps)
        assert (w - stepped)[index] / descent.lr == pytest.approx(expected, abs=1e-6)


def test_clipped_steps_are_no_longer():
    rows, w, bias = some_rows(), np.zeros(30), np.zeros(1)
    for sample in range(10):
        before = np.concatenate([w, bias])
        REFERENCE.sparse_steps(np.array([sample]), rows, w, bias, Descent(0.5, 0.0, 0.25), False)
        assert np.linalg.norm(np.concatenate([w, bias]) - before) <= 0.125 * (1 + 1e-12)


@kernels
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("loss", SLOPES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_steps_in_c_are_those_of_the_reference(level, dtype, loss, atomic):
    rows, descent = some_rows(dtype), Descent(0.1, 0.02, 1.5, loss, 0.7)
    order = np.random.default_rng(2).permutation(40)
    for bias in (None, np.zeros(1, dtype)):
        w, expected = np.full(30, 0.1, dtype), np.full(30, 0.1, dtype)
        biases = (None, None) if bias is None else (bias.copy(), bias.copy())
        loss_sum = CompiledOps(level).sparse_steps(order, rows, w, biases[0], descent, atomic)
        expected_sum = REFERENCE.sparse_steps(order, rows, expected, biases[1], descent, False)
        np.testing.assert_allclose(w, expected, rtol=0, atol=1e-5 if dtype == F32 else 1e-13)
        assert loss_sum == pytest.approx(expected_sum, rel=1e-5)
        if bias is not None:
            assert biases[0] == pytest.approx(biases[1], abs=1e-5)


@kernels
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_blocks_of_steps_in_c_are_those_of_the_reference(dtype, block, atomic):
    rows, descent, order = (
        some_rows(dtype),
        Descent(0.1, 0.02, 1.5, "logistic", 0.7),
        np.random.default_rng(2).permutation(40),
    )
    for bias in (None, np.zeros(1, dtype)):
        w, expected = np.full(30, 0.1, dtype), np.full(30, 0.1, dtype)
        biases = (None, None) if bias is None else (bias.copy(), bias.copy())
        room = Room.of(30, dtype)
        loss_sum = CompiledOps().sparse_blocks(order, rows, w, biases[0], descent, atomic, block, room)
        expected_sum = REFERENCE.sparse_blocks(order, rows, expected, biases[1], descent, False, block, room)
        np.testing.assert_allclose(w, expected, rtol=0, atol=1e-5 if dtype == F32 else 1e-13)
        assert loss_sum == pytest.approx(expected_sum, rel=1e-5) and not room.mark.any()
        if bias is not None:
            assert biases[0] == pytest.approx(biases[1], abs=1e-5)


@kernels
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_factors_in_c_are_those_of_the_reference(level, dtype, atomic):
    rng = np.random.default_rng(0)
    tokens = np.stack([rng.integers(0, 7, 50), 7 + rng.integers(0, 9, 50)], axis=1).astype(np.int32)
    pairs = Pairs(tokens, rng.standard_normal(50).astype(dtype), rng.uniform(1, 2, 16).astype(dtype))
    w = rng.standard_normal((5, 16)).astype(dtype)
    expected, descent = w.copy(), Descent(0.05, 0.01, 2.0, "squared")
    loss_sum = CompiledOps(level).factor_steps(np.arange(50), pairs, w, descent, atomic)
    assert loss_sum == pytest.approx(REFERENCE.factor_steps(np.arange(50), pairs, expected, descent, False), rel=1e-4)
    np.testing.assert_allclose(w, expected, rtol=0, atol=1e-4 if dtype == F32 else 1e-12)


@kernels
@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_additions_in_c_are_those_of_the_reference_to_the_bit(level, dtype, atomic):
    rng = np.random.default_rng(0)
    for n, zeros in ((0, 0), (5, 0.5), (64, 0), (1003, 0.3), (1003, 0.99)):
        g = rng.standard_normal(n).astype(dtype)
        g[rng.random(n) < zeros] = 0
        w = rng.standard_normal(n).astype(dtype)
        expected = w.copy()
        CompiledOps(level).add_shared(w, g, -0.1, atomic)
        REFERENCE.add_shared(expected, g, -0.1, False)
        assert np.array_equal(w, expected)


@kernels
def test_what_others_have_where_the_gradient_is_0_stays():
    """A write of an unchanged value would undo the addition of another process."""
    w, g = np.zeros(4096), np.zeros(4096)
    g[::2] = 1
    page = np.zeros(4096)
    CompiledOps().add_shared(page[:], g, 1.0, False)
    assert np.array_equal(page, g)
    w.flags.writeable = True
    stop = threading.Event()

    def adds():
        while not stop.is_set():
            CompiledOps().add_shared(w, g, 1.0, False)

    thread = threading.Thread(target=adds)
    thread.start()
    odd_ones = np.zeros(4096)
    odd_ones[1::2] = 1
    for _ in range(2000):
        CompiledOps().add_shared(w, odd_ones, 1.0, False)
    stop.set()
    thread.join()
    assert (w[1::2] == 2000).all()


@kernels
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_atomic_additions_of_several_threads_are_all_there(dtype):
    w, ones = np.zeros(16, dtype), np.ones(16, dtype)
    threads = [
        threading.Thread(target=lambda: [CompiledOps().add_shared(w, ones, 1.0, True) for _ in range(3000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (w == 12000).all()


@kernels
def test_counts_are_those_of_the_columns():
    rows, order = some_rows(), np.array([3, 3, 7, 20], np.int64)
    counts, expected = np.zeros(30, np.int64), np.zeros(30, np.int64)
    for sample in order:
        np.add.at(expected, rows.columns[rows.starts[sample] : rows.starts[sample + 1]], 1)
    for ops in (CompiledOps(), REFERENCE):
        for atomic in (False, True):
            counts[:] = 0
            ops.count_rows(order, rows, counts, atomic)
            assert np.array_equal(counts, expected)


def components(rows, order):
    """Components of samples that share columns, by merging sets."""
    groups = []
    for s, sample in enumerate(order):
        columns = set(rows.columns[rows.starts[sample] : rows.starts[sample + 1]].tolist())
        touching = [g for g in groups if g[0] & columns]
        groups = [g for g in groups if not g[0] & columns]
        groups.append((columns.union(*(g[0] for g in touching)), sorted([s, *(k for g in touching for k in g[1])])))
    return sorted(g[1] for g in groups)


@pytest.mark.parametrize("seed", range(6))
def test_components_are_those_of_sets_and_are_dealt_whole(seed):
    rows = some_rows(samples=60, features=400, seed=seed, most=5)
    order, marks = np.random.default_rng(seed).permutation(60), np.full(400, -1, np.int32)
    expected = components(rows, order)
    for ops in (REFERENCE, *([CompiledOps()] if compiled.level() else [])):
        for workers in (1, 2, 5):
            owner, count, largest = ops.deal_components(order, rows.starts, rows.columns, workers, marks)
            assert (marks == -1).all()
            assert count == len(expected) and largest == max(map(len, expected))
            assert all(len(set(owner[group].tolist())) == 1 for group in expected)
            assert set(owner.tolist()) == set(range(workers))
            if ops is not REFERENCE:
                assert np.array_equal(
                    owner, REFERENCE.deal_components(order, rows.starts, rows.columns, workers, marks)[0]
                )
