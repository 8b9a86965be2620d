"""A stand-in for cuDNN's front end, for use with the stand-in for CuPy; it has only the names that psmpi uses.

A graph has one convolution, which NumPy computes when the stream reaches it. It costs the time of `cudnn packed` or
`cudnn strided` in cupy.cuda.clock.costs, and overwrites the workspace. Assertions check the arrays, the order of calls,
and the excluded numerical notes. The variable FAKE_CUDNN names a fault to simulate.
"""

import ctypes
import os
from math import prod
from types import SimpleNamespace

import numpy as np
from cupy import cuda
from numpy.lib.stride_tricks import as_strided, sliding_window_view

FAULT = os.environ.get("FAKE_CUDNN", "")
if FAULT == "import":
    raise ImportError("No module named 'cudnn'")

__version__ = "fake"
# For tests: the dtype and the excluded numerical notes of each graph that was built.
built = []
handles = {}


class cudnnGraphNotSupportedError(RuntimeError):
    pass


data_type = SimpleNamespace(FLOAT=np.dtype(np.float32), DOUBLE=np.dtype(np.float64))
heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
numerical_note = SimpleNamespace(
    NONDETERMINISTIC="NONDETERMINISTIC", TENSOR_CORE="TENSOR_CORE", DOWN_CONVERT_INPUTS="DOWN_CONVERT_INPUTS",
    REDUCED_PRECISION_REDUCTION="REDUCED_PRECISION_REDUCTION",
)  # fmt: skip
WORKSPACE = 4096


def backend_version():
    return 91200


def create_handle():
    if FAULT == "handle":
        raise RuntimeError("cudnnHandle Create failed")
    handle = object()
    handles[handle] = 0
    return handle


def set_stream(handle, stream):
    handles[handle] = stream


class Tensor:
    def __init__(self, dim, stride, data_type):
        self.dim, self.stride, self.data_type, self.output = dim, stride, data_type, False

    def set_output(self, value):
        self.output = value
        return self

    def set_dim(self, value):
        self.dim = value
        return self

    def set_stride(self, value):
        self.stride = value
        return self

    def set_data_type(self, value):
        self.data_type = value
        return self

    def at(self, address):
        if address % 16:
            raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED: misaligned address")
        extent = sum((d - 1) * s for d, s in zip(self.dim, self.stride, strict=True)) + 1
        size = extent * self.data_type.itemsize
        flat = np.frombuffer((ctypes.c_char * size).from_address(address), self.data_type)
        return as_strided(flat, self.dim, [s * self.data_type.itemsize for s in self.stride])


CALLS = (
    "validate", "build_operation_graph", "create_execution_plans", "deselect_numeric_notes",
    "deselect_workspace_greater_than", "check_support", "build_plans",
)  # fmt: skip


class pygraph:
    def __init__(self, name="", io_data_type=None, intermediate_data_type=None, compute_data_type=None, handle=None):
        assert io_data_type is intermediate_data_type is compute_data_type and handles[handle] == cuda.Stream.ptr
        self.real, self.handle, self.calls, self.tensors, self.notes = io_data_type, handle, [], [], []

    def _call(self, name):
        assert name == CALLS[len(self.calls)], f"{name} after {self.calls}"
        if cuda.current().is_capturing():
            raise cuda.CUDARuntimeError("cudaErrorStreamCaptureUnsupported: a graph is built")
        self.calls.append(name)

    def tensor(self, dim, stride, data_type=None, name=""):
        assert data_type is self.real and len(dim) == len(stride) == 4
        assert all(type(number) is int and number > 0 for number in (*dim, *stride))
        self.tensors.append(Tensor(dim, stride, data_type))
        return self.tensors[-1]

    def conv_fprop(self, image, weight, padding, stride, dilation):
        return self._operation("fprop", image, weight, padding, stride, dilation)

    def conv_wgrad(self, image, loss, padding, stride, dilation):
        return self._operation("wgrad", image, loss, padding, stride, dilation)

    def conv_dgrad(self, loss, filter, padding, stride, dilation):
        return self._operation("dgrad", loss, filter, padding, stride, dilation)

    def _operation(self, kind, first, second, padding, stride, dilation):
        assert (padding, dilation) == ([0, 0], [1, 1]) and stride[0] == stride[1] and len(stride) == 2
        assert self.tensors == [first, second]
        self.kind, self.pace = kind, stride[0]
        self.tensors.append(Tensor(None, None, None))
        return self.tensors[-1]

    def validate(self):
        self._call("validate")
        assert self.tensors[2].output and self.tensors[2].data_type is self.real
        x, w, y = self._roles(*(t.dim for t in self.tensors))
        for k in (2, 3):
            if (x[k] - w[k]) // self.pace + 1 != y[k]:
                raise cudnnGraphNotSupportedError(f"{x} {w} {y} with a stride of {self.pace}")
        if x[0] != y[0] or w[0] != y[1] or x[1] % w[1] or y[1] % (x[1] // w[1]):
            raise cudnnGraphNotSupportedError(f"{x} {w} {y}")

    def build_operation_graph(self):
        self._call("build_operation_graph")

    def create_execution_plans(self, heuristics):
        self._call("create_execution_plans")
        assert heuristics == ["A", "FALLBACK"]

    def deselect_numeric_notes(self, notes):
        self._call("deselect_numeric_notes")
        self.notes = notes

    def deselect_workspace_greater_than(self, workspace_limit):
        self._call("deselect_workspace_greater_than")
        assert workspace_limit >= WORKSPACE

    def check_support(self):
        self._call("check_support")
        if FAULT == "build" or (FAULT == "strided" and not self._packed()):
            raise cudnnGraphNotSupportedError("no engine proposed a plan for this graph")

    def build_plans(self):
        self._call("build_plans")
        built.append((self.real, tuple(self.notes)))

    def get_workspace_size(self):
        assert self.calls[-1] == "build_plans"
        return WORKSPACE

    def execute(self, tensor_dict, workspace=None, handle=None):
        assert self.calls[-1] == "build_plans" and handle is self.handle and list(tensor_dict) == self.tensors
        if FAULT == "execute" or (FAULT == "capture" and cuda.current().is_capturing()):
            raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")
        arrays = [tensor.at(address) for tensor, address in tensor_dict.items()]

        def work():
            if f"{self.kind} does nothing" == FAULT:
                return
            cuda.clock.spend("cudnn packed" if self._packed() else "cudnn strided")
            ctypes.memset(workspace, 0xFF, WORKSPACE)
            x, w, y = self._roles(*arrays)
            _convolve(self.kind, x, w, y, self.pace)
            if f"{self.kind} is wrong" == FAULT:
                arrays[2][-1, -1, -1, -1] += np.float32(1e-2) * abs(arrays[2]).max()
            if f"{self.kind} is no number" == FAULT:
                arrays[2][-1, -1, -1, -1] = np.nan

        cuda.current().enqueue(work)

    def _roles(self, *arrays):
        """Return the arrays of the graph in the order x, w, y."""
        order = {"fprop": (0, 1, 2), "wgrad": (0, 2, 1), "dgrad": (2, 1, 0)}[self.kind]
        return tuple(arrays[k] for k in order)

    def _packed(self):
        return all(t.stride[0] == prod(t.dim[1:]) for t in self.tensors)


def _convolve(kind, x, w, y, stride):
    n, groups = x.shape[0], x.shape[1] // w.shape[1]
    rows, columns = y.shape[2:]
    by_group = w.reshape(groups, -1, *w.shape[1:])
    if kind == "dgrad":
        dy = y.reshape(n, groups, -1, rows, columns)
        gradient = np.zeros(x.shape, x.dtype)
        for i in range(w.shape[2]):
            for j in range(w.shape[3]):
                part = np.einsum("ngkpq,gkc->ngcpq", dy, by_group[..., i, j]).reshape(n, -1, rows, columns)
                gradient[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride] += part
        x[...] = gradient
        return
    windows = sliding_window_view(x, w.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    windows = windows.reshape(n, groups, -1, *windows.shape[2:])
    if kind == "fprop":
        y[...] = np.einsum("ngcpqrs,gkcrs->ngkpq", windows, by_group).reshape(y.shape)
    else:
        dy = y.reshape(n, groups, -1, rows, columns)
        w[...] = np.einsum("ngcpqrs,ngkpq->gkcrs", windows, dy).reshape(w.shape)


__all__ = [
    "backend_version", "create_handle", "cudnnGraphNotSupportedError", "data_type", "heur_mode", "numerical_note",
    "pygraph", "set_stream",
]  # fmt: skip
