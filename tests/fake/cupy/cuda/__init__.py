"""Devices, streams, events, graphs, cuBLAS: see the package. FAKE_CUDA says what goes wrong."""

import ctypes
import os

import numpy as np
from numpy.lib.stride_tricks import as_strided

FAULT = os.environ.get("FAKE_CUDA", "")
DEVICES = int(os.environ.get("FAKE_CUDA_DEVICES", "1"))


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class CUBLASError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class MemoryPointer:
    def __init__(self, ptr, mem):
        self.ptr, self.mem = ptr, mem


class Stream:
    """Work in order; none of it is done before someone waits for it."""

    ptr = 7

    def __init__(self, null=False, non_blocking=False):
        self.queue, self.captured = [], None
        # Graph launches, for tests.
        self.launches = 0

    def use(self):
        global _current
        _current = self
        return self

    def enqueue(self, work):
        (self.queue if self.captured is None else self.captured).append(work)

    def synchronize(self):
        if self.captured is not None:
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing"
            )
        self.run(len(self.queue))

    def run(self, count):
        for _ in range(count):
            self.queue.pop(0)()

    def begin_capture(self, mode=None):
        if FAULT == "graphs":
            raise CUDARuntimeError("cudaErrorNotSupported: operation not supported")
        self.captured = []

    def end_capture(self):
        if self.captured is None:
            raise CUDARuntimeError("cudaErrorIllegalState: the operation cannot be performed in the present state")
        found, self.captured = self.captured, None
        return Graph(found)


class Graph:
    def __init__(self, works):
        self.works = works

    def launch(self, stream=None):
        stream.launches += 1
        for work in self.works:
            stream.enqueue(work)


_current = Stream()


def current():
    return _current


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.done = True

    def record(self, stream=None):
        self.done, self.stream = False, stream
        self.mark = mark = object()

        def reached():
            if self.mark is mark:
                self.done = True

        stream.enqueue(reached)

    def synchronize(self):
        while not self.done:
            self.stream.run(1)


class Device:
    def __init__(self, device=None):
        if not 0 <= device < DEVICES:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")

    def use(self):
        pass


class runtime:
    CUDARuntimeError = CUDARuntimeError
    memcpyHostToDevice, memcpyDeviceToHost = 1, 2

    @staticmethod
    def getDeviceCount():
        if FAULT in ("driver", "old driver"):
            raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
        if FAULT == "device":
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return DEVICES

    @staticmethod
    def driverGetVersion():
        return {"driver": 0, "old driver": 12040}.get(FAULT, 13020)

    @staticmethod
    def runtimeGetVersion():
        return 13020

    @staticmethod
    def getDeviceProperties(device):
        return {"name": b"host memory as a device"}

    @staticmethod
    def memcpyAsync(dst, src, size, kind, stream):
        _current.enqueue(lambda: ctypes.memmove(dst, src, size))


class driver:
    CUDADriverError = CUDADriverError


class device:
    @staticmethod
    def get_cublas_handle():
        return 3


def alloc_pinned_memory(size):
    return np.full(size, 0xFF, np.uint8).data


class cublas:
    CUBLASError = CUBLASError

    @staticmethod
    def gemmStridedBatchedEx(
        handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB, beta, C, Ctype, ldc,
        strideC, batchCount, computeType, algo,
    ):  # fmt: skip
        dtype = {0: np.dtype(np.float32), 1: np.dtype(np.float64)}[Ctype]
        if not (Atype == Btype == Ctype and computeType in {0: (68, 74, 75, 77), 1: (70,)}[Ctype]):
            raise CUBLASError("CUBLAS_STATUS_NOT_SUPPORTED")
        if lda < max(1, k if transa else m) or ldb < max(1, n if transb else k) or ldc < max(1, m):
            raise CUBLASError("CUBLAS_STATUS_INVALID_VALUE")
        one, zero = (ctypes.cast(p, ctypes.POINTER(np.ctypeslib.as_ctypes_type(dtype)))[0] for p in (alpha, beta))
        assert (one, zero) == (1, 0)

        def matrices(address, rows, columns, lead, step, transposed):
            steps = (lead, 1) if transposed else (1, lead)
            extent = (batchCount - 1) * step + (rows - 1) * steps[0] + (columns - 1) * steps[1] + 1
            flat = np.frombuffer((ctypes.c_char * (extent * dtype.itemsize)).from_address(address), dtype)
            strides = tuple(dtype.itemsize * s for s in (step, *steps))
            return as_strided(flat, (batchCount, rows, columns), strides)

        a = matrices(A, m, k, lda, strideA, transa)
        b = matrices(B, k, n, ldb, strideB, transb)
        c = matrices(C, m, n, ldc, strideC, False)
        _current.enqueue(lambda: np.copyto(c, a @ b))
