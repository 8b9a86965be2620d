"""Arrays of a backend as buffers that MPI reads and writes: the one place that waits for a device before MPI does."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.backend import Mirror, NumpyOps
from psmpi.errors import UserError

Pieces = Sequence[slice]
Key = tuple[int, int, np.dtype]


class Bridge:
    """Arrays in host memory, which MPI takes as they are. Pieces are of an array seen as a vector."""

    def begin(self, array: np.ndarray, pieces: Pieces | None = None) -> None:
        """Begin to get the array, or only these pieces of it, ready to be sent."""

    def outgoing(self, array: np.ndarray, pieces: Pieces | None = None) -> np.ndarray:
        """The buffer for MPI to read, ready, wherever the array, or these pieces, lie in it."""
        return array

    def incoming(self, array: np.ndarray) -> np.ndarray:
        """The buffer for MPI to write."""
        return array

    def arrived(self, array: np.ndarray, pieces: Pieces | None = None) -> None:
        """MPI has written the array, or these pieces of it."""


class Staged(Bridge):
    """Arrays in a device's memory that go through pinned host memory.

    Copies run beside MPI: of several arrays that have been begun the first can be sent while the next one is copied,
    and what has arrived is copied while MPI goes on.
    """

    def __init__(self, ops: NumpyOps):
        self.ops = ops
        # By address, size and dtype: a step sends the same arrays each time.
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
        return mirror.host.reshape(array.shape)

    def incoming(self, array: Any) -> np.ndarray:
        if isinstance(array, np.ndarray):
            return array
        _, mirror = self._mirror(array)
        mirror.settle()
        return mirror.host.reshape(array.shape)

    def arrived(self, array: Any, pieces: Pieces | None = None) -> None:
        if isinstance(array, np.ndarray):
            return
        _, mirror = self._mirror(array)
        for at in (slice(0, array.size),) if pieces is None else pieces:
            mirror.push(at)


class Direct(Bridge):
    """Arrays in a device's memory that a GPU-aware MPI takes as they are, when the device has done what came before."""

    def __init__(self, ops: NumpyOps):
        self.ops = ops

    def outgoing(self, array: Any, pieces: Pieces | None = None) -> Any:
        self.ops.synchronize()
        return array

    def incoming(self, array: Any) -> Any:
        self.ops.synchronize()
        return array


def make_bridge(world: Any, ops: NumpyOps, gpu_aware: bool) -> Bridge:
    """The way from these arrays to MPI. UserError on all ranks where MPI is to take a device's and cannot."""
    if not ops.on_device:
        return Bridge()
    if not gpu_aware:
        return Staged(ops)
    ask_library()
    bridge = Direct(ops)
    if not probe(world, ops, bridge):
        raise UserError(
            "--gpu-aware: this MPI gives wrong values when it sends from GPU memory: leave the option out, or use an "
            "MPI that was built for this CUDA"
        )
    return bridge


def ask_library() -> None:
    """UserError where the MPI library itself says that it does not know GPU memory: it would crash."""
    from mpi4py import MPI

    # Open MPI and MPICH have this function; what another MPI can do, the values tell.
    ask = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    if ask is not None and not ask():
        raise UserError(
            f"--gpu-aware: this MPI ({MPI.Get_library_version().splitlines()[0].strip()}) is not GPU-aware: load a "
            "site module of one that is, or leave the option out"
        )


def probe(world: Any, ops: NumpyOps, bridge: Bridge, size: int = 0) -> bool:
    """Whether the collectives of a step bring the right values from this bridge, on all ranks.

    size: of each rank's vector; 0: large enough for MPI to send it as it sends large ones, not larger in a large job.
    """
    from psmpi.comm.group import Counter, Group

    size = size or max(1009, 1_000_003 // world.size)
    group = Group(world, range(world.size), Counter(), bridge)
    right = True
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        # Small enough for sums to be exact, and different from rank to rank.
        counting = np.arange(size) % 1009
        mine, sums, rows = (ops.mirror(ops.zeros(n, dtype)) for n in (size, size, size * world.size))
        mine.host[:] = counting * (world.rank + 1)
        sums.host[:] = mine.host
        mine.push()
        sums.push()
        group.allgatherv(mine.array, rows.array, [size] * world.size)
        group.allreduce(sums.array)
        group.bcast(mine.array)
        # From rank to rank all around, the first one beginning.
        around = ops.mirror(ops.zeros(size, dtype))
        for turn in (0, 1) if world.size > 1 else ():
            if turn == (world.rank > 0):
                group.send(mine.array, (world.rank + 1) % world.size)
            else:
                group.receive(around.array, (world.rank - 1) % world.size)
        around.fetch()
        around.wait()
        right &= world.size == 1 or np.array_equal(around.host, counting)
        for mirror in (mine, sums, rows):
            mirror.fetch()
            mirror.wait()
        factors = np.arange(1, world.size + 1)
        right &= np.array_equal(rows.host.reshape(world.size, size), factors[:, None] * counting)
        right &= np.array_equal(sums.host, factors.sum() * counting) and np.array_equal(mine.host, counting)
    return bool(group.agree(np.array([float(not right)]))[0] == 0)
