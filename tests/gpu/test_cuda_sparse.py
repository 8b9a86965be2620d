"""The CUDA kernels of sparse layers, on the CPU, and the product made of them on a stand-in for CuPy."""

import numpy as np
import pytest
from helpers import cuda_host
from helpers.sparse_products import index_of, some_pattern
from test_cuda_kernels import TOLERANCE, Guarded, near, real_types, some
from test_device import cupy, put  # noqa: F401

from psmpi.backend import CupyOps, NumpyOps

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no g++ to run the CUDA kernels on the CPU")


@real_types
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 70])
def test_kernels_of_sparse_products_are_the_reference(batch, bias, dtype):
    rng, pattern, device = np.random.default_rng(0), some_pattern(13, 11, 0.3), Guarded(dtype)
    one, size = index_of(pattern, rng, bias)
    w, x, dy = (some(rng, dtype, *shape) for shape in ((size,), (11, batch), (13, batch)))
    y, dx, g = np.empty_like(dy), np.empty_like(x), np.full(size, 7, dtype)
    NumpyOps().sparse_product(one, dtype).forward(w, x, y)
    NumpyOps().sparse_product(one, dtype).backward(w, x, dy, dx, g)
    biases = None if one.biases is None else device.of(one.biases)
    ahead = *map(device.of, (one.starts, one.columns, one.places)), biases
    behind = tuple(map(device.of, (one.back_starts, one.back_rows, one.back_places)))
    w, x, dy = map(device.of, (w, x, dy))
    found = device.array(y.shape), device.array(dx.shape), device.of(np.full(size, 7, dtype))
    device("sparse_forward", (2,), (64,), *y.shape, *ahead, w, x, found[0])
    device("sparse_inputs", (2,), (64,), *dx.shape, *behind, w, dy, found[1])
    device("sparse_weights", (3, 2), (32,), *dx.shape, *behind, x, dy, found[2])
    if bias:
        device("sparse_biases", (5,), (32,), *y.shape, biases, dy, found[2])
    for mine, expected in zip(found, (y, dx, g), strict=True):
        near(mine, expected, TOLERANCE[dtype])


@real_types
def test_sparse_products_of_the_device_are_the_reference(cupy, dtype):  # noqa: F811
    rng, pattern = np.random.default_rng(0), some_pattern(13, 11, 0.3)
    for bias in (True, False):
        one, size = index_of(pattern, rng, bias)
        arrays = [some(rng, dtype, *shape) for shape in ((size,), (11, 9), (13, 9))]
        results = []
        for ops in (NumpyOps(), CupyOps()):
            product = ops.sparse_product(one, dtype)
            w, x, dy = (put(ops, array) for array in arrays)
            y, dx, g = (put(ops, np.full_like(like, 7)) for like in (arrays[2], arrays[1], arrays[0]))
            product.forward(w, x, y)
            product.backward(w, x, dy, dx, g)
            results.append([ops.host(array) for array in (y, dx, g)])
            bare = put(ops, np.full_like(arrays[1], 7))
            product.backward(w, x, dy, bare, None)
            assert np.array_equal(ops.host(bare), results[-1][1])
        for mine, expected in zip(results[1], results[0], strict=True):
            near(mine, expected, TOLERANCE[dtype])
