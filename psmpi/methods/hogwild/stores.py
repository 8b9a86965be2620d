"""Stores of shared weights: memory that the ranks of a host share, or MPI windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Counter, Group
from psmpi.comm.windows import Memory, Windows


class Store:
    """Shared weights: `w` (n,), which models read, and `share`, this rank's slice for checkpoints.

    The constructor, `settle`, `loaded` and `close` are collective. owned: arrays that this rank holds.
    """

    w: np.ndarray
    share: np.ndarray
    owned: tuple[np.ndarray, ...] = ()

    def read(self) -> None:
        """Bring w up to date with the additions of other ranks."""

    def read_at(self, places: np.ndarray) -> None:
        """Bring the elements `places` of w up to date: (k,) int64, strictly increasing."""
        self.read()

    def add(self, change: np.ndarray, factor: float) -> None:
        """Add factor * change to the shared weights. change: (n,), may be overwritten."""
        raise NotImplementedError

    def flush(self) -> None:
        """Wait until all additions of this rank are in the shared weights."""

    def end(self) -> None:
        """Note the end of a minibatch: its changes are added."""

    def settle(self) -> None:
        """Wait for all ranks; afterwards every `share` holds all additions."""
        raise NotImplementedError

    def loaded(self) -> None:
        """Set the shared weights from the shares that all ranks have written."""
        raise NotImplementedError

    def close(self) -> None:
        """Free shared memory and windows."""


class SharedStore(Store):
    """One array w that the ranks of a host share, without copies; kernels add to it."""

    def __init__(
        self,
        windows: Windows | None,
        n: int,
        share: slice,
        group: Group,
        dtype: np.dtype,
        ops: NumpyOps,
        atomic: bool,
    ):
        """Allocate w, in shared memory or, with windows None, for one rank."""
        self.memory: Memory | None = None if windows is None else windows.memory(n * dtype.itemsize)
        self.w = np.zeros(n, dtype) if self.memory is None else self.memory.bytes.view(dtype)
        self.group, self.ops, self.atomic = group, ops, atomic
        self.share = self.w[share]
        self.owned = (self.w,) if group.rank == 0 else ()

    def add(self, change: np.ndarray, factor: float) -> None:
        self.ops.add_shared(self.w, change, factor, self.atomic)

    def settle(self) -> None:
        if self.memory is not None:
            self.memory.sync()
            self.group.comm.Barrier()
            self.memory.sync()

    def loaded(self) -> None:
        self.settle()

    def close(self) -> None:
        if self.memory is not None:
            self.settle()
            self.w, self.share, self.owned = self.w[:0].copy(), self.share[:0].copy(), ()
            self.memory.free()


class WindowStore(Store):
    """A window of which each rank holds a shard, and on every rank a copy w of all weights, as last read."""

    def __init__(self, windows: Windows, edges: Sequence[int], group: Group, dtype: np.dtype, counter: Counter):
        self.window, self.group, self.counter = windows.sharded(edges, dtype, counter), group, counter
        self.w = np.zeros(edges[-1], dtype)
        self.share = self.window.own
        self.owned = (self.w, self.share)

    def read(self) -> None:
        self.window.read(self.w)

    def read_at(self, places: np.ndarray) -> None:
        values = np.empty(len(places), self.w.dtype)
        self.window.read_at(places, values)
        self.w[places] = values

    def add(self, change: np.ndarray, factor: float) -> None:
        if factor != 1:
            change *= change.dtype.type(factor)
        self.window.add(change)

    def add_at(self, places: np.ndarray, change: np.ndarray) -> None:
        """Add `change` (k,) to the elements `places` (k,) int64, strictly increasing."""
        self.window.add_at(places, change)

    def flush(self) -> None:
        self.window.flush()

    def settle(self) -> None:
        self.window.flush()
        self.window.sync()
        self.group.comm.Barrier()
        self.window.sync()
        with self.counter.paused():
            self.window.read(self.w)
        # No rank adds before all ranks have read.
        self.group.comm.Barrier()

    def loaded(self) -> None:
        self.settle()

    def close(self) -> None:
        self.group.comm.Barrier()
        self.share, self.owned = self.share[:0].copy(), ()
        self.window.free()


def edges_of(shards: Sequence[Any], n: int) -> list[int]:
    """Return the first element of each consecutive shard, and the end n of the last. shards: the runs of each rank."""
    return [next(iter(shard.intervals), (n, n))[0] for shard in shards] + [n]
