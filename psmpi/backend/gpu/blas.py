"""Matrix products on a GPU by direct calls of cuBLAS: CuPy refuses to call it while a stream is being captured."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_longlong, c_size_t, c_void_p
from typing import Any

import numpy as np

# Bytes of cuBLAS's workspace: the size recommended for the largest devices. It is allocated once, since a captured step
# must not allocate.
WORKSPACE = 32 << 20
# cublasComputeType_t for float32 matrices, by the `compute` of CupyOps, and for float64 matrices.
COMPUTE = {"float32": 68, "float16": 74, "bfloat16": 75, "tf32": 77}
DOUBLE = 70
CUDA_R = {np.dtype(np.float32): 0, np.dtype(np.float64): 1}
# Argument types of cublasGemmStridedBatchedEx: handle, two transpositions, m, n, k; alpha, A, B, beta, C, each matrix
# with type, leading dimension and stride between matrices; number of matrices, compute type, algorithm.
MATRIX = (c_void_p, c_int, c_int, c_longlong)
ARGUMENTS = (c_void_p, *(c_int,) * 5, c_void_p, *MATRIX, *MATRIX, c_void_p, *MATRIX, *(c_int,) * 3)


class CublasError(RuntimeError):
    """cuBLAS has returned a status code other than success."""


class Blas:
    """cuBLAS on one stream of one device."""

    def __init__(self, cupy: Any, stream: Any):
        # CuPy's module depends on the cuBLAS that it has loaded, so ctypes finds cuBLAS's symbols through it.
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
        # alpha = 1 and beta = 0, in host memory that outlives the calls.
        self.factors = {dtype: (np.ones(1, dtype), np.zeros(1, dtype)) for dtype in CUDA_R}

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise CublasError(f"{name} failed with status {status}")

    def product(self, a: Any, b: Any, out: Any, compute: str) -> None:
        """out (count, m, n) = a (count, m, k) @ b (count, k, n), all of one dtype.

        Rows or columns of a and b, and rows of out, must be contiguous: else ValueError. CublasError if cuBLAS fails.
        """
        (count, m, n), k, dtype = out.shape, a.shape[2], out.dtype
        # cuBLAS stores matrices by columns, so it computes out^T = b^T a^T.
        (b_how, b_lead), (a_how, a_lead), (how, lead) = (_leading(x) for x in (b, a, out))
        if how:
            raise ValueError(f"the result of a product needs contiguous rows, but it has strides {out.strides}")
        b_step, a_step, step = (x.strides[0] // x.itemsize for x in (b, a, out))
        one, zero = (factor.ctypes.data for factor in self.factors[dtype])
        number = CUDA_R[dtype]
        self._call(
            "cublasGemmStridedBatchedEx", self.handle, b_how, a_how, n, m, k, one,
            b.data.ptr, number, b_lead, b_step, a.data.ptr, number, a_lead, a_step, zero,
            out.data.ptr, number, lead, step, count, DOUBLE if number else COMPUTE[compute], -1,
        )  # fmt: skip


def _leading(matrices: Any) -> tuple[int, int]:
    """Return 1 if matrices (count, rows, columns) are stored by columns, else 0, and cuBLAS's leading dimension."""
    _, rows, columns = matrices.shape
    row, column = (stride // matrices.itemsize for stride in matrices.strides[1:])
    if column == 1 or columns == 1:
        return 0, max(row if rows > 1 else 1, columns)
    if row == 1 or rows == 1:
        return 1, max(column, rows)
    raise ValueError(f"a product needs contiguous rows or columns, but a matrix has strides {matrices.strides}")
