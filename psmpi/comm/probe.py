"""The choice of the bridge between arrays and MPI, and the test of a GPU-aware MPI on device arrays."""

from __future__ import annotations

import ctypes

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.bridge import Bridge, GpuAware, Staged
from psmpi.comm.group import Counter, Group
from psmpi.comm.protocol import World
from psmpi.errors import UserError


def make_bridge(world: World, ops: NumpyOps, gpu_aware: bool) -> Bridge:
    """The bridge of `ops`. UserError on all ranks if --gpu-aware is given and MPI cannot take device arrays."""
    if not ops.on_device:
        return Bridge()
    if not gpu_aware:
        return Staged(ops)
    ask_library()
    bridge = GpuAware(ops)
    if not probe(world, ops, bridge):
        raise UserError(
            "--gpu-aware: this MPI gives wrong values when it sends from GPU memory: leave the option out, or use an "
            "MPI that was built for this CUDA"
        )
    return bridge


def ask_library() -> None:
    """UserError if the MPI library says that it cannot take GPU memory, which would crash it."""
    from mpi4py import MPI

    # Open MPI and MPICH have this function; other libraries are judged by the values they exchange.
    ask = getattr(ctypes.CDLL(MPI.__file__), "MPIX_Query_cuda_support", None)
    if ask is not None and not ask():
        raise UserError(
            f"--gpu-aware: this MPI ({MPI.Get_library_version().splitlines()[0].strip()}) is not GPU-aware: load a "
            "site module of one that is, or leave the option out"
        )


def probe(world: World, ops: NumpyOps, bridge: Bridge, size: int = 0) -> bool:
    """Whether the collectives of a step bring the right values from this bridge, on all ranks.

    size: of each rank's vector; 0: large enough for MPI to send it as it sends large ones, not larger in a large job.
    """
    size = size or max(1009, 1_000_003 // world.size)
    group = Group(world, range(world.size), Counter(), bridge)
    right = True
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        # Small enough for sums to be exact, and different from rank to rank.
        counting = np.arange(size) % 1009
        values, sums, rows = (ops.mirror(ops.zeros(n, dtype)) for n in (size, size, size * world.size))
        values.host[:] = counting * (world.rank + 1)
        sums.host[:] = values.host
        values.push()
        sums.push()
        group.allgatherv(values.array, rows.array, [size] * world.size)
        group.allreduce(sums.array)
        group.bcast(values.array)
        # Around a ring of ranks, beginning with rank 0.
        around = ops.mirror(ops.zeros(size, dtype))
        for turn in (0, 1) if world.size > 1 else ():
            if turn == (world.rank > 0):
                group.send(values.array, (world.rank + 1) % world.size)
            else:
                group.receive(around.array, (world.rank - 1) % world.size)
        around.fetch()
        around.wait()
        right &= world.size == 1 or np.array_equal(around.host, counting)
        for mirror in (values, sums, rows):
            mirror.fetch()
            mirror.wait()
        factors = np.arange(1, world.size + 1)
        right &= np.array_equal(rows.host.reshape(world.size, size), factors[:, None] * counting)
        right &= np.array_equal(sums.host, factors.sum() * counting) and np.array_equal(values.host, counting)
    return bool(group.agree(np.array([float(not right)]))[0] == 0)
