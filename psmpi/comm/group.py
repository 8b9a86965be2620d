"""A communicator that counts its bytes, with the few collectives psmpi uses, all on contiguous buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any
from zlib import crc32

import numpy as np

from psmpi.comm.bridge import Bridge
from psmpi.comm.nccl import Nccl
from psmpi.comm.protocol import Communicator, Request, VectorSpec, World


class Counter:
    """Payload bytes that this rank sent and received. Rooted collectives count as flat, all-to-all ones as rings."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0

    def add(self, sent: int, received: int) -> None:
        self.sent += sent
        self.received += received

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the messages of the block out of the counts, since they are no part of the training."""
        before = self.sent, self.received
        try:
            yield
        finally:
            self.sent, self.received = before


class Group:
    """An ordered group of ranks of the job. Ranks outside it, whose `rank` is -1, must make none of its calls."""

    def __init__(self, world: World, ranks: Sequence[int], counter: Counter, bridge: Bridge | None = None):
        self.ranks, self.counter, self.bridge = tuple(ranks), counter, bridge or Bridge()
        self.nccl: Nccl | None = None
        self.size = len(self.ranks)
        self._comm: Communicator | None = None
        if world.rank in self.ranks:
            if self.ranks == tuple(range(world.size)):
                self._comm = world
            elif self.size > 1:
                group = world.group.Incl(list(self.ranks))
                self._comm = world.Create_group(group)
                group.Free()
        self.rank = self.ranks.index(world.rank) if world.rank in self.ranks else -1

    @property
    def comm(self) -> Communicator:
        """MPI's communicator of the group. RuntimeError outside the group, and for a group of one rank."""
        if self._comm is None:
            raise RuntimeError(f"no messages among the ranks {self.ranks}: this rank is outside, or alone")
        return self._comm

    def use_nccl(self, stream: Any) -> None:
        """Let NCCL do allreduce and allgatherv, from device to device. All ranks of the group call it."""
        if self.size > 1:
            self.nccl = Nccl(self.comm, stream)

    def send(self, buffer: np.ndarray, to: int) -> None:
        self.comm.Send(self.bridge.outgoing(buffer), to)
        self.counter.add(buffer.nbytes, 0)

    def receive(self, buffer: np.ndarray, source: int) -> None:
        self.comm.Recv(self.bridge.incoming(buffer), source)
        self.bridge.arrived(buffer)
        self.counter.add(0, buffer.nbytes)

    def isend(self, buffer: np.ndarray, to: int, tag: int = 0) -> Request:
        """Begin to send; do not write to the buffer before the request is done."""
        request = self.comm.Isend(self.bridge.outgoing(buffer), to, tag)
        self.counter.add(buffer.nbytes, 0)
        return request

    def irecv(self, buffer: np.ndarray, source: int, tag: int = 0) -> Request:
        """Begin to receive; after the request is done the caller calls `bridge.arrived(buffer)`."""
        request = self.comm.Irecv(self.bridge.incoming(buffer), source, tag)
        self.counter.add(0, buffer.nbytes)
        return request

    def ibcast(self, buffer: np.ndarray, root: int = 0) -> Request:
        """Begin bcast in a group of two or more; afterwards ranks but the root call `bridge.arrived(buffer)`."""
        at_root = self.rank == root
        request = self.comm.Ibcast(self.bridge.outgoing(buffer) if at_root else self.bridge.incoming(buffer), root)
        self.counter.add(buffer.nbytes * (self.size - 1) * at_root, buffer.nbytes * (not at_root))
        return request

    def ireduce(self, buffer: np.ndarray, root: int = 0) -> Request:
        """Begin reduce in a group of two or more, in place on the root, which afterwards calls `bridge.arrived`."""
        wire = self.bridge.outgoing(buffer)
        if self.rank == root:
            self.counter.add(0, buffer.nbytes * (self.size - 1))
            return self.comm.Ireduce(in_place(), wire, root=root)
        self.counter.add(buffer.nbytes, 0)
        return self.comm.Ireduce(wire, None, root=root)

    def bcast(self, buffer: np.ndarray, root: int = 0) -> None:
        if self.size > 1:
            at_root = self.rank == root
            self.comm.Bcast(self.bridge.outgoing(buffer) if at_root else self.bridge.incoming(buffer), root)
            if not at_root:
                self.bridge.arrived(buffer)
            self.counter.add(buffer.nbytes * (self.size - 1) * at_root, buffer.nbytes * (not at_root))

    def reduce(self, buffer: np.ndarray, into: np.ndarray | None, root: int = 0) -> None:
        """Sum all buffers on the root, in its `into`, which already holds the root's share."""
        if self.size == 1:
            return
        if self.rank == root:
            assert into is not None
            self.comm.Reduce(in_place(), self.bridge.outgoing(into), root=root)
            self.bridge.arrived(into)
            self.counter.add(0, buffer.nbytes * (self.size - 1))
        else:
            self.comm.Reduce(self.bridge.outgoing(buffer), None, root=root)
            self.counter.add(buffer.nbytes, 0)

    def allreduce(self, buffer: np.ndarray) -> None:
        """Sum `buffer` over the group, in place. Counted as a ring: 2 (P - 1) / P of its bytes."""
        if self.size > 1:
            if self.nccl is not None:
                self.nccl.allreduce(buffer)
            else:
                self.comm.Allreduce(in_place(), self.bridge.outgoing(buffer))
                self.bridge.arrived(buffer)
            moved = 2 * (self.size - 1) * buffer.nbytes // self.size
            self.counter.add(moved, moved)

    def iallreduce(self, buffer: np.ndarray) -> Request:
        """Begin allreduce; `wait` finishes it, and the buffer must not be touched before."""
        request = self.comm.Iallreduce(in_place(), self.bridge.outgoing(buffer))
        moved = 2 * (self.size - 1) * buffer.nbytes // self.size
        self.counter.add(moved, moved)
        return request

    def wait(self, buffer: np.ndarray, request: Request) -> None:
        """Finish an operation on `buffer` that was begun."""
        request.Wait()
        self.bridge.arrived(buffer)

    def gather_all(self, into: np.ndarray, counts: Sequence[int]) -> None:
        """All-gather in place: run k of `into`, of counts[k] elements, comes from rank k. Any dtype."""
        if self.size > 1:
            self.comm.Allgatherv(in_place(), _runs(self.bridge.outgoing(into), counts))
            self.bridge.arrived(into)
            own = into.itemsize * counts[self.rank]
            self.counter.add(own * (self.size - 1), into.itemsize * sum(counts) - own)

    def reduce_scatter(self, buffer: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """Sum run k of `buffer`, of counts[k] elements, over the group, on rank k: the adjoint of allgatherv.

        Each rank sends each run once. Returns the sum, at the front of the buffer, whose rest is overwritten.
        """
        segment = buffer.reshape(-1)[: counts[self.rank]]
        if self.size > 1:
            self.comm.Reduce_scatter(in_place(), self.bridge.outgoing(buffer), list(counts))
            self.bridge.arrived(buffer)
            self.counter.add(buffer.itemsize * sum(counts) - segment.nbytes, segment.nbytes * (self.size - 1))
        return segment

    def ireduce_scatter(self, buffer: np.ndarray, counts: Sequence[int]) -> Request:
        """Begin reduce_scatter in a group of two or more; afterwards call `bridge.arrived`. The sum is at the front."""
        own = buffer.itemsize * counts[self.rank]
        request = self.comm.Ireduce_scatter(in_place(), self.bridge.outgoing(buffer), list(counts))
        self.counter.add(buffer.itemsize * sum(counts) - own, own * (self.size - 1))
        return request

    def allgather(self, buffer: np.ndarray, into: np.ndarray) -> None:
        """Gather the buffers of all ranks, of one size, as rows of `into` (size, ...). Host memory, any dtype."""
        into[self.rank] = buffer
        self.gather_all(into, [buffer.size] * self.size)

    def alltoallv(
        self, buffer: np.ndarray, counts: Sequence[int], into: np.ndarray, received: Sequence[int] | None = None
    ) -> None:
        """Send run k of `buffer`, of counts[k] elements, to rank k. Host memory.

        Run j of `into`, of received[j] elements (counts[rank] by default), comes from rank j.
        """
        arriving = [counts[self.rank]] * self.size if received is None else received
        if self.size == 1:
            into.reshape(-1)[: counts[0]] = buffer[: counts[0]]
            return
        self.comm.Alltoallv(_runs(buffer, counts), _runs(into, arriving))
        own = counts[self.rank]
        self.counter.add(buffer.itemsize * (sum(counts) - own), into.itemsize * (sum(arriving) - own))

    def agree(self, values: np.ndarray) -> np.ndarray:
        """Sum `values` over the group, in place, to the same bits on all ranks. Control data, not counted."""
        if self.size > 1:
            # Reduce then Bcast: an Allreduce may give ranks sums that differ in the last bit.
            if self.rank == 0:
                self.comm.Reduce(in_place(), values, root=0)
            else:
                self.comm.Reduce(values, None, root=0)
            self.comm.Bcast(values, 0)
        return values

    def same_bits(self, vector: np.ndarray) -> bool:
        """Whether `vector`, in host memory, has the same bits on all ranks, by checksums. Not counted."""
        own, sums = np.array([crc32(np.ascontiguousarray(vector).data)], np.int64), np.zeros(self.size, np.int64)
        if self.size > 1:
            self.comm.Allgather(own, sums)
        return len(set(sums.tolist())) == 1

    def scatterv(
        self,
        source: np.ndarray,
        counts: Sequence[int],
        starts: Sequence[int],
        into: np.ndarray,
        moved: Sequence[slice] | None = None,
    ) -> None:
        """Scatter: elements [starts[k], starts[k] + counts[k]) of the root's `source` to `into` on rank k.

        moved: the result of `pieces(counts, starts)`, if the caller has it.
        """
        if self.rank == 0:
            wire = self.bridge.outgoing(source, moved or pieces(counts, starts))
            self.comm.Scatterv([wire, counts, starts, float_type(source)], in_place(), root=0)
            self.counter.add(source.itemsize * (sum(counts) - counts[0]), 0)
        else:
            self.comm.Scatterv(None, self.bridge.incoming(into), root=0)
            self.bridge.arrived(into)
            self.counter.add(0, into.nbytes)

    def gatherv(
        self,
        buffer: np.ndarray,
        into: np.ndarray,
        counts: Sequence[int],
        starts: Sequence[int],
        moved: Sequence[slice] | None = None,
    ) -> None:
        """Gather: the adjoint of scatterv."""
        if self.rank == 0:
            wire = self.bridge.incoming(into)
            self.comm.Gatherv(in_place(), [wire, counts, starts, float_type(into)], root=0)
            self.bridge.arrived(into, moved or pieces(counts, starts))
            self.counter.add(0, into.itemsize * (sum(counts) - counts[0]))
        else:
            self.comm.Gatherv(self.bridge.outgoing(buffer), None, root=0)
            self.counter.add(buffer.nbytes, 0)

    def allgatherv(self, buffer: np.ndarray, into: np.ndarray, counts: Sequence[int]) -> None:
        """Gather the buffers of all ranks, one after the other, in `into` on each rank. Counted as a ring."""
        if self.size == 1:
            into.reshape(-1)[: buffer.size] = buffer.reshape(-1)
            return
        if self.nccl is not None:
            self.nccl.allgatherv(buffer, into, counts)
        else:
            wire = [self.bridge.incoming(into), counts, _starts(counts), float_type(into)]
            self.comm.Allgatherv(self.bridge.outgoing(buffer), wire)
            self.bridge.arrived(into)
        self.counter.add(buffer.nbytes * (self.size - 1), into.itemsize * sum(counts) - buffer.nbytes)

    def iallgatherv(self, buffer: np.ndarray, into: np.ndarray, counts: Sequence[int]) -> Request:
        """Begin allgatherv in a group of two or more; afterwards call `bridge.arrived(into)`."""
        wire = [self.bridge.incoming(into), counts, _starts(counts), float_type(into)]
        request = self.comm.Iallgatherv(self.bridge.outgoing(buffer), wire)
        self.counter.add(buffer.nbytes * (self.size - 1), into.itemsize * sum(counts) - buffer.nbytes)
        return request


def all_done(requests: Sequence[Request]) -> bool:
    """Whether all requests are done. The call also lets MPI make progress."""
    return all(request.Test() for request in requests)


def wait_all(requests: Sequence[Request]) -> None:
    """Wait for all requests."""
    for request in requests:
        request.Wait()


def pieces(counts: Sequence[int], starts: Sequence[int]) -> list[slice]:
    """The slices that a scatter or gather moves; adjacent slices are joined."""
    slices: list[slice] = []
    for start, count in sorted(zip(starts, counts, strict=True)):
        if count and slices and slices[-1].stop == start:
            slices[-1] = slice(slices[-1].start, start + count)
        elif count:
            slices.append(slice(start, start + count))
    return slices


def in_place() -> Any:
    """MPI.IN_PLACE, imported late."""
    from mpi4py import MPI

    return MPI.IN_PLACE


def _runs(array: np.ndarray, counts: Sequence[int]) -> VectorSpec:
    """MPI's description of consecutive runs of counts[k] elements of a contiguous array of any dtype."""
    from mpi4py import MPI

    sizes = [array.itemsize * count for count in counts]
    # As bytes: MPI has no float16, and these values are moved, not summed.
    return [array, sizes, _starts(sizes), MPI.BYTE]


def _starts(counts: Sequence[int]) -> list[int]:
    """Starts of consecutive runs of so many elements."""
    return list(accumulate(counts[:-1], initial=0))


def run_bytes(spec: VectorSpec) -> tuple[int, ...]:
    """Bytes of each rank's run in MPI's description."""
    from mpi4py import MPI

    array, counts, _, kind = spec
    size = 1 if kind == MPI.BYTE else array.itemsize
    return tuple(int(count) * size for count in counts)


def float_type(array: np.ndarray) -> Any:
    """MPI's datatype of an array of float32 or float64."""
    from mpi4py import MPI

    return MPI.FLOAT if array.dtype == np.float32 else MPI.DOUBLE
