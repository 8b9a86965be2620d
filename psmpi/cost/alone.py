"""A communicator of a rank without the others: calls return at once and are recorded, and nothing is sent."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.comm.group import run_bytes
from psmpi.comm.protocol import Request, Sent, VectorSpec
from psmpi.comm.watch.flight import spans
from psmpi.cost.program import Call, Program
from psmpi.cost.windows import AloneWindows

# Number of tests after which a request is done, for callers that only test.
LOOKS = 1000


class Notebook:
    """The program of a rank so far, and the start time of its current computing."""

    def __init__(self) -> None:
        self.program = Program()
        self.made: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.since = time.perf_counter()

    def clear(self) -> None:
        """Begin a new program."""
        self.program = Program()
        self.since = time.perf_counter()

    def end_step(self) -> None:
        """Record the end of a step."""
        now = time.perf_counter()
        self.program.rest.append(now - self.since)
        self.program.ends.append(len(self.program.calls))
        self.since = time.perf_counter()


class Ranks:
    """A group of ranks, from which a communicator can be made."""

    def __init__(self, ranks: Sequence[int]):
        self.ranks = tuple(ranks)

    def Incl(self, ranks: Sequence[int], /) -> Ranks:
        return Ranks([self.ranks[rank] for rank in ranks])

    def Free(self) -> None:
        """Do nothing: there is nothing to free."""


class Done:
    """A finished request; the wait for it is recorded."""

    def __init__(self, comm: Alone, place: int):
        self.comm, self.place, self.program = comm, place, comm.book.program
        self.waited, self.tests = False, 0

    def Test(self) -> bool:
        """Whether the request counts as done: not at once, since it overlaps with other work."""
        self.tests += 1
        if self.tests > LOOKS:
            self._wait()
        return self.waited

    def Wait(self) -> object:
        self._wait()
        return None

    def _wait(self) -> None:
        if not self.waited:
            self.waited = True
            # Requests from before this program count as done.
            if self.program is self.comm.book.program:
                self.comm.note("Wait", self.place, -1, ())


class Alone:
    """A communicator on one of its ranks, without the others, whose messages are zeros.

    of_host: for each rank of the job the number of its host.
    """

    def __init__(self, book: Notebook, kind: str, ranks: Sequence[int], rank: int, of_host: Sequence[int]):
        self.book, self.ranks, self.of_host = book, tuple(ranks), of_host
        self.rank, self.size = self.ranks.index(rank), len(self.ranks)
        book.made[kind, self.ranks] += 1
        self.name = f"{kind} {book.made[kind, self.ranks]} {spans(self.ranks)}"
        self.collectives = 0

    def note(self, name: str, number: int, peer: int, sizes: Sequence[int]) -> int:
        """Record a call; returns its index in the program."""
        book = self.book
        seconds = time.perf_counter() - book.since
        calls = book.program.calls
        calls.append(Call(seconds, name, self.name, self.ranks, number, peer, tuple(sizes)))
        book.since = time.perf_counter()
        return len(calls) - 1

    def _collective(self, name: str, peer: int, sizes: Sequence[int], *arrived: Any) -> int:
        self.collectives += 1
        place = self.note(name, self.collectives, peer, sizes)
        return self._clear(place, arrived)

    def _clear(self, place: int, arrived: Sequence[Any]) -> int:
        """Fill a received buffer with zeros, outside the time of computing."""
        for array in arrived:
            if isinstance(array, np.ndarray):
                array.fill(0)
        self.book.since = time.perf_counter()
        return place

    # Communicators.

    @property
    def windows(self) -> AloneWindows:
        return AloneWindows(self.rank, self.size, [self.of_host[rank] for rank in self.ranks])

    @property
    def group(self) -> Ranks:
        return Ranks(self.ranks)

    def _of(self, kind: str, ranks: Sequence[int]) -> Alone:
        return Alone(self.book, kind, ranks, self.ranks[self.rank], self.of_host)

    def Create_group(self, group: Any, /) -> Alone:
        return self._of("group", group.ranks)

    def Dup(self) -> Alone:
        return self._of("copy", self.ranks)

    def Split_type(self, kind: int, /) -> Alone:
        here = self.of_host[self.ranks[self.rank]]
        return self._of("host", [rank for rank in self.ranks if self.of_host[rank] == here])

    def Free(self) -> None:
        """Do nothing: there is nothing to free."""

    def Abort(self, status: int, /) -> object:
        raise SystemExit(status)

    def Barrier(self) -> None:
        self._collective("Barrier", -1, (0,))

    # Messages.

    def Send(self, buffer: np.ndarray, /, dest: int) -> None:
        self.note("Send", 0, dest, (buffer.nbytes,))

    def Recv(self, buffer: np.ndarray, /, source: int) -> None:
        self._clear(self.note("Recv", 0, source, (buffer.nbytes,)), [buffer])

    def Isend(self, buffer: np.ndarray, /, dest: int, tag: int = 0) -> Request:
        return Done(self, self.note("Isend", tag, dest, (buffer.nbytes,)))

    def Irecv(self, buffer: np.ndarray, /, source: int, tag: int = 0) -> Request:
        return Done(self, self._clear(self.note("Irecv", tag, source, (buffer.nbytes,)), [buffer]))

    def Sendrecv(
        self, sent: np.ndarray, dest: int, sent_tag: int, into: np.ndarray, source: int, into_tag: int, /
    ) -> None:
        coming = self.Irecv(into, source, into_tag)
        self.Isend(sent, dest, sent_tag).Wait()
        coming.Wait()

    # From and to a root.

    def Bcast(self, buffer: np.ndarray, root: int, /) -> None:
        self._collective("Bcast", root, (buffer.nbytes,), *self._unless(root, buffer))

    def Ibcast(self, buffer: np.ndarray, root: int, /) -> Request:
        return Done(self, self._collective("Ibcast", root, (buffer.nbytes,), *self._unless(root, buffer)))

    def _unless(self, root: int, buffer: Any) -> tuple[Any, ...]:
        return () if self.rank == root else (buffer,)

    def Reduce(self, sent: Sent, into: np.ndarray | None, /, *, root: int) -> None:
        self._collective("Reduce", root, (_summed(sent, into),))

    def Ireduce(self, sent: Sent, into: np.ndarray | None, /, *, root: int) -> Request:
        return Done(self, self._collective("Ireduce", root, (_summed(sent, into),)))

    def Scatterv(self, sent: VectorSpec | None, into: Sent, /, *, root: int) -> None:
        sizes = run_bytes(sent) if sent is not None else (into.nbytes,)
        self._collective("Scatterv", root, sizes, *self._unless(root, into))

    def Gather(self, sent: np.ndarray, into: np.ndarray | None, /, *, root: int) -> None:
        self._collective("Gather", root, (sent.nbytes,))
        if into is not None:
            into[...] = sent

    def Gatherv(self, sent: Sent, into: VectorSpec | None, /, *, root: int) -> None:
        self._collective("Gatherv", root, run_bytes(into) if into is not None else (sent.nbytes,))

    # Among all.

    def Allreduce(self, sent: Sent, into: np.ndarray, /, *op: Any) -> None:
        self._collective("Allreduce", -1, (into.nbytes,))
        _keep(sent, into)

    def Iallreduce(self, sent: Sent, into: np.ndarray, /) -> Request:
        place = self._collective("Iallreduce", -1, (into.nbytes,))
        _keep(sent, into)
        return Done(self, place)

    def Reduce_scatter(self, sent: Sent, into: np.ndarray, counts: Sequence[int], /) -> None:
        self._collective("Reduce_scatter", -1, [into.itemsize * count for count in counts])

    def Ireduce_scatter(self, sent: Sent, into: np.ndarray, counts: Sequence[int], /) -> Request:
        return Done(self, self._collective("Ireduce_scatter", -1, [into.itemsize * count for count in counts]))

    def Allgather(self, sent: np.ndarray, into: np.ndarray, /) -> None:
        self._collective("Allgather", -1, [sent.nbytes] * self.size)
        into[...] = sent

    def Allgatherv(self, sent: Sent, into: VectorSpec, /) -> None:
        sizes = run_bytes(into)
        self._collective("Allgatherv", -1, sizes)
        self._share(sent, into, sizes)

    def Iallgatherv(self, sent: Sent, into: VectorSpec, /) -> Request:
        sizes = run_bytes(into)
        place = self._collective("Iallgatherv", -1, sizes)
        self._share(sent, into, sizes)
        return Done(self, place)

    def Alltoallv(self, sent: VectorSpec, into: VectorSpec, /) -> None:
        self._collective("Alltoallv", -1, run_bytes(sent), into[0])

    def _share(self, sent: Sent, into: VectorSpec, sizes: Sequence[int]) -> None:
        """Fill each rank's run with the values of this rank's run, as far as they reach."""
        whole = into[0].reshape(-1).view(np.uint8)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        at, own = starts[self.rank], sizes[self.rank]
        payload = sent.reshape(-1).view(np.uint8) if isinstance(sent, np.ndarray) else whole[at : at + own].copy()
        for start, size in zip(starts, sizes, strict=True):
            count = min(size, own)
            whole[start : start + count] = payload[:count]
            whole[start + count : start + size] = 0
        self.book.since = time.perf_counter()


def _summed(sent: Sent, into: np.ndarray | None) -> int:
    return int(into.nbytes if into is not None else sent.nbytes)


def _keep(sent: Sent, into: np.ndarray) -> None:
    if isinstance(sent, np.ndarray):
        into[...] = sent
