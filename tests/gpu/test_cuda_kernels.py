"""The CUDA kernels: nvcc compiles them without warnings, and on the CPU they have the results of the NumPy reference.

`Guarded` makes every launch twice, with blocks and threads in both orders, on arrays between guard zones. Both results
must have the same bits, inputs must not change, and nothing may be written beyond an array. Outputs hold NaN before.
"""

import os
import shutil
import subprocess
import sysconfig
from itertools import pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest
from helpers import cuda_host
from helpers.cuda_host import Address, Kernels

from psmpi.backend import CupyOps, NumpyOps, Stripes
from psmpi.backend.reference import Im2col
from psmpi.methods.sil.targets import TargetDistance
from psmpi.nn.losses import LOSSES, largest_exponent, make_loss
from psmpi.optim import Hyper, make_optimizer

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
REALS = {F32: "float", F64: "double"}
TOLERANCE = {F32: 1e-5, F64: 1e-10}
KINDS = ("identity", "sigmoid", "tanh", "relu")
# The largest component of a gradient after it is scaled up again.
LIMIT = {F32: 2.0**50, F64: 2.0**400}
GUARD = 64
OPS = NumpyOps()
# Losses with a kernel, in the order of the kernel's numbers of losses.
FUSED = [name for name in LOSSES if hasattr(CupyOps, f"{name}_loss")]

needs_compiler = pytest.mark.skipif(cuda_host.compiler() is None, reason="no g++ to run the CUDA kernels on the CPU")
real_types = pytest.mark.parametrize("dtype", [F32, F64], ids=str)


# The kernels compiled by nvcc.


def find_nvcc():
    """The path of nvcc: on PATH, in CUDA_HOME, or in a pip package of this Python; else None."""
    places = [shutil.which("nvcc")]
    if "CUDA_HOME" in os.environ:
        places.append(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    places += sorted(map(str, Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/bin/nvcc")), reverse=True)
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


@pytest.mark.parametrize("dtype", [F32, pytest.param(F64, marks=pytest.mark.slow)], ids=str)
def test_nvcc_takes_the_kernels_without_a_warning(dtype, tmp_path):
    """All files are one source, as CuPy compiles them."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on the path, in CUDA_HOME or in this Python environment")
    source = tmp_path / "all.cu"
    source.write_text("".join(f'#include "{path.name}"\n' for path in sorted(cuda_host.SOURCES.glob("*.cu"))))
    result = subprocess.run(
        [
            nvcc, "-std=c++17", "-fatbin", "-Werror", "all-warnings", f"-DREAL={REALS[dtype]}",
            "-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90",
            f"-I{cuda_host.SOURCES}", "-o", str(tmp_path / "out.fatbin"), str(source),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # A message, for instance of registers that spill to memory, is a failure as well.
    assert not result.stderr, result.stderr


# The kernels on the CPU.


class Guarded:
    """Arrays between guard zones, and launches of kernels on them."""

    def __init__(self, dtype):
        self.dtype, self.kernels = dtype, cuda_host.load(REALS[dtype])
        self.arrays = {}

    def array(self, shape, dtype=None, fill=np.nan):
        """A new array. fill: a number, or an array of the values."""
        dtype = np.dtype(dtype or self.dtype)
        size = int(np.prod(shape))
        padded = np.full(size + 2 * GUARD, 77, dtype)
        # The address of the first element is a multiple of 16 bytes, as in an allocation of CUDA.
        skip = -(padded.ctypes.data + GUARD * dtype.itemsize) % 16 // dtype.itemsize
        start = GUARD + skip
        inner = padded[start : start + size].reshape(shape)
        inner[...] = fill
        self.arrays[inner.ctypes.data] = (padded, inner, start)
        return inner

    def of(self, values, dtype=None):
        values = np.asarray(values)
        return self.array(values.shape, dtype or values.dtype, values)

    def __call__(self, name, grid, block, *arguments):
        types = {
            "T": self.dtype,
            "double": F64,
            "float": F32,
            "long long": np.int64,
            "int": np.int32,
            "unsigned char": np.uint8,
        }
        signature, values, written = self.kernels.kernels[name], [], []
        assert len(signature) == len(arguments), name
        for kind, a in zip(signature, arguments, strict=True):
            if isinstance(a, np.ndarray):
                assert a.dtype == types[kind.removeprefix("const ").removesuffix("*")], (name, kind, a.dtype)
                assert a.flags.c_contiguous
                if not kind.startswith("const"):
                    written.append(a)
                a = Address(a.ctypes.data)
            values.append(a)
        before = [(inner, inner.copy()) for _, inner, _ in self.arrays.values()]
        results = []
        for self.kernels.reverse in (True, False):
            for inner, values_before in before:
                inner[...] = values_before
            self.kernels.launch(name, grid, block, tuple(values))
            results.append([a.copy() for a in written])
            for padded, inner, start in self.arrays.values():
                assert (padded[:start] == 77).all() and (padded[start + inner.size :] == 77).all(), f"{name}: beyond"
            for inner, values_before in before:
                if not any(np.shares_memory(inner, a) for a in written):
                    assert inner.tobytes() == values_before.tobytes(), f"{name} wrote to its input"
        for first, second in zip(*results, strict=True):
            assert first.tobytes() == second.tobytes(), f"{name}: the order of threads shows"


@pytest.fixture
def device(dtype):
    return Guarded(dtype)


def near(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    actual, expected = (np.nan_to_num(a.astype(F64), nan=0.0) for a in (actual, expected))
    if np.array_equal(actual, expected):
        return
    assert abs(actual - expected).max() <= tolerance * abs(expected).max()


def blocks(size, threads):
    return -(-size // threads)


def draw(rng, dtype, *shape):
    return rng.standard_normal(shape).astype(dtype)


# Stripes, channels, height and width, kernel, stride.
SHAPES = {
    "one group": (Stripes(1, 7, 5, 0, 0, 0), 5, (9, 8), 3, 2),
    "many units": (Stripes(1, 10, 1, 0, 0, 0), 1, (14, 15), 6, 2),
    "groups": (Stripes(4, 3, 2, 0, 2, 0), 8, (7, 7), 2, 1),
    "groups of more than a block": (Stripes(2, 9, 6, 0, 6, 0), 12, (6, 5), 2, 1),
    "rows and columns that no output sees": (Stripes(1, 2, 3, 0, 0, 0), 3, (10, 11), 4, 3),
    "a kernel as large as the image": (Stripes(1, 5, 2, 0, 0, 0), 2, (4, 4), 4, 1),
    "pointwise": (Stripes(5, 6, 9, 0, 9, 0), 45, (1, 1), 1, 1),
    "a later segment": (Stripes(3, 1, 2, 3, 2, 2), 9, (5, 5), 2, 1),
    "unseen channels": (Stripes(2, 2, 2, 1, 3, 1), 7, (5, 6), 2, 1),
    "stride larger than the kernel": (Stripes(1, 3, 2, 0, 0, 0), 2, (9, 9), 2, 3),
    "five": (Stripes(1, 4, 4, 0, 0, 0), 4, (9, 7), 5, 1),
    "wide": (Stripes(1, 3, 1, 0, 0, 0), 1, (12, 11), 9, 1),
    "wider": (Stripes(1, 2, 1, 0, 0, 0), 1, (17, 18), 16, 1),
}


@needs_compiler
@real_types
@pytest.mark.parametrize("batch", [1, 7, 33])
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "first", "rows"),
    [(1, (5, 4), 1, 1, 0, 5), (3, (9, 8), 3, 2, 0, 4), (2, (12, 11), 6, 2, 1, 2), (2, (9, 9), 2, 3, 2, 1)],
)
def test_windows_are_those_of_the_reference(channels, size, kernel, stride, first, rows, batch, dtype, device):
    rng = np.random.default_rng(0)
    width = (size[1] - kernel) // stride + 1
    x = draw(rng, dtype, channels, *size, batch)
    shape = (channels, kernel, kernel, rows, width, batch)
    expected, device_windows = np.empty(shape, dtype), device.array(shape)
    numbers = (channels, *size, batch, kernel, stride, first, rows, width)
    NumpyOps().im2col(x, stride, first, expected)
    device("im2col", (3,), (64,), *numbers, device.array(x.shape, fill=x), device_windows)
    assert np.array_equal(device_windows, expected)
    cols = draw(rng, dtype, *shape)
    expected_image, device_image = x.copy(), device.array(x.shape, fill=x)
    NumpyOps().col2im(cols, stride, first, expected_image)
    device("col2im", (3,), (64,), *numbers, device.array(shape, fill=cols), device_image)
    near(device_image, expected_image, 1e-5 if dtype == np.float32 else 1e-12)


@needs_compiler
@real_types
@pytest.mark.parametrize("batch", [1, 3, 33, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_convolutions_are_those_of_the_reference(name, batch, dtype, device):
    s, channels, (height, width), k, stride = SHAPES[name]
    rows, columns = (height - k) // stride + 1, (width - k) // stride + 1
    # One unit more than the stripes have, to which no kernel may write.
    own_count, units = s.count * s.n, s.out + s.count * s.n + 1
    rng = np.random.default_rng(0)
    x, dy = draw(rng, dtype, channels, height, width, batch), draw(rng, dtype, units, rows, columns, batch)
    kernels, bias = draw(rng, dtype, units, s.n_in, k, k), draw(rng, dtype, units)
    reference = Im2col([s], x.shape[:3], dy.shape[:3], k, stride, dtype, ops=OPS)
    reference.reserve(batch)
    reference.dcols.fill(0)
    y, dkernels, dx = np.zeros_like(dy), np.zeros_like(kernels), np.zeros_like(x)
    reference.forward(x, kernels, bias, y)
    reference.backward(x, dy, kernels, dkernels, dx)
    own_units = slice(s.out, s.out + own_count)
    seen = np.zeros(channels, bool)
    for stripe in range(s.count):
        seen[s.source + stripe * s.source_step :][: s.n_in] = True

    x, dy, kernels, bias = (device.of(a) for a in (x, dy, kernels, bias))
    padded_units, padded_channels = blocks(s.n, 4) * 4, blocks(s.n_in, 4) * 4
    by_unit = device.array((s.count, s.n_in, k * k, padded_units))
    by_channel = device.array((s.count, s.n, k * k, padded_channels))
    device("conv_pack", (3,), (64,), s.count, s.n, s.n_in, s.out, k, kernels, by_unit, by_channel)
    expected = kernels[own_units].reshape(s.count, s.n, s.n_in, k * k)
    assert np.array_equal(by_unit[..., : s.n], expected.transpose(0, 2, 3, 1)) and not by_unit[..., s.n :].any()
    assert np.array_equal(by_channel[..., : s.n_in], expected.transpose(0, 1, 3, 2))
    assert not by_channel[..., s.n_in :].any()

    dims = (s.count, s.n, s.n_in, s.source, s.source_step, s.out, height, width, rows, columns, k, stride, batch)
    for kind, activation in enumerate(KINDS):
        out = device.array(y.shape)
        grid = (blocks(rows * columns * batch, 128), padded_units // 4, s.count)
        device("conv_forward", grid, (128,), *dims, x, by_unit, bias, out, kind)
        expected = y.copy()
        OPS.activate(activation, expected)
        near(out[own_units], expected[own_units], TOLERANCE[dtype])
        assert np.isnan(out[: s.out]).all() and np.isnan(out[s.out + own_count :]).all()

    grid = (blocks(height * width * batch, 128), padded_channels // 4, s.count)
    out = device.array(x.shape)
    device("conv_input", grid, (128,), *dims, dy, by_channel, out, 0)
    near(out[seen], dx[seen], TOLERANCE[dtype])
    assert np.isnan(out[~seen]).all()
    out[...] = x
    device("conv_input", grid, (128,), *dims, dy, by_channel, out, 1)
    near(out[seen], (x + dx)[seen], TOLERANCE[dtype])
    assert np.array_equal(out[~seen], x[~seen])

    for splits in (1, 3, 7):
        partial, out = device.array((splits, own_count, s.n_in, k, k)), device.array(kernels.shape)
        device("conv_weight", (s.count * padded_units // 4, s.n_in * k, splits), (128,), *dims, x, dy, partial, splits)
        device("conv_weight_sum", (2,), (64,), dkernels[own_units].size, splits, partial, out[own_units])
        near(out[own_units], dkernels[own_units], TOLERANCE[dtype])
        assert np.isnan(out[: s.out]).all() and np.isnan(out[s.out + own_count :]).all()


@needs_compiler
@real_types
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize(("count", "n", "m"), [(1, 1, 1), (3, 5, 33), (2, 7, 700)])
def test_biases_and_activations_are_those_of_the_reference(count, n, m, kind, dtype, device):
    rng = np.random.default_rng(0)
    y, dy = draw(rng, dtype, count, n, m) * 3, draw(rng, dtype, count, n, m)
    y[0, 0, 0] = np.nan
    if y.size > 1:
        y[0, -1, -1] = -1000
    # The biases are at strided places between other weights.
    weights = draw(rng, dtype, count * 40)
    step, row_step = 37, 4
    bias = weights[np.arange(count)[:, None] * step + np.arange(n) * row_step]
    expected = y + bias[:, :, None]
    OPS.activate(KINDS[kind], expected)
    out, weights = device.of(y), device.of(weights)
    device("finish", (2,), (32,), count, n, m, out, weights, step, row_step, kind)
    near(out, expected, TOLERANCE[dtype])
    out = device.of(y + bias[:, :, None])
    device("activate", (2,), (32,), out.size, out, kind)
    near(out, expected, TOLERANCE[dtype])

    slope = dy.copy()
    OPS.activate_back(KINDS[kind], expected, slope)
    output, d = device.of(expected), device.of(dy)
    device("activate_back", (3,), (32,), d.size, output, d, kind)
    near(d, slope, TOLERANCE[dtype])
    for splits in (1, 3, 5):
        d, partial, db = device.of(dy), device.array((count * n, splits)), device.of(weights)
        device("finish_back", (count * n, splits), (256,), count, n, m, output, d, partial, splits, kind)
        near(d, slope, TOLERANCE[dtype])
        device("row_sums", (1,), (64,), count, n, splits, partial, db, step, row_step)
        rows = weights.copy()
        rows[np.arange(count)[:, None] * step + np.arange(n) * row_step] = slope.sum(axis=-1)
        near(db, rows, TOLERANCE[dtype])


@needs_compiler
@real_types
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 33), (3, 700)])
def test_normalization_is_that_of_the_reference(n, m, kind, dtype, device):
    rng = np.random.default_rng(0)
    x, dy = draw(rng, dtype, n, m) * 3 + 5, draw(rng, dtype, n, m)
    gamma, beta = draw(rng, dtype, n), draw(rng, dtype, n)
    normal, scale, expected = np.empty_like(x), np.empty(n, dtype), np.empty_like(x)
    OPS.normalize(x, 1e-5, normal, scale)
    OPS.affine(normal, gamma, beta, KINDS[kind], expected)
    device_normal, device_rows = device.of(x), [device.array((n,)) for _ in range(3)]
    device("normalize", (n,), (256,), m, device_normal, 1e-5, device_normal, device_rows[0])
    near(device_normal, normal, 30 * TOLERANCE[dtype])
    near(device_rows[0], scale, 30 * TOLERANCE[dtype])
    device_normal[...], device_rows[0][...] = normal, scale
    gamma, y = device.of(gamma), device.array((n, m))
    device("affine", (2,), (32,), n, m, device_normal, gamma, device.of(beta), kind, y)
    near(y, expected, TOLERANCE[dtype])

    d, dgamma, dbeta = dy.copy(), np.empty(n, dtype), np.empty(n, dtype)
    OPS.normalize_back(normal, scale, gamma, expected, d, KINDS[kind], dgamma, dbeta)
    out = device.of(dy)
    arguments = (device_normal, device_rows[0], gamma, device.of(expected), out, kind)
    device("normalize_back", (n,), (256,), m, *arguments, *device_rows[1:])
    # Gradients are differences of sums. A row of one value has variance 0 and the factor 1e-5 ** -0.5 = 316.
    near(out, d, 300 * TOLERANCE[dtype])
    near(device_rows[1], dgamma, 30 * TOLERANCE[dtype])
    near(device_rows[2], dbeta, 30 * TOLERANCE[dtype])


@needs_compiler
@real_types
@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 33), (70, 40)])
def test_normalization_of_columns_is_that_of_the_reference(n, m, dtype, device):
    rng = np.random.default_rng(0)
    x, dy = draw(rng, dtype, n, m) * 3 + 5, draw(rng, dtype, n, m)
    gamma, beta = device.of(draw(rng, dtype, n)), device.of(draw(rng, dtype, n))
    normal, scale, y = np.empty_like(x), np.empty(m, dtype), np.empty_like(x)
    OPS.layer_norm(x, 1e-5, gamma, beta, normal, scale, y)
    device_normal, out, factors, grid = device.of(x), device.array((n, m)), device.array((m,)), (-(-m // 32),)
    device("layer_norm", grid, (32, 8), n, m, device_normal, 1e-5, gamma, beta, device_normal, factors, out)
    for actual, expected in ((device_normal, normal), (factors, scale), (out, y)):
        near(actual, expected, 30 * TOLERANCE[dtype])
    device_normal[...], factors[...] = normal, scale
    device_dx, sums = device.of(dy), [device.array((n,)) for _ in range(2)]
    dgamma, dbeta = np.empty(n, dtype), np.empty(n, dtype)
    OPS.layer_norm_back(normal, scale, gamma, dy, dgamma, dbeta)
    device("layer_norm_sums", (n,), (256,), m, device_normal, device_dx, *sums)
    device("layer_norm_back", grid, (32, 8), n, m, device_normal, factors, gamma, device_dx)
    # A column of one value has variance 0 and the factor 1e-5 ** -0.5 = 316.
    for actual, expected in ((sums[0], dgamma), (sums[1], dbeta), (device_dx, dy)):
        near(actual, expected, 300 * TOLERANCE[dtype])


@needs_compiler
@real_types
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("steps", [1, 9, 140])
def test_softmax_is_that_of_the_reference(steps, causal, ends, dtype, device):
    rng, (samples, heads) = np.random.default_rng(0), (2, 2)
    s, dp = draw(rng, dtype, samples * heads, steps, steps), draw(rng, dtype, samples * heads, steps, steps)
    lengths = np.array([(steps + 1) // 2, steps], np.int32)
    p = s.copy()
    OPS.softmax(p, 0.7, causal, heads, lengths if ends else None)
    assert np.allclose(p.sum(axis=2), 1, atol=1e-6)
    device_p, lengths_address = device.of(s), Address(device.of(lengths).ctypes.data) if ends else None
    device("softmax", (len(s) * steps,), (128,), steps, heads, int(causal), 0.7, lengths_address, device_p)
    near(device_p, p, TOLERANCE[dtype])
    device_p[...], out = p, device.of(dp)
    OPS.softmax_back(p, 0.7, dp)
    device("softmax_back", (len(s) * steps,), (128,), steps, 0.7, device_p, out)
    near(out, dp, TOLERANCE[dtype])


@needs_compiler
@real_types
def test_gelu_and_last_steps_are_those_of_the_reference(dtype, device):
    rng = np.random.default_rng(0)
    x, dy = draw(rng, dtype, 300) * 5, draw(rng, dtype, 300)
    x[7], y, dx = np.nan, np.empty_like(x), dy.copy()
    OPS.gelu(x, y)
    OPS.gelu_back(x, dx)
    device_y, device_x, out = device.array((300,)), device.of(x), device.of(dy)
    device("gelu", (3,), (32,), 300, device_x, device_y)
    near(device_y, y, TOLERANCE[dtype])
    device("gelu_back", (3,), (32,), 300, device_x, out)
    near(out, dx, TOLERANCE[dtype])
    x, last = dy.reshape(5, 6, 10), np.empty((5, 10), dtype)
    lengths = np.array([1, 6, 3, 4, 5, 2, 1, 6, 6, 3], np.int32)
    OPS.last_steps(x, lengths, last)
    assert np.array_equal(last, x[:, lengths - 1, np.arange(10)])
    device_last, last_dx = device.array((5, 10)), np.empty_like(x)
    lengths_address = Address(device.of(lengths).ctypes.data)
    device("last_steps", (2,), (32,), 5, 6, 10, device.of(x), lengths_address, device_last)
    near(device_last, last, 0)
    OPS.last_steps_back(last, lengths, last_dx)
    device_last_dx = device.array(x.shape)
    device("last_steps_back", (3,), (32,), 5, 6, 10, device.of(last), lengths_address, device_last_dx)
    near(device_last_dx, last_dx, 0)


@needs_compiler
@real_types
@pytest.mark.parametrize("m", [1, 33, 700])
def test_rows_of_unit_length_are_those_of_the_reference(m, dtype, device):
    rng = np.random.default_rng(0)
    w, g = draw(rng, dtype, 2, 3, m + 1), draw(rng, dtype, 4, 2, 3, m + 1)
    expected, gradient = np.empty((2, 3), dtype), g.copy()
    OPS.row_factors(w[..., :m], 0.5, 3.0, expected)
    OPS.project_rows(w[..., :m], expected, 3.0, gradient[..., :m])
    device_w, device_factors, out = device.of(w), device.array((2, 3)), device.of(g)
    steps = (3 * (m + 1), m + 1)
    device("row_factors", (6,), (256,), 3, m, device_w, *steps, 0.5, 3.0, device_factors)
    near(device_factors, expected, TOLERANCE[dtype])
    device("project_rows", (6, 4), (256,), 3, m, device_w, *steps, device_factors, 3.0, out, 6 * (m + 1), *steps)
    near(out, gradient, 30 * TOLERANCE[dtype])
    w[1, 2] = np.finfo(dtype).max / 4
    device("row_factors", (6,), (256,), 3, m, device.of(w), *steps, 0.5, 3.0, device_factors)
    assert np.isnan(device_factors).tolist() == [[False] * 3, [False, False, True]]


@needs_compiler
@pytest.mark.parametrize("dtype", [F32], ids=str)
def test_long_rows_lose_no_digits(dtype, device):
    """Rows of numbers of one size: a sum one by one would round in the same direction at each step."""
    m = 400_000
    x = np.where(np.random.default_rng(0).random((1, m)) < 0.5, F32.type(0.7), F32.type(-0.7)) + F32.type(8)
    exact_x = x.astype(np.float64)
    exact = 1 / np.sqrt(exact_x.var(axis=1) + 1e-5)
    normal, scale = device.of(x), device.array((1,))
    device("normalize", (1,), (256,), m, normal, 1e-5, normal, scale)
    assert abs(scale / exact - 1).max() <= 1e-6
    assert abs(normal - (exact_x - exact_x.mean(axis=1)) * exact).max() <= 2e-6
    signs = np.sign(normal) * F32.type(0.7)
    dy, gamma, sums = device.of(signs), device.of(np.ones(1, F32)), [device.array((1,)) for _ in range(2)]
    device("normalize_back", (1,), (256,), m, normal, scale, gamma, normal, dy, 0, *sums)
    assert abs(sums[0] / (signs.astype(np.float64) * normal).sum() - 1).max() <= 1e-6
    ones, partial, total = device.of(np.full((1, m), F32.type(0.7))), device.array((1, 2)), device.array((1,))
    device("finish_back", (1, 2), (256,), 1, 1, m, ones, ones, partial, 2, 0)
    device("row_sums", (1,), (64,), 1, 1, 2, partial, total, 1, 1)
    assert abs(total / (ones.astype(np.float64).sum()) - 1).max() <= 1e-6
    images, totals = device.of(np.full((1, m, 2), F32.type(0.7))), device.array((1, 2))
    device("position_sums", (1,), (64,), 1, m, 2, images, totals)
    assert abs(totals / (0.7 * m) - 1).max() <= 1e-6


@needs_compiler
@real_types
@pytest.mark.parametrize("batch", [1, 3, 33])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 7, 8), (5, 4, 9)], ids=str)
def test_pooling_is_that_of_the_reference(shape, size, batch, dtype, device):
    channels, height, width = shape
    rng = np.random.default_rng(0)
    # Few different numbers, so that many are equal.
    x = rng.integers(-3, 3, (channels, height, width, batch)).astype(dtype)
    x[0, 0, 0, 0] = np.nan
    x[-1, :size, :size, -1] = -np.inf
    pooled = (channels, height // size, width // size, batch)
    dims, dy = (channels, height, width, batch, size), draw(rng, dtype, *pooled)
    x, dy = device.of(x), device.of(dy)
    for kind, activation in enumerate(KINDS):
        for name in ("mean_pool", "max_pool"):
            expected, out = np.empty(pooled, dtype), device.array(pooled)
            getattr(OPS, name)(x, size, expected)
            OPS.activate(activation, expected)
            device(name, (3,), (32,), *dims, x, out, kind)
            near(out, expected, TOLERANCE[dtype])
    expected, out = np.empty_like(x), device.array(x.shape)
    OPS.mean_pool_back(dy, size, expected)
    device("mean_pool_back", (3,), (32,), *dims, dy, out)
    near(out, expected, TOLERANCE[dtype])
    moves = np.stack([*rng.integers(1 - height, height, (1, batch)), *rng.integers(1 - width, width, (1, batch)),
                      *rng.integers(0, 2, (1, batch))]).astype(np.int32)  # fmt: skip
    for reflect in (0, 1):
        moved, out = np.empty_like(dy := draw(rng, dtype, *x.shape)), device.array(x.shape)
        OPS.move_images(dy, moves, bool(reflect), moved)
        device("move_images", (3,), (32,), *dims[:4], device.of(moves), reflect, device.of(dy), out)
        assert np.array_equal(out, moved)
    dy = device.of(draw(rng, dtype, *pooled))
    out = device.array(x.shape)
    OPS.max_pool_back(x, np.empty(pooled, dtype), dy, size, expected)
    device("max_pool_back", (3,), (32,), *dims, x, dy, out)
    assert np.array_equal(out, expected)


@needs_compiler
@real_types
@pytest.mark.parametrize("pool", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_folded_kernels_are_those_of_the_reference(k, pool, dtype, device):
    count, rows, n_in, folded_size = 3, 5, 2, k + pool - 1
    rng = np.random.default_rng(0)
    # A bias follows each row of weights, and three other numbers follow each stripe.
    row_step = n_in * k * k + 1
    step = rows * row_step + 3
    flat = device.of(draw(rng, dtype, count * step))

    def kernels(vector):
        return vector.reshape(count, step)[:, : rows * row_step].reshape(count, rows, row_step)[:, :, : n_in * k * k]

    w = kernels(flat).reshape(count, rows, n_in, k, k)
    shape = (count, rows, n_in, folded_size, folded_size)
    expected, out = np.empty(shape, dtype), device.array(shape)
    OPS.fold(w, pool, expected)
    device("fold", (2,), (64,), count, rows, n_in, k, pool, flat, step, row_step, out)
    near(out, expected, TOLERANCE[dtype])

    dfolded, dw = device.of(draw(rng, dtype, *expected.shape)), np.empty_like(w)
    OPS.unfold(dfolded, pool, dw)
    expected_vector, out = flat.copy(), device.of(flat)
    kernels(expected_vector)[...] = dw.reshape(count, rows, -1)
    device("unfold", (2,), (64,), count, rows, n_in, k, pool, dfolded, out, step, row_step)
    near(out, expected_vector, TOLERANCE[dtype])


def one_sample(loss, scores, labels, pairs):
    """The loss of each sample by itself."""
    return np.array([loss(scores[:, [b]].copy(), labels[[b]], 1.0, pairs=pairs) for b in range(len(labels))])


@needs_compiler
@real_types
@pytest.mark.parametrize("batch", [1, 3, 33, 300])
@pytest.mark.parametrize("size", [1.0, 60.0, 1000.0, 1e30])
@pytest.mark.parametrize(
    ("name", "paired"), [(name, paired) for name in FUSED for paired in (False, True)[: 1 + LOSSES[name].pairwise]]
)
def test_losses_are_those_of_the_reference(name, paired, size, batch, dtype, device):
    classes, scale, kappa = 7, 0.125, 1.5
    kind, loss = FUSED.index(name), make_loss(name, dtype, kappa=kappa)
    limit = largest_exponent(dtype)
    rng = np.random.default_rng(0)
    scores, labels = draw(rng, dtype, classes, batch) * dtype.type(size), rng.integers(0, classes, batch)
    pairs = rng.random((classes, classes)) < 0.5 if paired else None
    if paired:
        pairs |= pairs.T
    grad, out, samples = np.empty((classes, batch)), device.array((classes, batch), F64), device.array((3, batch), F64)
    value = loss(scores, labels, scale, grad, pairs)
    z = np.zeros((classes, batch))
    if name == "psl":
        z = (scores.astype(F64) - scores.astype(F64)[labels, np.arange(batch)]) * kappa
        if paired:
            z[~pairs[:, labels]] = -np.inf
    worst, clipped = z.max(axis=0, initial=0.0), (z > limit).sum(axis=0)
    assert loss.clipped == clipped.sum()

    scores, labels = device.of(scores), device.of(labels)
    table = None if pairs is None else device.of(pairs, np.uint8)
    settings = (classes, batch, scores, labels, scale, kappa, limit, 0, loss.offset(classes))
    device("losses", (2,), (64,), kind, *settings, table, None, out, None, samples)
    tolerance = TOLERANCE[F64]
    near(out, grad, tolerance)
    if dtype == F32 or size < 1e30:
        near(samples[0], one_sample(loss, scores, labels, pairs), tolerance)
    else:
        # Terms of psl are limited by the size of the minibatch. The comparison of the sum is below.
        assert np.isfinite(samples[0]).all()
    near(samples[1], worst, tolerance)
    assert np.array_equal(samples[2], clipped)
    # Without derivatives the kernel has the same results.
    repeated = device.array((3, batch), F64)
    device("losses", (2,), (64,), kind, *settings, table, None, None, None, repeated)
    assert np.array_equal(repeated, samples)

    report = device.array((4,), F64)
    for derivatives in (None, out):
        device("loss_report", (1,), (256,), classes, batch, samples, derivatives, scale, report)
        largest = 0 if derivatives is None else abs(grad).max()
        for actual, number in zip(report, [value, worst.max(initial=0.0), clipped.sum(), largest], strict=True):
            assert actual == pytest.approx(number, rel=tolerance, abs=0)
    cast = device.array((classes, batch))
    device("cast_scores", (2,), (64,), cast.size, out, cast, report)
    expected = np.empty_like(cast)
    OPS.cast_scores(grad, expected, report)
    near(cast, expected, TOLERANCE[dtype])
    assert abs(cast).max() <= 2.0**20
    g = draw(rng, dtype, 1000)
    expected_g, device_g = g.copy(), device.of(g)
    OPS.unscale(expected_g, report, LIMIT[dtype])
    device("unscale", (2,), (64,), g.size, device_g, report, LIMIT[dtype])
    near(device_g, expected_g, TOLERANCE[dtype])
    assert np.isfinite(device_g).all()


@needs_compiler
@real_types
@pytest.mark.parametrize("cuts", [(7,), (4, 3), (1, 6), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("size", [1.0, 60.0])
@pytest.mark.parametrize("name", FUSED)
def test_losses_of_some_classes_are_those_of_the_reference(name, size, cuts, dtype, device):
    """Summaries, their merge, terms and the close, for each rank's classes."""
    classes, batch, scale, kind = sum(cuts), 33, 0.125, FUSED.index(name)
    rng, limit = np.random.default_rng(0), largest_exponent(dtype)
    scores, labels = draw(rng, dtype, classes, batch) * dtype.type(size), rng.integers(0, classes, batch)
    loss = make_loss(name, dtype, kappa=1.5, outputs=classes)
    starts = np.cumsum([0, *cuts])
    spans = [slice(a, b) for a, b in pairwise(starts.tolist())]
    summaries, tolerance = [], 10 * TOLERANCE[F64]
    for at in spans:
        expected, c, y = (
            loss.summarize(scores[at], labels - at.start),
            device.of(scores[at]),
            device.of(labels - at.start),
        )
        summary = expected
        if (loss.sums and len(expected) != at.stop - at.start) or not loss.gathers:
            summary = device.array(expected.shape, F64)
            device("normalizers" if loss.gathers else "label_scores", (2,), (64,), len(c), batch, c, y, summary)
            near(summary, expected, tolerance)
        summaries.append(summary)
    rests, parts = [], []
    for at in spans:
        c, y, merged = device.of(scores[at]), device.of(labels - at.start), None
        if loss.gathers:
            gathered, first = device.of(np.concatenate(summaries).astype(dtype)), device.of(starts - at.start)
            merged = device.array((3, batch), F64)
            device("merge_normalizers", (2,), (64,), len(cuts), batch, gathered, first, y, merged)
            near(merged, loss.merge(gathered, first.tolist(), y), tolerance)
        elif loss.sums:
            merged = device.of(sum(summaries))
        grad, rest, device_rest = np.empty(c.shape), np.zeros(batch), device.array(batch, F64)
        value = loss.terms(c, y, scale, merged, grad, rest)
        out, samples, report = device.array(c.shape, F64), device.array((3, batch), F64), device.array((4,), F64)
        settings = (len(c), batch, c, y, scale, 1.5, limit, 0, loss.offset(len(c)))
        rest_out = device_rest if "terms" in loss.sums else None
        device("losses", (2,), (64,), kind, *settings, None, merged, out, rest_out, samples)
        device("loss_report", (1,), (256,), len(c), batch, samples, out, scale, report)
        near(out, grad, tolerance)
        assert report[0] == pytest.approx(value, rel=tolerance, abs=1e-300)
        if rest_out is not None:
            near(device_rest, rest, tolerance)
        rests.append(rest)
        parts.append((at, y, grad, out, report))
    rest = sum(rests)
    for at, y, grad, out, report in parts if "terms" in loss.sums else ():
        loss.close(grad, labels - at.start, rest, scale)
        device("close_losses", (2,), (64,), len(out), batch, y, device.of(rest), out)
        device("close_report", (1,), (256,), out.size, batch, out, device.of(rest), report)
        near(out, grad, tolerance)
        assert report[3] == pytest.approx(abs(grad).max(), rel=tolerance) and np.isfinite(report[0])
        device("close_report", (1,), (256,), out.size, batch, out, device.of(np.where(rest < 0, rest, np.inf)), report)
        assert np.isnan(report[0])


@needs_compiler
@real_types
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_normalizer_that_is_no_number_is_a_loss_that_is_none_on_ranks_without_the_label(row, dtype, device):
    scores, labels, normalizers = device.of(np.zeros((2, 3), dtype)), device.of(np.full(3, 5)), np.ones((3, 3))
    normalizers[row, 1] = np.inf
    out, samples = device.array((2, 3), F64), device.array((3, 3), F64)
    settings = (2, 3, scores, labels, 1.0, 1.0, 88.0, 0, 0.0)
    device("losses", (1,), (32,), FUSED.index("nll"), *settings, None, device.of(normalizers), out, None, samples)
    assert np.isnan(samples[0]).tolist() == [False, True, False] and samples[0, 0] == 0


@needs_compiler
@real_types
def test_an_exponent_past_the_limit_is_told_to_all_where_it_is_an_error(dtype, device):
    scores, label_scores = device.of(np.full((2, 3), 200, dtype)), device.of(np.array([[0.0, 150, 150]]))
    labels, rest = device.of(np.full(3, 5)), device.array(3, F64)
    out, samples = device.array((2, 3), F64), device.array((3, 3), F64)
    for strict in (0, 1):
        settings = (2, 3, scores, labels, 1.0, 1.0, 88.0, strict, 0.0)
        device("losses", (1,), (32,), 0, *settings, None, label_scores, out, rest, samples)
        assert np.isinf(rest).tolist() == [bool(strict), False, False]


@needs_compiler
@real_types
@pytest.mark.parametrize("batch", [1, 3, 300])
@pytest.mark.parametrize("units", [1, 7, 40])
def test_distances_are_those_of_the_reference(units, batch, dtype, device):
    classes, scale, rng = 7, 0.125, np.random.default_rng(0)
    loss = TargetDistance(rng.normal(size=(units, classes)), 2.0)
    outputs, labels = device.of(draw(rng, dtype, units, batch)), device.of(rng.integers(0, classes, batch))
    targets, report = device.of(loss.targets), device.array((4,), F64)
    for bad in (False, True):
        if bad:
            outputs[-1, -1] = np.nan
        grad = np.empty((units, batch))
        value = loss(outputs, labels, scale, grad)
        for count in (1, 3):
            out, partial = device.array((units, batch), F64), device.array((4, count), F64)
            shape = (classes, batch, outputs.size)
            device("distances", (count,), (256,), *shape, outputs, targets, labels, scale * loss.share, out, partial)
            near(out, grad, TOLERANCE[F64])
            device("loss_report", (1,), (256,), 1, count, partial, partial[3], scale * loss.share, report)
            assert np.array_equal(report[1:3], [0, 0])
            assert report[[0, 3]] == pytest.approx([value, abs(grad).max()], rel=1e-12, nan_ok=True)


@needs_compiler
@real_types
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", FUSED)
def test_a_score_that_is_no_number_shows(name, bad, dtype, device):
    classes, batch = 5, 40
    rng = np.random.default_rng(0)
    for where in ("label", "other"):
        scores, labels = draw(rng, dtype, classes, batch), rng.integers(0, classes, batch)
        scores[labels[7] if where == "label" else (labels[7] + 1) % classes, 7] = bad
        scores, labels = device.of(scores), device.of(labels)
        grad, samples = device.array((classes, batch), F64), device.array((3, batch), F64)
        kind, report = FUSED.index(name), device.array((4,), F64)
        limit = largest_exponent(dtype)
        settings = (classes, batch, scores, labels, 1.0, 1.0, limit, 0, 0.0)
        device("losses", (1,), (64,), kind, *settings, None, None, grad, None, samples)
        device("loss_report", (1,), (256,), classes, batch, samples, grad, 1.0, report)
        if name == "psl":
            assert not report[1] < np.inf and not samples[1, 7] < np.inf
            if np.isnan(bad):
                assert np.isnan(samples[1, 7]) and np.isnan(report[1])
        elif (name != "logistic" and (name, where) != ("bce", "label")) or np.isnan(bad):
            assert not np.isfinite(report[0])
        if np.isnan(bad):
            assert np.isnan(report[3])
            assert np.isnan(samples[0, 7]) and np.isnan(report[0])
        assert np.isfinite(np.delete(samples, 7, axis=1)).all() and np.isfinite(np.delete(grad, 7, axis=1)).all()


@needs_compiler
@real_types
@pytest.mark.parametrize("name", FUSED)
def test_losses_are_as_the_reference_has_them_where_it_has_them(name, dtype, device):
    # A score of -inf of another class: psl and similar losses are finite.
    scores = np.zeros((4, 2), dtype)
    scores[3, 1] = -np.inf
    labels, kind = np.array([1, 0]), FUSED.index(name)
    grad, limit = np.empty(scores.shape), largest_exponent(dtype)
    with np.errstate(all="ignore"):
        value = make_loss(name, dtype)(scores, labels, 1.0, grad)
    scores, labels, out = device.of(scores), device.of(labels), device.array(grad.shape, F64)
    samples = device.array((3, 2), F64)
    settings = (4, 2, scores, labels, 1.0, 1.0, limit, 0, make_loss(name, dtype).offset(4))
    device("losses", (1,), (32,), kind, *settings, None, None, out, None, samples)
    assert samples[0].sum() == pytest.approx(value, rel=1e-12, nan_ok=True)
    near(out[np.isfinite(grad)], grad[np.isfinite(grad)], 1e-12)


@needs_compiler
@real_types
@pytest.mark.parametrize("peak", [0.0, 1.0, 2.0**20, 2.0**20 + 1, 3e25, 2.0**700, 1.7e308])
def test_large_derivatives_are_scaled_by_the_power_of_two_of_the_reference(peak, dtype, device):
    rng = np.random.default_rng(0)
    grad = rng.uniform(-1, 1, 99)
    grad[5] = -1
    grad *= peak
    grad, report, out = device.of(grad), device.of([0.0, 0.0, 0.0, peak]), device.array(99)
    expected = np.empty_like(out)
    OPS.cast_scores(grad, expected, report)
    device("cast_scores", (1,), (64,), 99, grad, out, report)
    assert np.array_equal(out, expected)
    assert abs(out).max() == (peak if peak <= 2.0**20 else np.frexp(dtype.type(np.frexp(peak)[0]))[0])
    g = draw(rng, dtype, 99)
    g[3] = np.nan
    device_g = device.of(g)
    with np.errstate(over="ignore"):
        OPS.unscale(g, report, LIMIT[dtype])
    device("unscale", (1,), (64,), 99, device_g, report, LIMIT[dtype])
    assert np.array_equal(device_g, g, equal_nan=True)


@needs_compiler
@real_types
def test_components_are_bounded(dtype, device):
    g = device.of(np.array([5.0, -6.0, np.inf, -np.inf, np.nan, 1.0], dtype))
    expected = g.copy()
    OPS.bound(expected, 4.0)
    device("bound", (1,), (64,), 6, g, 4.0)
    assert np.array_equal(g, expected, equal_nan=True) and expected.tolist()[:4] == [4.0, -4.0, 4.0, -4.0]


@needs_compiler
@real_types
def test_derivatives_without_a_finite_peak_are_cast_as_they_are(dtype, device):
    grad, out = device.of(np.array([1.0, np.nan, -2.0])), device.array(3)
    for peak in (np.nan, np.inf):
        report = device.of([0.0, 0.0, 0.0, peak])
        device("cast_scores", (1,), (64,), 3, grad, out, report)
        assert np.array_equal(out, grad.astype(dtype), equal_nan=True)
        g = device.of(np.array([5.0, 6.0], dtype))
        device("unscale", (1,), (64,), 2, g, report, 1.0)
        assert g.tolist() == [5.0, 6.0]


@needs_compiler
@real_types
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("name", "counted"),
    [*((name, False) for name in ("sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop", "lion")), ("adam", True),
     ("adamw", True)],
)  # fmt: skip
def test_steps_are_those_of_the_optimizers(name, counted, decay, dtype, device):
    n, lr = 1003, 0.05
    rng = np.random.default_rng(0)
    # Small betas, so that moments change much in a few steps.
    hyper = Hyper(momentum=0.9, beta1=0.5, beta2=0.8, weight_decay=decay)
    optimizer = make_optimizer(name, n, dtype, hyper, counted=counted)
    if counted:
        optimizer.vectors["t"][:] = rng.integers(0, 9, n)
    w = draw(rng, dtype, n)
    device_w, state = device.of(w), [device.of(v) for v in optimizer.vectors.values()]
    for t in range(1, 6):
        g = draw(rng, dtype, n)
        g[::7] = 0
        gradient = device.of(g)
        optimizer.step(w, g, lr, lambda a: a)
        if name == "sgd":
            device("sgd", (3,), (64,), n, device_w, gradient, lr, decay)
        elif name in ("momentum", "nesterov"):
            nesterov = int(name == "nesterov")
            device("momentum", (3,), (64,), n, device_w, gradient, *state, lr, hyper.momentum, decay, nesterov)
        elif name == "rmsprop":
            device("rmsprop", (3,), (64,), n, device_w, gradient, *state, lr, hyper.alpha, hyper.eps, decay)
        elif name == "lion":
            constants = (lr, hyper.beta1, hyper.beta2, 0.0, 1 - lr * decay)
            device("lion", (3,), (64,), n, device_w, gradient, *state, *constants)
        else:
            l2, keep = (decay, 1.0) if name == "adam" else (0.0, 1 - lr * decay)
            constants = (hyper.beta1, hyper.beta2, hyper.eps, l2, keep)
            if counted:
                rates = (lr, log(hyper.beta1), log(hyper.beta2))
            else:
                rates = (lr / (1 - hyper.beta1**t), (1 - hyper.beta2**t) ** -0.5)
            kernel = "counted_adam" if counted else "adam"
            device(kernel, (3,), (64,), n, device_w, gradient, *state, *rates, *constants)
        near(device_w, w, TOLERANCE[dtype])
        for actual, expected in zip(state, optimizer.vectors.values(), strict=True):
            near(actual, expected, TOLERANCE[dtype])


sizes = pytest.mark.parametrize("size", [0, 1, 255, 257, 5001])


@needs_compiler
@real_types
@sizes
def test_scaling_and_multiplying(size, dtype, device):
    g, by = (device.of(draw(np.random.default_rng(seed), dtype, size + 3))[3:] for seed in (0, 1))
    scaled = g * dtype.type(0.3)
    device("scale", (2,), (64,), size, g, 0.3)
    assert np.array_equal(g, scaled)
    OPS.multiply(scaled, by)
    device("multiply", (2,), (64,), size, g, by)
    assert np.array_equal(g, scaled)


@needs_compiler
@real_types
@sizes
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "factors", [(1,), (-1,), (0.3,), (1, -1), (-1, 1), (1e-3, 1), (-1.7, 0.1, -1), (1, 3, -7, 1e30)]
)
def test_sums_of_multiples_have_the_bits_of_the_reference(factors, inside, size, dtype, device):
    rng = np.random.default_rng(0)
    # Sums that overflow in float32, and subnormal numbers.
    scale = 10.0 ** rng.integers(-40, 38, (len(factors), size + 4))
    arrays = [device.of(a) for a in (rng.standard_normal(scale.shape) * scale).astype(dtype)]
    # Terms start at different alignments.
    terms = [(float(factor), a[k:][:size]) for k, (factor, a) in enumerate(zip(factors, arrays, strict=True))]
    out = arrays[0] if inside else device.array(size + 4)
    at, expected = slice(0, size) if inside else slice(3, size + 3), out.copy()
    OPS.combine(expected[at], *((f, expected[at] if inside and k == 0 else a) for k, (f, a) in enumerate(terms)))
    missing = 4 - len(terms)
    device(
        "combine", (3,), (64,), size, out[at], *(a for _, a in terms), *missing * [None], *(f for f, _ in terms),
        *missing * [0.0],
    )  # fmt: skip
    assert out.tobytes() == expected.tobytes()


@real_types
def test_products_and_sums_of_multiples_are_rounded_one_by_one(dtype, tmp_path):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on the path, in CUDA_HOME or in this Python environment")
    ptx = tmp_path / "vector.ptx"
    source = cuda_host.SOURCES / "vector.cu"
    subprocess.run([nvcc, "-std=c++17", "-ptx", f"-DREAL={REALS[dtype]}", "-o", str(ptx), str(source)], check=True)
    kernels = {part.split("(")[0].strip(): part for part in ptx.read_text().split(".visible .entry")[1:]}
    # Without .rn the assembler may fuse a product and a sum.
    assert "mul.rn.f" in kernels["combine"] and "add.rn.f" in kernels["combine"]
    assert "fma" not in kernels["combine"] and "fma" in kernels["dots"]


@needs_compiler
@real_types
@sizes
@pytest.mark.parametrize("pairs", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3)), 4])
def test_scalar_products_and_sums(pairs, size, dtype, device):
    vectors = [device.of(draw(np.random.default_rng(k), dtype, size + k))[k:] for k in range(4)]
    some_pairs = [(vectors[k // 2], vectors[(3 * k + 1) % 4]) for k in range(pairs)]
    expected = [float(a.astype(F64) @ b.astype(F64)) for a, b in some_pairs]
    assert OPS.dots(some_pairs) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    total = float(abs(vectors[3].astype(F64)).sum())
    assert OPS.abs_sum(vectors[3]) == pytest.approx(total, rel=1e-12 if dtype == F64 else 1e-6)
    for grid in (1, 7, 300):
        partial, out = device.array((5, grid), F64), device.array(5, F64)
        arrays = [array for pair in some_pairs for array in pair] + (8 - 2 * pairs) * [None]
        device("dots", (grid,), (256,), size, *arrays, partial)
        device("abs_sum", (grid,), (256,), size, vectors[3], partial[4:])
        device("sum_partials", (5,), (256,), grid, partial, out)
        assert out[:pairs] == pytest.approx(expected, rel=1e-12, abs=1e-12) and np.isnan(out[pairs:4]).all()
        assert out[4] == pytest.approx(total, rel=1e-13)


@needs_compiler
@real_types
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 32), (33, 5), (5, 33), (100, 70)])
def test_matrices_are_turned(device, dtype, rows, columns):
    values = np.random.default_rng(0).normal(size=(rows, columns)).astype(dtype)
    transposed = device.array((columns, rows))
    device("turn", (blocks(rows, 32) * blocks(columns, 32),), (32, 8), rows, columns, device.of(values), transposed)
    assert np.array_equal(transposed, values.T)


@needs_compiler
@real_types
@pytest.mark.parametrize("values", [np.uint8, np.float32, np.float64], ids=lambda t: t.__name__)
@pytest.mark.parametrize(("batch", "features"), [(1, 1), (3, 70), (33, 32), (100, 95)])
def test_minibatches_are_gathered(batch, features, values, dtype, device):
    rng = np.random.default_rng(0)
    data = device.of((rng.random((57, features)) * 255).astype(values))
    at, scale = device.of(rng.integers(0, 57, batch)), device.of(draw(rng, dtype, features))
    out = device.array((features, batch))
    name = {np.uint8: "gather_u8", np.float32: "gather_f32", np.float64: "gather_f64"}[values]
    device(name, (blocks(batch, 32), blocks(features, 32)), (32, 8), batch, features, at, data, scale, out)
    assert np.array_equal(out, data[at].astype(dtype).T * scale[:, None])


@needs_compiler
@real_types
@pytest.mark.parametrize(("batch", "features", "share"), [(1, 1, 1), (3, 70, 0.3), (33, 400, 0.9), (100, 95, 0)])
def test_minibatches_are_made_of_compressed_rows(batch, features, share, dtype, device):
    rng = np.random.default_rng(0)
    dense = (rng.random((57, features)) < share) * draw(rng, dtype, 57, features)
    rows, columns = np.nonzero(dense)
    starts = device.of(np.searchsorted(rows, np.arange(58)))
    at, columns, values = device.of(rng.integers(0, 57, batch)), device.of(columns, np.int32), dense[rows, columns]
    out = device.array((features, batch), fill=0)
    device("fill_compressed", (blocks(batch, 2),), (64,), batch, at, starts, columns, device.of(values), out)
    assert np.array_equal(out, dense[at].T)


# The launcher itself.


@needs_compiler
def test_arguments_that_a_gpu_would_misread_are_refused():
    kernels, array = cuda_host.load("float"), np.zeros(8, np.float32)
    at = Address(array.ctypes.data)

    def launch(*args, name="scale", grid=(1,), block=(32,)):
        kernels.launch(name, grid, block, args)

    launch(8, at, 2.0)
    assert kernels.kernels["scale"] == ["long long", "T*", "double"]
    for wrong in (
        (8.0, at, 2.0), (8, at, 2), (True, at, 2.0), (np.int64(8), at, 2.0), (8, at, np.float64(2)), (at, at, 2.0),
        (8, int(at), 2.0), (8, array, 2.0), (8, at), (8, at, 2.0, 1), (None, at, 2.0), (8, at, None),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="scale"):
            launch(*wrong)
    for shape in (
        {"block": (1025,)}, {"block": (32, 33)}, {"block": (1, 1, 65)}, {"grid": (0,)}, {"grid": (1, 65536)},
        {"grid": (1, 1, 65536)}, {"grid": (2**31,)}, {"block": (0,)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="scale"):
            launch(8, at, 2.0, **shape)
    for shape in ({"grid": 1}, {"grid": (1, 1, 1, 1)}, {"block": (32.0,)}, {"grid": (np.int64(1),)}):
        with pytest.raises(TypeError, match="scale"):
            launch(8, at, 2.0, **shape)
    with pytest.raises(KeyError):
        launch(name="unknown")
    # Integers of 64 bits are passed on unchecked, larger ones are refused.
    launch(-1, at, 2.0)
    with pytest.raises(ValueError, match="64-bit"):
        launch(2**63, at, 2.0)


@needs_compiler
def test_all_threads_get_the_sum_of_a_block_again_and_again(tmp_path, monkeypatch):
    (tmp_path / "try.cu").write_text(
        f'#include "{cuda_host.SOURCES / "common.cuh"}"'
        """
        extern "C" __global__ void sums(double *out) {
            __shared__ double room[64];
            for (int k = 0; k < 3; k++) {
                out[(2 * k) * 64 + threadIdx.x] = block_sum<64>(threadIdx.x + (double)k, room);
                out[(2 * k + 1) * 64 + threadIdx.x] = block_max<64>((threadIdx.x + 21 * k) % 64 + 0.5 * k, room);
            }
        }
        """
    )
    monkeypatch.setattr(cuda_host, "SOURCES", tmp_path)
    kernels = cuda_host.load.__wrapped__("double")
    for kernels.reverse in (False, True):
        sums = np.full((3, 2, 64), np.nan)
        kernels.launch("sums", (1,), (64,), (Address(sums.ctypes.data),))
        assert (sums == np.array([[[2016 + 64 * k], [63 + 0.5 * k]] for k in range(3)])).all()


@needs_compiler
def test_barriers_shared_memory_and_ended_threads(tmp_path, monkeypatch):
    (tmp_path / "try.cu").write_text(
        """
        extern "C" __global__ void turn(long long n, long long *out) {
            __shared__ long long room[256];
            if (threadIdx.x == 5) return;
            for (int k = 0; k < 3; k++) {
                room[threadIdx.x] = threadIdx.x + k;
                __syncthreads();
                out[blockIdx.x * 3 * n + k * n + threadIdx.x] = room[(threadIdx.x + 1) % n];
                __syncthreads();
            }
        }
        extern "C" __global__ void split(long long *out) {
            if (threadIdx.x < 3) __syncthreads(); else
                __syncthreads();
            out[threadIdx.x] = 1;
        }
        extern "C" __global__ void same(long long *out) {
            for (int k = 0; k < (int)threadIdx.x; k++) __syncthreads();
            out[threadIdx.x] = 1;
        }
        extern "C" __global__ void unset(double *out) { __shared__ double room[8]; out[threadIdx.x] = room[threadIdx.x];
            room[threadIdx.x] = 1; }
        """
    )
    monkeypatch.setattr(cuda_host, "SOURCES", tmp_path)
    kernels: Kernels = cuda_host.load.__wrapped__("double")
    for kernels.reverse in (False, True):
        out = np.full((4, 3, 200), -1)
        kernels.launch("turn", (4,), (200,), (200, Address(out.ctypes.data)))
        expected = (np.arange(200) + 1) % 200 + np.arange(3)[:, None]
        # Thread 5 ends early: its element of `out`, and the shared element that thread 4 reads, are never set.
        expected[:, 4] = -1
        expected[:, 5] = -1
        assert np.array_equal(out, np.broadcast_to(expected, out.shape))
        with pytest.raises(RuntimeError, match="different barriers"):
            kernels.launch("split", (1,), (8,), (Address(out.ctypes.data),))
        kernels.launch("same", (1,), (8,), (Address(out.ctypes.data),))
        assert (out[0, 0, :8] == 1).all()
        numbers = np.zeros(8)
        kernels.launch("unset", (2,), (8,), (Address(numbers.ctypes.data),))
        assert np.isnan(numbers).all()
