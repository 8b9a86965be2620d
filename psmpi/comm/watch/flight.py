"""The flight recorder: the last operations of a rank, kept by communicators that record what goes through them.

`recorded` wraps the communicator of all ranks, and communicators made from it record, too; transfers and methods do not
know of it. A single rank records nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np

from psmpi.comm.patience import Patient
from psmpi.comm.protocol import Communicator, RankGroup, Request, Sent, VectorSpec, World

# Operations that are kept.
ROOM = 2000
# A record: name of the operation; its group, a place in `Flight.groups`, or NO_GROUP; of a collective its number among
# those of the group, from 1, else 0; root or other rank in the group, or -1; bytes; step of the training; times.
NAME, GROUP, NUMBER, PEER, BYTES, STEP, BEGUN, ENDED = range(8)
# Operations on files and the like: not between ranks.
NO_GROUP = -1
Record = list[Any]
# Operations that only begin something, and what is called when that is waited for.
BEGINS = ("Isend", "Irecv", "Ibcast", "Ireduce", "Iallreduce", "Ireduce_scatter", "Iallgatherv")
WAITS = {name: f"Wait({name})" for name in BEGINS}

now = time.monotonic


class Task:
    """A block that is recorded as one operation outside MPI, as reading a file. Operations do not nest."""

    __slots__ = ("flight", "name", "record")

    def __init__(self, flight: Flight, name: str):
        self.flight, self.name = flight, name

    def __enter__(self) -> None:
        self.record = self.flight.begin([self.name, NO_GROUP, 0, -1, 0, self.flight.step, now(), 0.0])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.record[ENDED] = now()


class Flight:
    """The last operations of one rank, in a ring of slots; another thread may read it at any time.

    count: operations so far. step: of the training, which the loop sets. groups: communicators that record here.
    """

    def __init__(self, room: int = ROOM):
        self.room = room
        self.ring: list[Record | None] = [None] * room
        self.count, self.step, self.earlier_seconds = 0, 0, 0.0
        self.groups: list[Recorded] = []
        self.made: dict[tuple[str, tuple[int, ...]], int] = {}

    def begin(self, record: Record) -> Record:
        """Record the begin of an operation, in place of the oldest record."""
        self.earlier_seconds = self.spent()
        # The count last: who reads it finds the record there.
        self.ring[self.count % self.room] = record
        self.count += 1
        return record

    def begin_wait(self, begun: Record) -> Record:
        """Record the begin of the wait for an operation that an earlier record began."""
        name, group, number, peer, nbytes, *_ = begun
        return self.begin([WAITS[name], group, number, peer, nbytes, self.step, now(), 0.0])

    def task(self, name: str) -> Task:
        """A block that is recorded as one operation."""
        return Task(self, name)

    def spent(self) -> float:
        """Seconds in all finished operations between ranks, waits included."""
        last = self.ring[(self.count - 1) % self.room]
        if last is None or last[GROUP] == NO_GROUP or not last[ENDED]:
            return self.earlier_seconds
        return self.earlier_seconds + float(last[ENDED] - last[BEGUN])

    def last(self) -> Record | None:
        """The last operation that began; it is under way while its end is 0."""
        return self.ring[(self.count - 1) % self.room]

    def records(self) -> list[Record]:
        """Copies of the records, oldest first."""
        end = self.count
        ring = list(self.ring)
        order = ring[end % self.room :] + ring[: end % self.room]
        return [list(record) for record in order if record is not None]

    def key(self, kind: str, ranks: tuple[int, ...]) -> str:
        """The key of a new communicator, the same on all its ranks, which make communicators in one order."""
        number = self.made[kind, ranks] = self.made.get((kind, ranks), 0) + 1
        return f"{kind} {number} {spans(ranks)}"


class RecordedRequest:
    """A request whose wait is an operation."""

    __slots__ = ("flight", "record", "request")

    def __init__(self, flight: Flight, request: Request, record: Record):
        self.flight, self.request, self.record = flight, request, record

    def Test(self) -> bool:
        return self.request.Test()

    def Wait(self) -> object:
        record = self.flight.begin_wait(self.record)
        result = self.request.Wait()
        record[ENDED] = now()
        return result


class Members:
    """A group of ranks that knows its members."""

    def __init__(self, group: RankGroup, ranks: Sequence[int]):
        self.group, self.ranks = group, tuple(ranks)

    def Incl(self, ranks: Sequence[int], /) -> Members:
        return Members(self.group.Incl(ranks), [self.ranks[rank] for rank in ranks])

    def Free(self) -> None:
        self.group.Free()


class Recorded:
    """A communicator that records its operations. ranks: its members, as ranks of the job; calls: its collectives."""

    def __init__(self, comm: Any, flight: Flight, kind: str, ranks: Sequence[int]):
        self.comm, self.flight, self.ranks, self.calls = comm, flight, tuple(ranks), 0
        self.key, self.place = flight.key(kind, self.ranks), len(flight.groups)
        self.rank = self.size = 0
        flight.groups.append(self)
        if comm is not None:
            self._take(comm)

    def _take(self, comm: Any) -> Recorded:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        return self

    def _collective(self, name: str, nbytes: int, peer: int = -1) -> Record:
        self.calls = number = self.calls + 1
        flight = self.flight
        return flight.begin([name, self.place, number, peer, nbytes, flight.step, now(), 0.0])

    def _message(self, name: str, nbytes: int, peer: int) -> Record:
        flight = self.flight
        return flight.begin([name, self.place, 0, peer, nbytes, flight.step, now(), 0.0])

    def _begun(self, request: Request, record: Record) -> Request:
        record[ENDED] = now()
        return RecordedRequest(self.flight, request, record)

    # Communicators.

    @property
    def group(self) -> Members:
        return Members(self.comm.group, self.ranks)

    def Create_group(self, group: Any, /) -> Recorded:
        made = Recorded(None, self.flight, "group", group.ranks)
        record = made._collective("Create_group", 0)
        made._take(self.comm.Create_group(group.group))
        record[ENDED] = now()
        return made

    def Dup(self) -> Recorded:
        record = self._collective("Dup", 0)
        made = self.comm.Dup()
        record[ENDED] = now()
        return Recorded(made, self.flight, "copy", self.ranks)

    def Split_type(self, kind: int, /) -> Recorded:
        record = self._collective("Split_type", 0)
        local = self.comm.Split_type(kind)
        ranks = np.empty(local.size, np.int64)
        local.Allgather(np.array([self.ranks[self.rank]]), ranks)
        record[ENDED] = now()
        return Recorded(local, self.flight, "host", ranks.tolist())

    def Free(self) -> None:
        self.comm.Free()

    def Abort(self, status: int, /) -> object:
        return self.comm.Abort(status)

    def Barrier(self) -> None:
        record = self._collective("Barrier", 0)
        self.comm.Barrier()
        record[ENDED] = now()

    # Messages.

    def Send(self, buffer: np.ndarray, /, dest: int) -> None:
        record = self._message("Send", buffer.nbytes, dest)
        self.comm.Send(buffer, dest)
        record[ENDED] = now()

    def Recv(self, buffer: np.ndarray, /, source: int) -> None:
        record = self._message("Recv", buffer.nbytes, source)
        self.comm.Recv(buffer, source)
        record[ENDED] = now()

    def Isend(self, buffer: np.ndarray, /, dest: int, tag: int = 0) -> Request:
        record = self._message("Isend", buffer.nbytes, dest)
        return self._begun(self.comm.Isend(buffer, dest, tag), record)

    def Irecv(self, buffer: np.ndarray, /, source: int, tag: int = 0) -> Request:
        record = self._message("Irecv", buffer.nbytes, source)
        return self._begun(self.comm.Irecv(buffer, source, tag), record)

    def Sendrecv(
        self, sent: np.ndarray, dest: int, sent_tag: int, into: np.ndarray, source: int, into_tag: int, /
    ) -> None:
        record = self._message("Sendrecv", sent.nbytes + into.nbytes, source)
        self.comm.Sendrecv(sent, dest, sent_tag, into, source, into_tag)
        record[ENDED] = now()

    # From and to a root.

    def Bcast(self, buffer: np.ndarray, root: int, /) -> None:
        record = self._collective("Bcast", buffer.nbytes, root)
        self.comm.Bcast(buffer, root)
        record[ENDED] = now()

    def Ibcast(self, buffer: np.ndarray, root: int, /) -> Request:
        record = self._collective("Ibcast", buffer.nbytes, root)
        return self._begun(self.comm.Ibcast(buffer, root), record)

    def Reduce(self, sent: Sent, into: np.ndarray | None, /, *, root: int) -> None:
        record = self._collective("Reduce", _nbytes(sent, into), root)
        self.comm.Reduce(sent, into, root=root)
        record[ENDED] = now()

    def Ireduce(self, sent: Sent, into: np.ndarray | None, /, *, root: int) -> Request:
        record = self._collective("Ireduce", _nbytes(sent, into), root)
        return self._begun(self.comm.Ireduce(sent, into, root=root), record)

    def Scatterv(self, sent: VectorSpec | None, into: Sent, /, *, root: int) -> None:
        record = self._collective("Scatterv", _nbytes(into, None if sent is None else sent[0]), root)
        self.comm.Scatterv(sent, into, root=root)
        record[ENDED] = now()

    def Gather(self, sent: np.ndarray, into: np.ndarray | None, /, *, root: int) -> None:
        record = self._collective("Gather", sent.nbytes, root)
        self.comm.Gather(sent, into, root=root)
        record[ENDED] = now()

    def Gatherv(self, sent: Sent, into: VectorSpec | None, /, *, root: int) -> None:
        record = self._collective("Gatherv", _nbytes(sent, None if into is None else into[0]), root)
        self.comm.Gatherv(sent, into, root=root)
        record[ENDED] = now()

    # Among all.

    def Allreduce(self, sent: Sent, into: np.ndarray, /, *op: Any) -> None:
        record = self._collective("Allreduce", into.nbytes)
        self.comm.Allreduce(sent, into, *op)
        record[ENDED] = now()

    def Iallreduce(self, sent: Sent, into: np.ndarray, /) -> Request:
        record = self._collective("Iallreduce", into.nbytes)
        return self._begun(self.comm.Iallreduce(sent, into), record)

    def Reduce_scatter(self, sent: Sent, into: np.ndarray, counts: Sequence[int], /) -> None:
        record = self._collective("Reduce_scatter", into.nbytes)
        self.comm.Reduce_scatter(sent, into, counts)
        record[ENDED] = now()

    def Ireduce_scatter(self, sent: Sent, into: np.ndarray, counts: Sequence[int], /) -> Request:
        record = self._collective("Ireduce_scatter", into.nbytes)
        return self._begun(self.comm.Ireduce_scatter(sent, into, counts), record)

    def Allgather(self, sent: np.ndarray, into: np.ndarray, /) -> None:
        record = self._collective("Allgather", into.nbytes)
        self.comm.Allgather(sent, into)
        record[ENDED] = now()

    def Allgatherv(self, sent: Sent, into: VectorSpec, /) -> None:
        record = self._collective("Allgatherv", into[0].nbytes)
        self.comm.Allgatherv(sent, into)
        record[ENDED] = now()

    def Iallgatherv(self, sent: Sent, into: VectorSpec, /) -> Request:
        record = self._collective("Iallgatherv", into[0].nbytes)
        return self._begun(self.comm.Iallgatherv(sent, into), record)

    def Alltoallv(self, sent: VectorSpec, into: VectorSpec, /) -> None:
        record = self._collective("Alltoallv", sent[0].nbytes + into[0].nbytes)
        self.comm.Alltoallv(sent, into)
        record[ENDED] = now()


def _nbytes(sent: Sent, other: Any) -> int:
    """Bytes of `sent`, or of `other` if `sent` is MPI.IN_PLACE."""
    nbytes = getattr(sent, "nbytes", None)
    return int(getattr(other, "nbytes", 0) if nbytes is None else nbytes)


def spans(ranks: Sequence[int]) -> str:
    """Increasing ranks in short form: "rank 3", "ranks 0-2 5"."""
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in ranges(ranks)]
    return f"rank{'s' if len(ranks) != 1 else ''} {' '.join(texts)}"


def ranges(ranks: Sequence[int]) -> list[list[int]]:
    """Ranks as pairs (first, last) of consecutive ones."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return parts


def recorded(world: World, flight: Flight | None = None) -> World:
    """Wrap the communicator of all ranks in a flight recorder, a new one by default; a single rank is not wrapped."""
    return Recorded(world, flight or Flight(), "world", range(world.size)) if world.size > 1 else world


def flight_of(comm: Communicator) -> Flight:
    """The recorder of a communicator; a new recorder of one operation if it has none."""
    return comm.flight if isinstance(comm, Recorded) else Flight(1)


@contextmanager
def receiving(comm: Communicator, source: int) -> Iterator[None]:
    """A block in which this rank waits for another one without MPI; it is recorded as a receive."""
    record = comm._message("Recv", 0, source) if isinstance(comm, Recorded) else None
    yield
    if record is not None:
        record[ENDED] = now()


def bare(comm: Communicator) -> Any:
    """The communicator of mpi4py inside the wrappers, for libraries that need it."""
    inner: Any = comm
    while isinstance(inner, (Recorded, Patient)):
        inner = inner.comm
    return inner
