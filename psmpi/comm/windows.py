"""Memory that ranks share or access by one-sided MPI; the only place with MPI windows.

`windows_of` gives those of a communicator: of MPI here, of worlds of threads those that their communicators bring.
All ranks make windows, and free them, at the same point and in the same order. Windows are of predefined types, and
updated by additions alone: MPI's accumulate calls are atomic for each element if all of them have one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from psmpi.comm.group import Counter
from psmpi.comm.protocol import Communicator
from psmpi.comm.watch.flight import bare

# Number of elements of the windows that are tested before others are made.
TESTED = 64


class Memory(Protocol):
    """Memory that the ranks of a host share, filled with zeros; each host has its own."""

    @property
    def bytes(self) -> np.ndarray: ...

    def sync(self) -> None:
        """Synchronize memory with other ranks; call it before and after a barrier."""

    def free(self) -> None: ...


class Sharded(Protocol):
    """A vector whose shards (`own` on this rank) all ranks read and add to."""

    @property
    def own(self) -> np.ndarray: ...

    def read(self, out: np.ndarray) -> None:
        """Fill `out` with all elements; each is read at some moment during the call."""

    def read_at(self, places: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` (n,) with the elements `places` (n,) int64, strictly increasing."""

    def add(self, values: np.ndarray) -> None:
        """Begin to add `values` to all elements. `values` may be overwritten after the call."""

    def add_at(self, places: np.ndarray, values: np.ndarray) -> None:
        """Begin to add values (n,) to the elements `places` (n,) int64, strictly increasing."""

    def flush(self) -> None:
        """Wait until all additions of this rank are done."""

    def sync(self) -> None:
        """Synchronize `own` with the additions of other ranks; call it before and after a barrier."""

    def free(self) -> None: ...


class Counters(Protocol):
    """Counters from 0 that all ranks increase and read."""

    def count(self, number: int, by: int = 1) -> int:
        """Add to a counter; returns its value before."""

    def read(self, out: np.ndarray) -> None:
        """Fill `out` (n,) int64 with the first n counters."""

    def free(self) -> None: ...


class Windows(Protocol):
    """A factory of windows among the ranks of a communicator."""

    @property
    def one_host(self) -> bool: ...

    def fault(self) -> str:
        """Test windows on some elements. Returns the fault, "" without one, the same on all ranks."""

    def memory(self, nbytes: int) -> Memory: ...

    def sharded(self, edges: Sequence[int], dtype: np.dtype, counter: Counter) -> Sharded:
        """Make a vector of zeros with elements edges[r] to edges[r + 1] on rank r. counter: of this rank's bytes."""

    def counters(self, count: int) -> Counters: ...


def windows_of(world: Communicator) -> Windows:
    """The windows of a communicator, inside any wrappers that record or wait."""
    inner = bare(world)
    own: Windows | None = getattr(inner, "windows", None)
    return MpiWindows(inner) if own is None else own


def _type_of(dtype: np.dtype) -> Any:
    from mpi4py import MPI

    return {np.dtype(np.float32): MPI.FLOAT, np.dtype(np.float64): MPI.DOUBLE, np.dtype(np.int64): MPI.INT64_T}[dtype]


class MpiWindows:
    """The factory of MPI windows."""

    def __init__(self, comm: Any):
        from mpi4py import MPI

        self.comm = comm
        local = comm.Split_type(MPI.COMM_TYPE_SHARED)
        apart = np.array([int(local.size < comm.size)])
        local.Free()
        comm.Allreduce(MPI.IN_PLACE, apart, MPI.MAX)
        self.one_host = not apart[0]

    def fault(self) -> str:
        return find_fault(self, self.comm)

    def memory(self, nbytes: int) -> MpiMemory:
        return MpiMemory(self.comm, nbytes)

    def sharded(self, edges: Sequence[int], dtype: np.dtype, counter: Counter) -> MpiSharded:
        return MpiSharded(self.comm, edges, dtype, counter)

    def counters(self, count: int) -> MpiCounters:
        return MpiCounters(self.comm, count)


class MpiMemory:
    """A shared-memory window on the first rank of a host. RuntimeError if other ranks see another size."""

    def __init__(self, comm: Any, nbytes: int):
        from mpi4py import MPI

        self.local = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.window = MPI.Win.Allocate_shared(nbytes if self.local.rank == 0 else 0, 1, comm=self.local)
        if self.window.Get_attr(MPI.WIN_MODEL) != MPI.WIN_UNIFIED:
            raise RuntimeError("windows have a public and a private copy of their memory")
        memory: Any = self.window.Shared_query(0)[0]
        self.bytes = np.frombuffer(memory, np.uint8)[:nbytes]
        self.window.Lock_all(MPI.MODE_NOCHECK)
        if self.local.rank == 0:
            self.bytes.fill(0)
        self.sync()
        self.local.Barrier()
        self.sync()

    def sync(self) -> None:
        self.window.Sync()

    def free(self) -> None:
        self.bytes = np.empty(0, np.uint8)
        self.window.Unlock_all()
        self.window.Free()
        self.local.Free()


class _MpiWindow:
    """A window of zeros that stays locked for all ranks; itemsize: the unit of displacements."""

    def __init__(self, comm: Any, count: int, dtype: np.dtype):
        from mpi4py import MPI

        self.rank, self.kind = comm.rank, _type_of(dtype)
        info = MPI.Info.Create()
        info.Set("accumulate_ordering", "none")
        info.Set("accumulate_ops", "same_op_no_op")
        self.window = MPI.Win.Allocate(max(1, count) * dtype.itemsize, dtype.itemsize, info, comm)
        info.Free()
        room: Any = self.window.tomemory()
        self.own: np.ndarray = np.frombuffer(room, dtype)[:count]
        self.own.fill(0)
        self.window.Lock_all(MPI.MODE_NOCHECK)
        self.window.Sync()
        comm.Barrier()

    def flush(self) -> None:
        self.window.Flush_all()

    def sync(self) -> None:
        self.window.Sync()

    def free(self) -> None:
        self.own = self.own[:0].copy()
        self.window.Unlock_all()
        self.window.Free()


class MpiSharded(_MpiWindow):
    """See `Sharded`."""

    def __init__(self, comm: Any, edges: Sequence[int], dtype: np.dtype, counter: Counter):
        super().__init__(comm, edges[comm.rank + 1] - edges[comm.rank], dtype)
        self.edges, self.counter, self.placeholder = list(edges), counter, np.empty(1, dtype)
        self.pairs = [(r, a, b) for r, (a, b) in enumerate(pairwise(edges)) if b > a]

    def read(self, out: np.ndarray) -> None:
        def get(rank: int, start: int, stop: int) -> Any:
            return self._get(out[start:stop], rank, [0, stop - start, self.kind])

        self._begin_all(get)
        self.counter.add(0, out.nbytes - self.own.nbytes)

    def add(self, values: np.ndarray) -> None:
        def put(rank: int, start: int, stop: int) -> Any:
            return self._put(values[start:stop], rank, [0, stop - start, self.kind])

        self._begin_all(put)
        self.counter.add(values.nbytes - self.own.nbytes, 0)

    def read_at(self, places: np.ndarray, out: np.ndarray) -> None:
        self._each_at(places, lambda at, rank, target: self._get(out[at], rank, target))
        self.counter.add(0, out.itemsize * self._remote_count(places))

    def add_at(self, places: np.ndarray, values: np.ndarray) -> None:
        self._each_at(places, lambda at, rank, target: self._put(values[at], rank, target))
        self.counter.add(values.itemsize * self._remote_count(places), 0)

    def _get(self, out: np.ndarray, rank: int, target: list[Any]) -> Any:
        from mpi4py import MPI

        return self.window.Rget_accumulate([self.placeholder, 0, self.kind], [out, self.kind], rank, target, MPI.NO_OP)

    def _put(self, values: np.ndarray, rank: int, target: list[Any]) -> Any:
        from mpi4py import MPI

        return self.window.Raccumulate([values, self.kind], rank, target, MPI.SUM)

    def _begin_all(self, begin: Callable[[int, int, int], Any]) -> None:
        from mpi4py import MPI

        MPI.Request.Waitall([begin(*shard) for shard in self.pairs])

    def _each_at(self, places: np.ndarray, begin: Callable[[slice, int, list[Any]], Any]) -> None:
        from mpi4py import MPI

        cuts, requests, kinds = np.searchsorted(places, self.edges), [], []
        for rank, start, _ in self.pairs:
            at = slice(int(cuts[rank]), int(cuts[rank + 1]))
            if at.start < at.stop:
                kind = self.kind.Create_indexed_block(1, (places[at] - start).astype(np.int32)).Commit()
                kinds.append(kind)
                requests.append(begin(at, rank, [0, 1, kind]))
        MPI.Request.Waitall(requests)
        for kind in kinds:
            kind.Free()

    def _remote_count(self, places: np.ndarray) -> int:
        """Number of elements in other ranks' shards."""
        first, last = np.searchsorted(places, self.edges[self.rank : self.rank + 2])
        return len(places) - int(last - first)


class MpiCounters(_MpiWindow):
    """Counters in a window of rank 0, see `Counters`."""

    def __init__(self, comm: Any, count: int):
        super().__init__(comm, count if comm.rank == 0 else 0, np.dtype(np.int64))
        self.one, self.before = np.empty(1, np.int64), np.empty(1, np.int64)

    def count(self, number: int, by: int = 1) -> int:
        from mpi4py import MPI

        self.one[0] = by
        self.window.Fetch_and_op(self.one, self.before, 0, number, MPI.SUM)
        self.window.Flush(0)
        return int(self.before[0])

    def read(self, out: np.ndarray) -> None:
        from mpi4py import MPI

        nothing, kind = [self.one, 0, self.kind], self.kind
        self.window.Get_accumulate(nothing, [out, kind], 0, [0, len(out), kind], MPI.NO_OP)
        self.window.Flush(0)


class MpiLock:
    """An exclusive MPI lock of a window on rank 0, for comparison in benchmarks."""

    def __init__(self, world: Communicator):
        from mpi4py import MPI

        self.window, self.exclusive = MPI.Win.Allocate(8, 8, comm=bare(world)), MPI.LOCK_EXCLUSIVE

    def acquire(self) -> None:
        self.window.Lock(0, self.exclusive)

    def release(self) -> None:
        self.window.Unlock(0)

    def free(self) -> None:
        self.window.Free()


def find_fault(windows: Windows, world: Communicator) -> str:
    """Test sharded windows and counters on some elements. Returns the fault, "" without one.

    All ranks call it, and get the same answer.
    """
    size, wrong = world.size, ""
    try:
        for dtype in (np.dtype(np.int64), np.dtype(np.float32)):
            wrong = wrong or _of_sums(windows, world, dtype)
        wrong = wrong or _of_tickets(windows, world)
    except Exception as error:
        # Any error of MPI counts: the library itself is under test.
        wrong = f"one-sided calls fail ({error})"
    texts = np.zeros((size, 200), np.uint8)
    own = np.zeros(200, np.uint8)
    text = wrong.encode()[:200]
    own[: len(text)] = np.frombuffer(text, np.uint8)
    world.Allgather(own, texts)
    return next(filter(None, (row.tobytes().rstrip(b"\0").decode(errors="replace") for row in texts)), "")


def _of_sums(windows: Windows, world: Communicator, dtype: np.dtype) -> str:
    edges = [TESTED * k // world.size for k in range(world.size + 1)]
    tried = windows.sharded(edges, dtype, Counter())
    sums, some = np.empty(TESTED, dtype), np.arange(0, TESTED, 3)
    tried.add(np.ones(TESTED, dtype))
    tried.add_at(some, np.ones(len(some), dtype))
    tried.flush()
    world.Barrier()
    tried.read(sums)
    expected = np.ones(TESTED, dtype)
    expected[some] += 1
    right = np.array_equal(sums, expected * world.size)
    tried.read_at(some, sums[: len(some)])
    right = right and bool((sums[: len(some)] == 2 * world.size).all())
    world.Barrier()
    tried.free()
    return "" if right else f"additions of {dtype} to windows get lost"


def _of_tickets(windows: Windows, world: Communicator) -> str:
    tried = windows.counters(1)
    own = np.array([tried.count(0) for _ in range(3)], np.int64)
    drawn = np.empty((world.size, 3), np.int64)
    world.Allgather(own, drawn)
    tried.free()
    return "" if sorted(drawn.reshape(-1).tolist()) == list(range(3 * world.size)) else "counters repeat numbers"
