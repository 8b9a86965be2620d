"""Arrays of the reference: memory, copies, and what a backend says of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from psmpi.backend.reference.moves import CompressedSamples, Mirror, RowCopies, RunCopies, Samples

# Elements that stay in the second-level cache.
CHUNK = 1 << 18

Ops = TypeVar("Ops", bound="Arrays")


class Arrays:
    """Arrays of NumPy in host memory."""

    name = "numpy"
    # Minibatches of a multiple of this are the fastest.
    batch_multiple = 1
    # Cores for what is computed on the host.
    threads = 1
    # Whether arrays are in a device's memory, and only mirrors of them in the host's.
    on_device = False
    # Elements of the windows that a convolution makes at a time: they stay in the second-level cache.
    chunk = CHUNK
    # What a device does one after the other.
    stream: Any = None

    def __init__(self) -> None:
        # Scratch by its name and dtype.
        self.buffers: dict[tuple[str, np.dtype], np.ndarray] = {}

    @property
    def description(self) -> str:
        """The name and what the backend computes with, for people."""
        return self.name

    @property
    def place(self) -> str:
        """The device, for people; empty where it is the host."""
        return ""

    @property
    def pci_id(self) -> str:
        """The device's PCI id, different for each device of a host; empty where the device is the host."""
        return ""

    @property
    def choices(self) -> list[str]:
        """The choices among several ways to compute, for people, a line each."""
        return []

    def fused(self, name: str) -> Callable[..., None] | None:
        """The operation `name` in one pass where this backend has it; None where it has only the reference's steps."""
        return getattr(self, name, None)

    def empty(self, size: int, dtype: np.dtype) -> np.ndarray:
        """(size,), its contents undefined, beginning at a cache line."""
        memory = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
        first = -memory.ctypes.data % 64
        array: np.ndarray = memory[first : first + size * np.dtype(dtype).itemsize].view(dtype)
        return array

    def zeros(self, size: int, dtype: np.dtype) -> np.ndarray:
        """(size,) zeros."""
        return np.zeros(size, dtype)

    def scratch(self, name: str, size: int, dtype: np.dtype) -> np.ndarray:
        """Scratch (size or more,) of this name, valid until the next of the same."""
        array = self.buffers.get((name, dtype))
        if array is None or array.size < size:
            array = self.buffers[name, dtype] = self.empty(size, dtype)
        return array

    def view(self, array: np.ndarray, start: int, shape: Sequence[int], steps: Sequence[int]) -> np.ndarray:
        """The elements of a contiguous array from `start` on, in this shape and at these steps, in elements."""
        flat = array.reshape(-1)
        return as_strided(flat[start:], shape, [step * flat.itemsize for step in steps])

    def mirror(self, array: np.ndarray) -> Mirror:
        """The array's image in host memory."""
        return Mirror(array)

    def host(self, array: np.ndarray) -> np.ndarray:
        """The array's values in host memory, perhaps the array itself."""
        return array

    def put(self, values: np.ndarray) -> np.ndarray:
        """An array of the backend with these values, perhaps the array itself."""
        return values

    def synchronize(self) -> None:
        """Wait until everything that was begun is done."""

    def compile(self, dtype: np.dtype) -> None:
        """Get the operations for a dtype ready, where that takes time."""

    def record(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, to be called again and again with few different arguments: arrays of the backend, or hashable.

        It must do the same operations on the same arrays each time it is called with the same arguments, none of them
        with the host, and return the same: a backend may record them once and play them back. Arrays are the same where
        they have the same memory, shape and dtype.
        """
        return work

    def separate(self: Ops) -> Ops:
        """The same operations for work beside what is recorded: what they allocate moves nothing of that."""
        return self

    def beside(self: Ops) -> Ops:
        """The same operations for another thread, with scratch of their own."""
        made = copy(self)
        made.buffers = {}
        return made

    def samples(self, values: np.ndarray, scale: float) -> Samples:
        """Samples (n, features) to take minibatches from, times `scale`.

        An array of the backend's own is not copied: minibatches are of what it holds by then.
        """
        return Samples(values, scale)

    def compressed_samples(
        self, starts: np.ndarray, columns: np.ndarray, values: np.ndarray, features: int
    ) -> CompressedSamples:
        """Compressed rows to make dense minibatches of, which have the dtype of the values."""
        return CompressedSamples(starts, columns, values, features)

    def run_copies(self, table: np.ndarray) -> RunCopies:
        """Copies of runs, table (runs, 3) int64 of from, to and length, to be made again and again."""
        return RunCopies(table)

    def row_copies(self, source: np.ndarray, target: np.ndarray) -> RowCopies:
        """Copies of rows, source and target (k,) row numbers, to be made again and again."""
        return RowCopies(source, target)
