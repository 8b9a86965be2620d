"""Arrays in host memory: allocation, copies, and the description of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from psmpi.backend.reference.moves import CompressedSamples, Mirror, RowCopies, RunCopies, Samples

# Number of elements of an array that fits the second-level cache.
CHUNK = 1 << 18

Ops = TypeVar("Ops", bound="Arrays")


class Arrays:
    """Allocation, copies and samples of NumPy arrays. Backends for devices override what differs."""

    name = "numpy"
    # Minibatches whose size is a multiple of this run fastest.
    batch_multiple = 1
    # Number of threads of the kernels on the host.
    threads = 1
    # Whether arrays lie in a device's memory; the host then has only mirrors of them.
    on_device = False
    # Largest number of elements of windows that a convolution makes at a time: they stay in the second-level cache.
    chunk = CHUNK
    # The CUDA stream of the device, None on the host.
    stream: Any = None

    def __init__(self) -> None:
        # Scratch by its name and dtype.
        self.buffers: dict[tuple[str, np.dtype], np.ndarray] = {}

    @property
    def description(self) -> str:
        """The name of the backend and its settings, for messages."""
        return self.name

    @property
    def place(self) -> str:
        """The name of the device, for messages; empty for the host."""
        return ""

    @property
    def pci_id(self) -> str:
        """The device's PCI id, unique on its host; empty for the host."""
        return ""

    @property
    def choices(self) -> list[str]:
        """Messages, one a line, about choices between several ways to compute an operation."""
        return []

    def fused(self, name: str) -> Callable[..., None] | None:
        """The fused operation called `name`, or None if this backend does not have it."""
        return getattr(self, name, None)

    def empty(self, size: int, dtype: np.dtype) -> np.ndarray:
        """Allocate an array (size,) of undefined contents, aligned to a cache line."""
        memory = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
        first = -memory.ctypes.data % 64
        array: np.ndarray = memory[first : first + size * np.dtype(dtype).itemsize].view(dtype)
        return array

    def zeros(self, size: int, dtype: np.dtype) -> np.ndarray:
        """Allocate an array (size,) of zeros."""
        return np.zeros(size, dtype)

    def scratch(self, name: str, size: int, dtype: np.dtype) -> np.ndarray:
        """Return a reusable buffer (size or more,), valid until the next call with the same name and dtype."""
        array = self.buffers.get((name, dtype))
        if array is None or array.size < size:
            array = self.buffers[name, dtype] = self.empty(size, dtype)
        return array

    def view(self, array: np.ndarray, start: int, shape: Sequence[int], steps: Sequence[int]) -> np.ndarray:
        """Return a view of a contiguous array, with this shape and these strides, from element `start` on.

        steps: the strides, counted in elements.
        """
        flat = array.reshape(-1)
        return as_strided(flat[start:], shape, [step * flat.itemsize for step in steps])

    def mirror(self, array: np.ndarray) -> Mirror:
        """Return the `Mirror` of an array in host memory."""
        return Mirror(array)

    def host(self, array: np.ndarray) -> np.ndarray:
        """Return the array's values in host memory; the array itself if it lies there."""
        return array

    def put(self, values: np.ndarray) -> np.ndarray:
        """Return an array of the backend with these values; on the host `values` itself."""
        return values

    def synchronize(self) -> None:
        """Wait until the device has completed all operations."""

    def compile(self, dtype: np.dtype) -> None:
        """Compile the kernels for a dtype, on backends that compile at run time."""

    def record(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does `work` and that a backend may record once and then replay (CUDA graphs).

        Arguments of `work` are arrays of the backend, or hashable; few different ones should occur. For equal arguments
        `work` must do the same operations on the same arrays, none of them with the host, and return the same value.
        Two arrays are equal if they have the same memory, shape and dtype.
        """
        return work

    def separate(self: Ops) -> Ops:
        """Return a copy of this backend with buffers of its own, so that its allocations do not end recordings."""
        return self

    def beside(self: Ops) -> Ops:
        """Return a copy of this backend for another thread, with scratch buffers of its own."""
        made = copy(self)
        made.buffers = {}
        return made

    def samples(self, values: np.ndarray, scale: float) -> Samples:
        """Return a source of minibatches of samples (n, features), multiplied by `scale`.

        An array of the backend is not copied: a minibatch has the values of the time when it is fetched.
        """
        return Samples(values, scale)

    def compressed_samples(
        self, starts: np.ndarray, columns: np.ndarray, values: np.ndarray, features: int
    ) -> CompressedSamples:
        """Return a source of dense minibatches, of the dtype of `values`, from compressed rows."""
        return CompressedSamples(starts, columns, values, features)

    def run_copies(self, table: np.ndarray) -> RunCopies:
        """Return a reusable copy of runs between vectors. table: (runs, 3) int64, source, target and length of each."""
        return RunCopies(table)

    def row_copies(self, source: np.ndarray, target: np.ndarray) -> RowCopies:
        """Return a reusable copy of rows between arrays. source, target: (k,) row numbers."""
        return RowCopies(source, target)
