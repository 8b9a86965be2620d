"""Bridges between arrays of a backend and buffers of MPI; the only place that waits for a device before MPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.backend import Mirror, NumpyOps

Pieces = Sequence[slice]
Key = tuple[int, int, np.dtype]


class Bridge:
    """The bridge of arrays in host memory, which MPI takes as they are. pieces: slices of the flattened array."""

    def begin(self, array: np.ndarray, pieces: Pieces | None = None) -> None:
        """Begin to prepare the array, or these pieces of it, for sending."""

    def outgoing(self, array: np.ndarray, pieces: Pieces | None = None) -> np.ndarray:
        """The buffer that MPI reads; waits until the array, or these pieces of it, are in it."""
        return array

    def incoming(self, array: np.ndarray) -> np.ndarray:
        """The buffer that MPI writes."""
        return array

    def arrived(self, array: np.ndarray, pieces: Pieces | None = None) -> None:
        """Take over the array, or these pieces of it, from the buffer that MPI has written."""


class Staged(Bridge):
    """The bridge of device arrays that go through pinned host memory.

    Copies overlap with MPI: one array is sent while the next one is copied to the host, and arrived values are copied
    to the device while MPI works.
    """

    def __init__(self, ops: NumpyOps):
        self.ops = ops
        # Buffers by address, size and dtype: each step sends the same arrays.
        self.mirrors: dict[Key, Mirror] = {}
        self.begun: set[Key] = set()

    def _mirror(self, array: Any) -> tuple[Key, Mirror]:
        key = array.data.ptr, array.size, array.dtype
        if key not in self.mirrors:
            self.mirrors[key] = self.ops.mirror(array.reshape(-1))
        return key, self.mirrors[key]

    def begin(self, array: Any, pieces: Pieces | None = None) -> None:
        if isinstance(array, np.ndarray):
            return
        key, mirror = self._mirror(array)
        for at in (slice(0, array.size),) if pieces is None else pieces:
            mirror.fetch(at)
        self.begun.add(key)

    def outgoing(self, array: Any, pieces: Pieces | None = None) -> np.ndarray:
        if isinstance(array, np.ndarray):
            return array
        key, mirror = self._mirror(array)
        if key not in self.begun:
            self.begin(array, pieces)
        self.begun.discard(key)
        mirror.wait()
        host: np.ndarray = mirror.host.reshape(array.shape)
        return host

    def incoming(self, array: Any) -> np.ndarray:
        if isinstance(array, np.ndarray):
            return array
        _, mirror = self._mirror(array)
        mirror.settle()
        host: np.ndarray = mirror.host.reshape(array.shape)
        return host

    def arrived(self, array: Any, pieces: Pieces | None = None) -> None:
        if isinstance(array, np.ndarray):
            return
        _, mirror = self._mirror(array)
        for at in (slice(0, array.size),) if pieces is None else pieces:
            mirror.push(at)


class GpuAware(Bridge):
    """The bridge of a GPU-aware MPI: device arrays themselves, after the device has finished earlier work."""

    def __init__(self, ops: NumpyOps):
        self.ops = ops

    def outgoing(self, array: Any, pieces: Pieces | None = None) -> Any:
        self.ops.synchronize()
        return array

    def incoming(self, array: Any) -> Any:
        self.ops.synchronize()
        return array
