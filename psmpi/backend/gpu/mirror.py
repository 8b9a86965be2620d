"""Mirrors of a device's arrays in pinned host memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.backend.reference.moves import Mirror


class DeviceMirror(Mirror):
    """An array on a device and its image in pinned host memory. MemoryError if that cannot be allocated."""

    def __init__(self, array: Any, cupy: Any, stream: Any):
        self.array, self.stream = array, stream
        try:
            # The memory returns to CuPy's pool when the last array over it is deleted.
            memory = cupy.cuda.alloc_pinned_memory(max(1, array.nbytes))
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise MemoryError(f"cannot allocate {array.nbytes} bytes of pinned host memory: {error}") from None
        self.host = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
        self.event = cupy.cuda.Event(disable_timing=True)
        self.runtime = cupy.cuda.runtime

    def fetch(self, at: slice = slice(None)) -> None:
        source, target = self._pieces(at)
        self._copy(target.ctypes.data, source.data.ptr, target.nbytes, self.runtime.memcpyDeviceToHost)

    def push(self, at: slice = slice(None)) -> None:
        target, source = self._pieces(at)
        self._copy(target.data.ptr, source.ctypes.data, source.nbytes, self.runtime.memcpyHostToDevice)

    def _pieces(self, at: slice) -> tuple[Any, np.ndarray]:
        if at == slice(None):
            return self.array, self.host
        return self.array[at], self.host[at]

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        if nbytes:
            self.runtime.memcpyAsync(target, source, nbytes, kind, self.stream.ptr)
            self.event.record(self.stream)

    def wait(self) -> None:
        self.event.synchronize()

    settle = wait
