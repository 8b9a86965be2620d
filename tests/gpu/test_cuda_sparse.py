"""CUDA kernels of sparse layers, on the CPU, and the product that launches them, on a stand-in for CuPy."""

import numpy as np
import pytest
from helpers import cuda_host
from helpers.sparse_products import index_of, some_pattern
from test_cuda_kernels import TOLERANCE, Guarded, draw, near, real_types
from test_device import cupy, put  # noqa: F401

from psmpi.backend import CupyOps, NumpyOps

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no g++ to run the CUDA kernels on the CPU")


@real_types
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 70])
def test_kernels_of_sparse_products_are_the_reference(batch, bias, dtype):
    rng, pattern, device = np.random.default_rng(0), some_pattern(13, 11, 0.3), Guarded(dtype)
    index, size = index_of(pattern, rng, bias)
    w, x, dy = (draw(rng, dtype, *shape) for shape in ((size,), (11, batch), (13, batch)))
    y, dx, g = np.empty_like(dy), np.empty_like(x), np.full(size, 7, dtype)
    NumpyOps().sparse_product(index, dtype).forward(w, x, y)
    NumpyOps().sparse_product(index, dtype).backward(w, x, dy, dx, g)
    biases = None if index.biases is None else device.of(index.biases)
    forward_index = *map(device.of, (index.starts, index.columns, index.places)), biases
    backward_index = tuple(map(device.of, (index.back_starts, index.back_rows, index.back_places)))
    w, x, dy = map(device.of, (w, x, dy))
    outputs = device.array(y.shape), device.array(dx.shape), device.of(np.full(size, 7, dtype))
    device("sparse_forward", (2,), (64,), *y.shape, *forward_index, w, x, outputs[0])
    device("sparse_inputs", (2,), (64,), *dx.shape, *backward_index, w, dy, outputs[1])
    device("sparse_weights", (3, 2), (32,), *dx.shape, *backward_index, x, dy, outputs[2])
    if bias:
        device("sparse_biases", (5,), (32,), *y.shape, biases, dy, outputs[2])
    for actual, expected in zip(outputs, (y, dx, g), strict=True):
        near(actual, expected, TOLERANCE[dtype])


@real_types
def test_sparse_products_of_the_device_are_the_reference(cupy, dtype):  # noqa: F811
    rng, pattern = np.random.default_rng(0), some_pattern(13, 11, 0.3)
    for bias in (True, False):
        index, size = index_of(pattern, rng, bias)
        arrays = [draw(rng, dtype, *shape) for shape in ((size,), (11, 9), (13, 9))]
        results = []
        for ops in (NumpyOps(), CupyOps()):
            product = ops.sparse_product(index, dtype)
            w, x, dy = (put(ops, array) for array in arrays)
            y, dx, g = (put(ops, np.full_like(like, 7)) for like in (arrays[2], arrays[1], arrays[0]))
            product.forward(w, x, y)
            product.backward(w, x, dy, dx, g)
            results.append([ops.host(array) for array in (y, dx, g)])
            dx_alone = put(ops, np.full_like(arrays[1], 7))
            product.backward(w, x, dy, dx_alone, None)
            assert np.array_equal(ops.host(dx_alone), results[-1][1])
        for actual, expected in zip(results[1], results[0], strict=True):
            near(actual, expected, TOLERANCE[dtype])
