"""Recurrent cells on a stand-in for CuPy, and on a GPU where there is one, against the reference."""

import numpy as np
import pytest
from helpers import cuda_host
from test_device import TOLERANCE, cupy, put, relative_error  # noqa: F401

from psmpi.backend import CupyOps, NumpyOps

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no g++ to compile the CUDA kernels as C++")


def passes(ops, cells, arrays, u, lengths):
    """Run forward and backward; return copies of the arrays of the forward pass, then of the gradients."""
    a, bias, before, dh, carry = (None if array is None else put(ops, array) for array in arrays)
    h = put(ops, np.full(dh.shape, np.nan, dh.dtype))
    kept = put(ops, np.full((cells.kept, *dh.shape), np.nan, dh.dtype))
    device_lengths = None if lengths is None else put(ops, lengths)
    cells.prepare(put(ops, u))
    cells.forward(a, bias, before, h, kept, device_lengths)
    outputs = [ops.host(array).copy() for array in (h, kept, *([] if cells.kind == "rnn" else [a]))]
    cells.backward(a, before, h, kept, dh, carry, device_lengths)
    return [*outputs, *(ops.host(array).copy() for array in (a, kept, carry))]


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_recurrences_are_those_of_the_reference(cupy, kind, dtype):  # noqa: F811
    """A smaller minibatch after a larger one must not use the larger one's values."""
    rng, units, gpu_ops, host_ops = np.random.default_rng(0), 5, CupyOps(), NumpyOps()
    device, reference = (ops.recurrence(kind, units, dtype) for ops in (gpu_ops, host_ops))
    rows = device.gates * units
    u = (rng.standard_normal((rows, units)) * 0.4).astype(dtype)
    for steps, batch in ((4, 9), (1, 3), (6, 1)):
        shapes = (rows, steps, batch), (rows,), (device.carried, units, batch), (units, steps, batch)
        arrays = [rng.standard_normal(shape).astype(dtype) for shape in (*shapes, shapes[2])]
        for lengths in (None, (np.arange(batch) % (steps + 1)).astype(np.int32)):
            for bias in (arrays[1], None):
                inputs = [arrays[0], bias, *arrays[2:]]
                device_results, host_results = (
                    passes(ops, cells, inputs, u, lengths) for ops, cells in ((gpu_ops, device), (host_ops, reference))
                )
                for actual, expected in zip(device_results, host_results, strict=True):
                    assert actual.shape == expected.shape and not np.isnan(actual).any()
                    assert relative_error(actual, expected) <= TOLERANCE[dtype]
    # Buffers of the largest minibatch, 9 samples: products of forward and backward, and a gradient.
    assert sum(array.size for array in device.arrays()) == (sum({rows, units}) + rows) * 9
