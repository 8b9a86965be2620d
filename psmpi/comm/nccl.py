"""Collectives of a group by NCCL, from device to device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.comm.protocol import Communicator
from psmpi.errors import UserError


class Nccl:
    """The collectives of `comm` (its ranks, one device each) on arrays in their devices' memory, in stream order."""

    def __init__(self, comm: Communicator, stream: Any):
        library = _library()
        self.library, self.stream, self.size = library, stream, comm.size
        # The identifier is 128 bytes; the first rank makes it.
        number = np.zeros(128, np.uint8)
        if comm.rank == 0:
            number[:] = np.frombuffer(library.get_unique_id(), np.uint8)
        comm.Bcast(number, 0)
        self.comm = library.NcclCommunicator(comm.size, number.tobytes(), comm.rank)

    def _type(self, array: Any) -> int:
        code: int = self.library.NCCL_FLOAT32 if array.dtype == np.float32 else self.library.NCCL_FLOAT64
        return code

    def allreduce(self, array: Any) -> None:
        """Sum `array` over the group, in place."""
        address = array.data.ptr
        self.comm.allReduce(address, address, array.size, self._type(array), self.library.NCCL_SUM, self.stream.ptr)

    def allgatherv(self, array: Any, into: Any, counts: Sequence[int]) -> None:
        """Gather the arrays of all ranks, of counts[k] elements, one after the other in `into`."""
        # NCCL gathers equal counts only: a broadcast from each rank, all of them at once.
        self.library.groupStart()
        start = 0
        for rank, count in enumerate(counts):
            address = into.data.ptr + start * into.itemsize
            self.comm.broadcast(array.data.ptr, address, count, self._type(array), rank, self.stream.ptr)
            start += count
        self.library.groupEnd()


def check_devices(world: Communicator, pci_id: str) -> None:
    """UserError on all ranks unless CuPy has NCCL and no two ranks of a host share a device. pci_id: of the device."""
    from mpi4py import MPI

    _library()
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    padded, everyone = np.zeros(64, np.uint8), np.zeros((local.size, 64), np.uint8)
    name = np.frombuffer(pci_id.encode()[:64], np.uint8)
    padded[: len(name)] = name
    local.Allgather(padded, everyone)
    ranks, devices = local.size, len(np.unique(everyone, axis=0))
    local.Free()
    if devices < ranks:
        raise UserError(
            f"--nccl: {ranks} ranks share {devices} device(s) on this host and NCCL wants one each: start at most "
            f"{devices} ranks a host, or leave the option out"
        )


def _library() -> Any:
    try:
        from cupy.cuda import nccl
    except ImportError:
        nccl = None
    if nccl is None or not nccl.available:
        raise UserError(
            "--nccl: this CuPy has no NCCL: pip install nvidia-nccl-cu13 (for CUDA 12 -cu12), or leave the option out"
        )
    return nccl
