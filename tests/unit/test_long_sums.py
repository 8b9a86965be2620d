"""Long sums in float32 against float64: adding numbers of one sign and size one by one loses most digits."""

import numpy as np
import pytest

from psmpi.backend import CompiledOps, NumpyOps, Stripes, compiled
from psmpi.nn.layers.batch_norm import EPS

F32 = np.dtype(np.float32)
BACKENDS = {"numpy": NumpyOps, **{f"C {k}": lambda k=k: CompiledOps(k) for k in range(1, compiled.level() + 1)}}

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def of_one_size(rng, *shape):
    """Numbers of magnitude 0.75 and either sign, whose squares are all equal."""
    return np.where(rng.random(shape) < 0.5, F32.type(0.75), F32.type(-0.75))


@every_backend
@pytest.mark.parametrize(("rows", "m"), [(3, 57_600), (1, 2_304_000), (50, 784)])
def test_normalization_of_long_rows_is_that_in_float64(rows, m, backend):
    ops, rng = BACKENDS[backend](), np.random.default_rng(0)
    x, dy, gamma = of_one_size(rng, rows, m) + F32.type(8), of_one_size(rng, rows, m), rng.random(rows, np.float32)
    normal, scale = np.empty_like(x), np.empty(rows, F32)
    ops.normalize(x, EPS, normal, scale)
    wide = x.astype(np.float64)
    exact = 1 / np.sqrt(wide.var(axis=1) + EPS)
    assert abs(scale / exact - 1).max() <= 1e-6
    expected = (wide - wide.mean(axis=1, keepdims=True)) * exact[:, None]
    assert abs(normal - expected).max() <= 2e-6
    # Gradients have the signs of the values, so that their products are of one size too.
    dy *= np.sign(dy) * np.sign(normal)
    wide, dgamma, dbeta = dy.astype(np.float64), np.empty(rows, F32), np.empty(rows, F32)
    projection, mean = (wide * expected).mean(axis=1, keepdims=True), wide.mean(axis=1, keepdims=True)
    ops.normalize_back(normal, scale, gamma, normal.copy(), dy, "identity", dgamma, dbeta)
    assert abs(dgamma / (m * projection[:, 0]) - 1).max() <= 4e-6
    assert abs(dbeta - m * mean[:, 0]).max() <= 1e-6 * 0.75 * m
    # The remainder is rounding error times the scale.
    exact = (gamma * exact)[:, None] * (wide - expected * projection - mean)
    assert abs(dy - exact).max() <= 5e-6


@every_backend
def test_a_mean_that_is_large_beside_the_deviation_costs_few_digits(backend):
    rng = np.random.default_rng(0)
    x = (1000 + 0.125 * of_one_size(rng, 2, 40_000)).astype(F32)
    normal, scale = np.empty_like(x), np.empty(2, F32)
    BACKENDS[backend]().normalize(x, EPS, normal, scale)
    wide = x.astype(np.float64)
    exact = 1 / np.sqrt(wide.var(axis=1) + EPS)
    assert abs(scale / exact - 1).max() <= 1e-6
    assert abs(normal - (wide - wide.mean(axis=1, keepdims=True)) * exact[:, None]).max() <= 2e-6


@every_backend
def test_gradients_of_samples_lose_no_digits_with_the_size_of_images(backend):
    rng = np.random.default_rng(0)
    x, dy = np.full((1, 202, 202, 3), 0.7, F32), np.full((1, 200, 200, 3), 0.7, F32)
    x[0, :, :, 1] = rng.random((202, 202))
    plan = BACKENDS[backend]().convolution([Stripes(1, 1, 1, 0, 0, 0)], x.shape[:3], dy.shape[:3], 3, 1, F32)
    plan.reserve(3)
    dkernels, dbias = np.empty((1, 1, 3, 3, 3), F32), np.empty((1, 3), F32)
    plan.samples(x, dy, dkernels, dbias)
    assert abs(dbias / dy.sum(axis=(1, 2), dtype=np.float64) - 1).max() <= 2e-6
    for i, j in ((0, 0), (2, 1)):
        exact = np.einsum("hwb,hwb->b", x[0, i : i + 200, j : j + 200], dy[0], dtype=np.float64)
        assert abs(dkernels[0, 0, i, j] / exact - 1).max() <= 1e-5


@every_backend
@pytest.mark.parametrize("size", [2, 8, 9, 56, 112])
def test_the_mean_of_a_large_window_is_that_in_float64(size, backend):
    x = np.full((2, 113, 113, 2), 0.7, F32)
    x[1] = np.random.default_rng(0).random(x[1].shape)
    side = 113 // size
    y = np.empty((2, side, side, 2), F32)
    BACKENDS[backend]().mean_pool(x, size, y)
    windows = x[:, : side * size, : side * size].reshape(2, side, size, side, size, 2)
    assert abs(y / windows.mean(axis=(2, 4), dtype=np.float64) - 1).max() <= 1e-6


@every_backend
def test_weight_gradients_and_row_sums_lose_no_digits_with_the_minibatch(backend):
    ops = BACKENDS[backend]()
    y = np.full((1, 2, 2_304_000), 0.7, F32)
    out = np.empty((1, 2), F32)
    ops.row_sums(y, out)
    assert abs(out / (0.7 * y.shape[2]) - 1).max() <= 1e-6
    # For equal numbers every sum one by one has the same error.
    x, dy = np.full((1, 114, 114, 128), 0.7, F32), np.full((1, 112, 112, 128), 0.7, F32)
    plan = ops.convolution([Stripes(1, 1, 1, 0, 0, 0)], x.shape[:3], dy.shape[:3], 3, 1, F32)
    plan.reserve(128)
    dkernels = np.empty((1, 1, 3, 3), F32)
    plan.backward(x, dy, dkernels, dkernels, None)
    assert abs(dkernels / (float(F32.type(0.7)) ** 2 * dy.size) - 1).max() <= 2e-5
