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
    """Payload bytes that this rank sent and received, collectives counted as flat (and all-to-all ones as rings)."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0

    def add(self, sent: int, received: int) -> None:
        self.sent += sent
        self.received += received

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Messages that do not count: they are no part of the training."""
        before = self.sent, self.received
        try:
            yield
        finally:
            self.sent, self.received = before


class Group:
    """Some ranks of the job, in an order. Ranks outside it, where `rank` is -1, must make none of its calls."""

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
        """MPI's communicator of the group: of two ranks or more, or of the whole world."""
        if self._comm is None:
            raise RuntimeError(f"no messages among the ranks {self.ranks}: this rank is outside, or alone")
        return self._comm

    def use_nccl(self, stream: Any) -> None:
        """From now on allreduce and allgatherv go from device to device; all ranks of the group make this call."""
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
        """Begin to send; the buffer is not to be written until the request is done."""
        request = self.comm.Isend(self.bridge.outgoing(buffer), to, tag)
        self.counter.add(buffer.nbytes, 0)
        return request

    def irecv(self, buffer: np.ndarray, source: int, tag: int = 0) -> Request:
        """Begin to receive; the buffer has `arrived`, which the caller tells the bridge, when the request is done."""
        request = self.comm.Irecv(self.bridge.incoming(buffer), source, tag)
        self.counter.add(0, buffer.nbytes)
        return request

    def ibcast(self, buffer: np.ndarray, root: int = 0) -> Request:
        """Begin bcast, on a group of two or more; elsewhere than on the root the buffer then has `arrived`."""
        at_root = self.rank == root
        request = self.comm.Ibcast(self.bridge.outgoing(buffer) if at_root else self.bridge.incoming(buffer), root)
        self.counter.add(buffer.nbytes * (self.size - 1) * at_root, buffer.nbytes * (not at_root))
        return request

    def ireduce(self, buffer: np.ndarray, root: int = 0) -> Request:
        """Begin reduce, on a group of two or more; the root's buffer holds its share, and then has `arrived`."""
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
        """Sum of all `buffer`s, on the root only: in its `into`, which holds the root's own share already."""
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
        """buffer = sum over the group, in place; 2 (P-1)/P of it is sent, as a ring does."""
        if self.size > 1:
            if self.nccl is not None:
                self.nccl.allreduce(buffer)
            else:
                self.comm.Allreduce(in_place(), self.bridge.outgoing(buffer))
                self.bridge.arrived(buffer)
            moved = 2 * (self.size - 1) * buffer.nbytes // self.size
            self.counter.add(moved, moved)

    def iallreduce(self, buffer: np.ndarray) -> Request:
        """Begin allreduce; `wait` ends it, and the buffer is not to be touched before. A request."""
        request = self.comm.Iallreduce(in_place(), self.bridge.outgoing(buffer))
        moved = 2 * (self.size - 1) * buffer.nbytes // self.size
        self.counter.add(moved, moved)
        return request

    def wait(self, buffer: np.ndarray, request: Request) -> None:
        """End what was begun on a buffer."""
        request.Wait()
        self.bridge.arrived(buffer)

    def gather_all(self, into: np.ndarray, counts: Sequence[int]) -> None:
        """Every rank's run of `into`, of `counts` elements one after the other, to all, in place; of any dtype."""
        if self.size > 1:
            self.comm.Allgatherv(in_place(), _runs(self.bridge.outgoing(into), counts))
            self.bridge.arrived(into)
            own = into.itemsize * counts[self.rank]
            self.counter.add(own * (self.size - 1), into.itemsize * sum(counts) - own)

    def reduce_scatter(self, buffer: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """Run k of `buffer`, of counts[k] elements, summed over the group, on rank k: the reverse of allgatherv.

        What is of another rank is sent to it once. Returns where the sum is, the front of the buffer, which is used up.
        """
        segment = buffer.reshape(-1)[: counts[self.rank]]
        if self.size > 1:
            self.comm.Reduce_scatter(in_place(), self.bridge.outgoing(buffer), list(counts))
            self.bridge.arrived(buffer)
            self.counter.add(buffer.itemsize * sum(counts) - segment.nbytes, segment.nbytes * (self.size - 1))
        return segment

    def ireduce_scatter(self, buffer: np.ndarray, counts: Sequence[int]) -> Request:
        """Begin reduce_scatter, on a group of two or more; the buffer then has `arrived`, its front holds the sum."""
        own = buffer.itemsize * counts[self.rank]
        request = self.comm.Ireduce_scatter(in_place(), self.bridge.outgoing(buffer), list(counts))
        self.counter.add(buffer.itemsize * sum(counts) - own, own * (self.size - 1))
        return request

    def allgather(self, buffer: np.ndarray, into: np.ndarray) -> None:
        """All ranks' buffers, of one size and any dtype in host memory, as the rows of `into` (size, ...)."""
        into[self.rank] = buffer
        self.gather_all(into, [buffer.size] * self.size)

    def alltoallv(
        self, buffer: np.ndarray, counts: Sequence[int], into: np.ndarray, received: Sequence[int] | None = None
    ) -> None:
        """Run k of `buffer`, of counts[k] elements in host memory, to rank k.

        Run j of `into` is that from rank j: of received[j] elements, by default as many as this rank has for itself.
        """
        arriving = [counts[self.rank]] * self.size if received is None else received
        if self.size == 1:
            into.reshape(-1)[: counts[0]] = buffer[: counts[0]]
            return
        self.comm.Alltoallv(_runs(buffer, counts), _runs(into, arriving))
        own = counts[self.rank]
        self.counter.add(buffer.itemsize * (sum(counts) - own), into.itemsize * (sum(arriving) - own))

    def agree(self, values: np.ndarray) -> np.ndarray:
        """Sum of `values` over the group, in place, bit-identical on all ranks; control data, not counted."""
        if self.size > 1:
            # Reduce then Bcast: an Allreduce may give ranks sums that differ in the last bit.
            if self.rank == 0:
                self.comm.Reduce(in_place(), values, root=0)
            else:
                self.comm.Reduce(values, None, root=0)
            self.comm.Bcast(values, 0)
        return values

    def same_bits(self, vector: np.ndarray) -> bool:
        """Whether all ranks hold the same bits of a vector in host memory, by their checksums; not counted."""
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
        """Elements [starts[k], + counts[k]) of the root's `source` go to rank k's `into`.

        moved: `pieces` of these, where they are known already.
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
        """The reverse of scatterv."""
        if self.rank == 0:
            wire = self.bridge.incoming(into)
            self.comm.Gatherv(in_place(), [wire, counts, starts, float_type(into)], root=0)
            self.bridge.arrived(into, moved or pieces(counts, starts))
            self.counter.add(0, into.itemsize * (sum(counts) - counts[0]))
        else:
            self.comm.Gatherv(self.bridge.outgoing(buffer), None, root=0)
            self.counter.add(buffer.nbytes, 0)

    def allgatherv(self, buffer: np.ndarray, into: np.ndarray, counts: Sequence[int]) -> None:
        """All ranks' buffers one after the other in everyone's `into`; each is sent on P - 1 times, as a ring does."""
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
        """Begin allgatherv, on a group of two or more; `into` then has `arrived`."""
        wire = [self.bridge.incoming(into), counts, _starts(counts), float_type(into)]
        request = self.comm.Iallgatherv(self.bridge.outgoing(buffer), wire)
        self.counter.add(buffer.nbytes * (self.size - 1), into.itemsize * sum(counts) - buffer.nbytes)
        return request


def all_done(requests: Sequence[Request]) -> bool:
    """Whether all requests are done; MPI goes on with them inside the call."""
    return all(request.Test() for request in requests)


def wait_all(requests: Sequence[Request]) -> None:
    """Wait for all requests."""
    for request in requests:
        request.Wait()


def pieces(counts: Sequence[int], starts: Sequence[int]) -> list[slice]:
    """The slices that a scatter or gather moves, those side by side as one."""
    slices: list[slice] = []
    for start, count in sorted(zip(starts, counts, strict=True)):
        if count and slices and slices[-1].stop == start:
            slices[-1] = slice(slices[-1].start, start + count)
        elif count:
            slices.append(slice(start, start + count))
    return slices


def in_place() -> Any:
    """MPI's word for: the values are in the other buffer already."""
    from mpi4py import MPI

    return MPI.IN_PLACE


def _runs(array: np.ndarray, counts: Sequence[int]) -> VectorSpec:
    """MPI's description of runs of `counts` elements of a contiguous array, one after the other, of any dtype."""
    from mpi4py import MPI

    sizes = [array.itemsize * count for count in counts]
    # float16 is no type of MPI's; nothing is computed with these.
    return [array, sizes, _starts(sizes), MPI.BYTE]


def _starts(counts: Sequence[int]) -> list[int]:
    """Where runs of so many elements begin that lie one after the other."""
    return list(accumulate(counts[:-1], initial=0))


def run_bytes(spec: VectorSpec) -> tuple[int, ...]:
    """Bytes of each rank's run, as calls with counts describe them."""
    from mpi4py import MPI

    array, counts, _, kind = spec
    size = 1 if kind == MPI.BYTE else array.itemsize
    return tuple(int(count) * size for count in counts)


def float_type(array: np.ndarray) -> Any:
    """MPI's datatype of an array of float32 or float64."""
    from mpi4py import MPI

    return MPI.FLOAT if array.dtype == np.float32 else MPI.DOUBLE
