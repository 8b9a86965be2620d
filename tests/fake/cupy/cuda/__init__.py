"""Devices, streams, events, graphs and cuBLAS of the stand-in. The variable FAKE_CUDA names a fault to simulate."""

import ctypes
import os
import threading

import numpy as np
from numpy.lib.stride_tricks import as_strided

FAULT = os.environ.get("FAKE_CUDA", "")
DEVICES = int(os.environ.get("FAKE_CUDA_DEVICES", "1"))


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class clock:
    """The simulated time that events measure, in milliseconds. costs: time of kernels by name, 1 by default."""

    costs: dict[str, float] = {}  # noqa: RUF012
    # Each thread is a rank with its own device, and has its own time.
    own = threading.local()

    @classmethod
    def now(cls):
        return getattr(cls.own, "now", 0.0)

    @classmethod
    def spend(cls, name):
        cls.own.now = cls.now() + cls.costs.get(name, 1.0)


class MemoryPointer:
    def __init__(self, ptr, mem):
        self.ptr, self.mem = ptr, mem


class Stream(threading.local):
    """A queue of work, run in order when something waits for the stream. Each thread, a rank, has its own queue."""

    ptr = 7

    def __init__(self, null=False, non_blocking=False):
        self.queue, self.captured = [], None
        # For tests: the number of graph launches.
        self.launches = 0

    def use(self):
        _chosen.stream = self
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

    def is_capturing(self):
        return self.captured is not None

    def begin_capture(self, mode=None):
        if FAULT == "graphs":
            raise CUDARuntimeError("cudaErrorNotSupported: operation not supported")
        self.captured = []

    def end_capture(self):
        if self.captured is None:
            raise CUDARuntimeError("cudaErrorIllegalState: the operation cannot be performed in the present state")
        works, self.captured = self.captured, None
        return Graph(works)


class Graph:
    def __init__(self, works):
        self.works = works

    def launch(self, stream=None):
        stream.launches += 1
        for work in self.works:
            stream.enqueue(work)


_first, _chosen = Stream(), threading.local()


def current():
    return getattr(_chosen, "stream", _first)


class Event:
    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.done, self.timed = True, not disable_timing

    def record(self, stream=None):
        self.done, self.stream = False, stream
        self.mark = mark = object()

        def reached():
            if self.mark is mark:
                self.done, self.time = True, clock.now()

        stream.enqueue(reached)

    def synchronize(self):
        while not self.done:
            self.stream.run(1)


def get_elapsed_time(start_event, end_event):
    if not (start_event.timed and end_event.timed and start_event.done and end_event.done):
        raise CUDARuntimeError("cudaErrorNotReady: device not ready")
    return end_event.time - start_event.time


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
    def deviceGetPCIBusId(device):
        from psmpi.launcher import announced_rank

        # Fault "alone": each process sees only its own device, as number 0, as some schedulers have it.
        first = announced_rank(dict(os.environ)) if FAULT == "alone" else 0
        return f"0000:{first + device:02x}:00.0"

    @staticmethod
    def getDeviceProperties(device):
        return {"name": b"host memory as a device"}

    @staticmethod
    def memGetInfo():
        return 3_000_000_000, 4_000_000_000

    @staticmethod
    def memcpyAsync(dst, src, size, kind, stream):
        current().enqueue(lambda: ctypes.memmove(dst, src, size))


class driver:
    CUDADriverError = CUDADriverError


class device:
    @staticmethod
    def get_cublas_handle():
        return 3


def alloc_pinned_memory(size):
    return np.full(size, 0xFF, np.uint8).data


class compiler:
    class CompileException(Exception):
        pass


class _Cublas:
    """A shared library in place of cuBLAS, called through ctypes like cuBLAS, that forwards calls to Python."""

    def __init__(self):
        # All ranks have the same callback, since they share the library, and it is never unloaded.
        self.callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_longlong))(_called)

    @property
    def __file__(self):
        from helpers import cuda_host

        path = cuda_host.library("cublas", CUBLAS)
        library = ctypes.CDLL(path)
        library.answer_by(self.callback)
        return path


CUBLAS = """
typedef long long L;
static int (*answer)(int, L *);
extern "C" void answer_by(int (*function)(int, L *)) { answer = function; }
extern "C" int cublasSetStream_v2(void *handle, void *stream)
{
    L a[] = {(L)handle, (L)stream};
    return answer(0, a);
}
extern "C" int cublasSetWorkspace_v2(void *handle, void *memory, unsigned long size)
{
    L a[] = {(L)handle, (L)memory, (L)size};
    return answer(1, a);
}
extern "C" int cublasGemmStridedBatchedEx(
    void *handle, int transa, int transb, int m, int n, int k, const void *alpha, const void *A, int Atype, int lda,
    L strideA, const void *B, int Btype, int ldb, L strideB, const void *beta, void *C, int Ctype, int ldc, L strideC,
    int batchCount, int computeType, int algo)
{
    L a[] = {(L)handle, transa, transb, m, n, k, (L)alpha, (L)A, Atype, lda, strideA, (L)B, Btype, ldb, strideB,
             (L)beta, (L)C, Ctype, ldc, strideC, batchCount, computeType, algo};
    return answer(2, a);
}
"""
SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 7, 15


def _called(which, arguments):
    """Handle a call of the library and return its status. A matrix product is added to the stream.

    which: 0 for cublasSetStream, 1 for cublasSetWorkspace, 2 for cublasGemmStridedBatchedEx.
    """
    if which == 0:
        return SUCCESS if tuple(arguments[:2]) == (device.get_cublas_handle(), Stream.ptr) else INVALID_VALUE
    if which == 1:
        return SUCCESS if (arguments[1] and arguments[1] % 256 == 0) or arguments[2] else INVALID_VALUE
    (_, transa, transb, m, n, k, alpha, a, a_type, lda, a_step, b, b_type, ldb, b_step, beta, c, c_type, ldc, c_step,
     count, compute, algo) = arguments[:23]  # fmt: skip
    dtype = {0: np.dtype(np.float32), 1: np.dtype(np.float64)}[c_type]
    if not (a_type == b_type == c_type and compute in {0: (68, 74, 75, 77), 1: (70,)}[c_type] and algo == -1):
        return NOT_SUPPORTED
    if lda < max(1, k if transa else m) or ldb < max(1, n if transb else k) or ldc < max(1, m):
        return INVALID_VALUE
    alpha_value, beta_value = (
        ctypes.cast(p, ctypes.POINTER(np.ctypeslib.as_ctypes_type(dtype)))[0] for p in (alpha, beta)
    )
    if (alpha_value, beta_value) != (1, 0):
        return NOT_SUPPORTED

    def matrices(address, rows, columns, lead, step, transposed):
        steps = (lead, 1) if transposed else (1, lead)
        extent = (count - 1) * step + (rows - 1) * steps[0] + (columns - 1) * steps[1] + 1
        flat = np.frombuffer((ctypes.c_char * (extent * dtype.itemsize)).from_address(address), dtype)
        return as_strided(flat, (count, rows, columns), tuple(dtype.itemsize * s for s in (step, *steps)))

    left, right = matrices(a, m, k, lda, a_step, transa), matrices(b, k, n, ldb, b_step, transb)
    product = matrices(c, m, n, ldc, c_step, False)
    current().enqueue(lambda: np.copyto(product, left @ right))
    return SUCCESS


cublas = _Cublas()
