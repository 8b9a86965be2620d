"""Where shared weights are: in memory that ranks share, in MPI's windows, or with a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Counter, Group
from psmpi.comm.windows import Memory, Windows


class Store:
    """Weights `w` (n,) that models read, this rank's `share` of them that checkpoints hold, and how all are added to.

    All ranks make one together, and call `settle`, `loaded` and `close` together. owned: arrays that this rank holds.
    """

    w: np.ndarray
    share: np.ndarray
    owned: tuple[np.ndarray, ...] = ()

    def read(self) -> None:
        """Bring w up to date with what others have added."""

    def read_at(self, places: np.ndarray) -> None:
        """`read` for some elements, (k,) int64, strictly increasing."""
        self.read()

    def add(self, change: np.ndarray, factor: float) -> None:
        """Add factor change (n,) to the weights of all; `change` may be overwritten."""
        raise NotImplementedError

    def flush(self) -> None:
        """Return when all that this rank has added is there."""

    def end(self) -> None:
        """Note that all of a minibatch is added."""

    def settle(self) -> None:
        """Wait for all ranks; then everything is there that was added, in every `share`."""
        raise NotImplementedError

    def loaded(self) -> None:
        """Go on from what all ranks have put into their shares."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what only all ranks together can."""


class SharedStore(Store):
    """One array that the ranks of a host share, w, without copies; additions as the kernels make them."""

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
        """windows: None for one rank alone."""
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
    """A window of which each rank has a shard, and a copy w on every rank, as it was read last."""

    def __init__(self, windows: Windows, edges: Sequence[int], group: Group, dtype: np.dtype, counter: Counter):
        self.window, self.group, self.counter = windows.sharded(edges, dtype, counter), group, counter
        self.w = np.zeros(edges[-1], dtype)
        self.share = self.window.own
        self.owned = (self.w, self.share)

    def read(self) -> None:
        self.window.read(self.w)

    def read_at(self, places: np.ndarray) -> None:
        found = np.empty(len(places), self.w.dtype)
        self.window.read_at(places, found)
        self.w[places] = found

    def add(self, change: np.ndarray, factor: float) -> None:
        if factor != 1:
            change *= change.dtype.type(factor)
        self.window.add(change)

    def add_at(self, places: np.ndarray, change: np.ndarray) -> None:
        """Add change (k,) to some elements, (k,) int64, strictly increasing."""
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
        # Nobody adds before all have read.
        self.group.comm.Barrier()

    def loaded(self) -> None:
        self.settle()

    def close(self) -> None:
        self.group.comm.Barrier()
        self.share, self.owned = self.share[:0].copy(), ()
        self.window.free()


def edges_of(shards: Sequence[Any], n: int) -> list[int]:
    """Where equal consecutive shards begin, and the end of the last; shards: runs of each rank."""
    return [next(iter(shard.intervals), (n, n))[0] for shard in shards] + [n]
