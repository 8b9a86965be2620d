"""Products of matrices on a GPU by cuBLAS itself: CuPy's own calls of it refuse while a stream is being recorded."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_longlong, c_size_t, c_void_p
from typing import Any

import numpy as np

# What cuBLAS may use for itself, in bytes: as much as it is recommended for the largest devices. Given here, it is
# allocated once and not in a recorded step.
WORKSPACE = 32 << 20
# cublasComputeType_t for float32 matrices by what is computed with, and for float64.
COMPUTE = {"float32": 68, "float16": 74, "bfloat16": 75, "tf32": 77}
DOUBLE = 70
CUDA_R = {np.dtype(np.float32): 0, np.dtype(np.float64): 1}
# Of cublasGemmStridedBatchedEx: handle, the two orders, three sizes, then alpha and the matrices with their type,
# leading dimension and step, beta between them; batches, compute type, algorithm.
MATRIX = (c_void_p, c_int, c_int, c_longlong)
ARGUMENTS = (c_void_p, *(c_int,) * 5, c_void_p, *MATRIX, *MATRIX, c_void_p, *MATRIX, *(c_int,) * 3)


class CublasError(RuntimeError):
    """Status codes of cuBLAS, by number."""


class Blas:
    """cuBLAS on one stream of one device."""

    def __init__(self, cupy: Any, stream: Any):
        # The library that CuPy has loaded: what its module depends on is looked through too.
        self.library = ctypes.CDLL(cupy.cuda.cublas.__file__)
        self.handle = cupy.cuda.device.get_cublas_handle()
        self.workspace = cupy.empty(WORKSPACE, np.uint8)
        for name, arguments in (
            ("cublasSetStream_v2", (c_void_p, c_void_p)),
            ("cublasSetWorkspace_v2", (c_void_p, c_void_p, c_size_t)),
            ("cublasGemmStridedBatchedEx", ARGUMENTS),
        ):
            getattr(self.library, name).argtypes = arguments
        self._call("cublasSetStream_v2", self.handle, stream.ptr)
        self._call("cublasSetWorkspace_v2", self.handle, self.workspace.data.ptr, WORKSPACE)
        # Factors of the products, which are read when a product is begun.
        self.factors = {dtype: (np.ones(1, dtype), np.zeros(1, dtype)) for dtype in CUDA_R}

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise CublasError(f"{name} failed with status {status}")

    def product(self, a: Any, b: Any, out: Any, compute: str) -> None:
        """out (count, m, n) = a (count, m, k) @ b (count, k, n), all of one dtype, rows or columns contiguous.

        ValueError for other matrices, CublasError where cuBLAS refuses.
        """
        (count, m, n), k, dtype = out.shape, a.shape[2], out.dtype
        # Rows here are columns there: out^T = b^T a^T.
        (b_how, b_lead), (a_how, a_lead), (how, lead) = (_leading(x) for x in (b, a, out))
        if how:
            raise ValueError(f"out of a product needs contiguous rows, not strides {out.strides}")
        b_step, a_step, step = (x.strides[0] // x.itemsize for x in (b, a, out))
        one, zero = (factor.ctypes.data for factor in self.factors[dtype])
        number = CUDA_R[dtype]
        self._call(
            "cublasGemmStridedBatchedEx", self.handle, b_how, a_how, n, m, k, one,
            b.data.ptr, number, b_lead, b_step, a.data.ptr, number, a_lead, a_step, zero,
            out.data.ptr, number, lead, step, count, DOUBLE if number else COMPUTE[compute], -1,
        )  # fmt: skip


def _leading(matrices: Any) -> tuple[int, int]:
    """For cuBLAS: whether matrices (count, rows, columns) are transposed, and the step between rows or columns."""
    _, rows, columns = matrices.shape
    row, column = (stride // matrices.itemsize for stride in matrices.strides[1:])
    if column == 1 or columns == 1:
        return 0, max(row if rows > 1 else 1, columns)
    if row == 1 or rows == 1:
        return 1, max(column, rows)
    raise ValueError(f"a product needs contiguous rows or columns, not strides {matrices.strides}")
