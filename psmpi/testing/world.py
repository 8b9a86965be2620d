"""A world of threads: the calls of a communicator that psmpi makes, between threads of one process.

Four ranks cost no start of a process, and what goes wrong is told at once: a rank that raises ends the others, ranks
that all wait for what nobody sends are found without a timeout, and so are ranks whose collectives do not match. Sums
are made pair by pair, as MPICH makes short ones. What is sent is copied at once, as MPI does with small messages.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from psmpi.testing.hub import PATIENCE, Hub, Request, StoppedError

Result = TypeVar("Result")

# Seconds that ranks get to end after one of them has raised.
GRACE = 30.0


class Channel:
    """Messages of one tag from one rank to another: the n-th that is sent is the n-th that is asked for."""

    def __init__(self) -> None:
        self.arrived: dict[int, NDArray[Any]] = {}
        self.sent = self.asked = 0


class Meeting:
    """One collective: what each rank brings to it."""

    def __init__(self, kind: str):
        self.kind = kind
        self.values: dict[int, Any] = {}
        # Ranks that have what they need of it.
        self.through = 0


class Shared:
    """What the ranks of one communicator share. members: their numbers in the world."""

    def __init__(self, hub: Hub, members: Sequence[int]):
        self.hub, self.members = hub, tuple(members)
        self.meetings: dict[int, Meeting] = {}
        self.channels: defaultdict[tuple[int, int, int], Channel] = defaultdict(Channel)
        # Communicators made of this one.
        self.made: dict[Any, Shared] = {}

    def sub(self, key: Any, ranks: Sequence[int]) -> Shared:
        """The one of `ranks` that `key` names, made by whoever comes first."""
        with self.hub.lock:
            if key not in self.made:
                self.made[key] = Shared(self.hub, [self.members[rank] for rank in ranks])
            return self.made[key]


def _flat(array: NDArray[Any]) -> NDArray[Any]:
    if not array.flags.c_contiguous:
        raise ValueError(f"MPI takes contiguous arrays, not one with strides {array.strides}")
    return array.reshape(-1)


def _put(into: NDArray[Any], value: NDArray[Any], what: str) -> None:
    """Copy a message to where it was asked for; ValueError where the two do not fit."""
    into = _flat(into)
    if into.dtype != value.dtype or into.size != value.size:
        raise ValueError(f"{what}: {value.size} {value.dtype} come where {into.size} {into.dtype} are asked for")
    into[:] = value


def _runs(spec: Sequence[Any]) -> list[NDArray[Any]]:
    """The runs that [array, counts, starts, type] names, as views."""
    from mpi4py import MPI

    array, counts, starts, kind = spec
    vector = _flat(array).view(np.uint8) if kind is MPI.BYTE else _flat(array)
    return [vector[a : a + n] for a, n in zip(starts, counts, strict=True)]


def _reduced(values: Sequence[NDArray[Any]], op: Any = None, root: int = 0) -> NDArray[Any]:
    """The values of all ranks in one: neighbours in pairs, then pairs of pairs, from `root` on."""
    from mpi4py import MPI

    if op not in (None, MPI.SUM, MPI.MAX):
        raise NotImplementedError("an operation other than MPI.SUM and MPI.MAX")
    combine: np.ufunc = np.maximum if op == MPI.MAX else np.add
    found = [*values[root:], *values[:root]]
    while len(found) > 1:
        pairs = [combine(a, b) for a, b in zip(found[::2], found[1::2], strict=False)]
        found = pairs + found[2 * len(pairs) :]
    return found[0]


class Comm:
    """One rank's side of a communicator: the names are mpi4py's."""

    def __init__(self, shared: Shared, rank: int):
        self.shared, self.hub, self.rank, self.size = shared, shared.hub, rank, len(shared.members)
        # Messages to single ranks, so far.
        self.sent = 0
        self.calls = 0
        self.groups: defaultdict[tuple[int, ...], int] = defaultdict(int)
        self.group = SimpleNamespace(Incl=lambda ranks: SimpleNamespace(ranks=tuple(ranks), Free=lambda: None))

    # Communicators.

    def Create_group(self, group: Any) -> Comm:
        # The same ranks may make several, one after the other.
        self.groups[group.ranks] += 1
        shared = self.shared.sub(("group", group.ranks, self.groups[group.ranks]), group.ranks)
        return Comm(shared, group.ranks.index(self.rank))

    def Dup(self) -> Comm:
        number = self.calls
        self.Barrier()
        return Comm(self.shared.sub(("copy", number), range(self.size)), self.rank)

    def Split_type(self, kind: Any) -> Comm:
        """All ranks: threads share their memory."""
        number = self.calls
        self.Barrier()
        return Comm(self.shared.sub(("host", number), range(self.size)), self.rank)

    def Free(self) -> None:
        """Nothing is held."""

    # Single messages.

    def _request(self, what: str, ready: Callable[[], bool], complete: Callable[[], None] | None = None) -> Request:
        return Request(self.hub, self.shared.members[self.rank], what, ready, complete)

    def Isend(self, array: NDArray[Any], dest: int, tag: int = 0) -> Request:
        message = _flat(array).copy()
        with self.hub.lock:
            self.hub.check()
            channel = self.shared.channels[self.rank, dest, tag]
            channel.arrived[channel.sent] = message
            channel.sent += 1
            self.hub.wake([self.shared.members[dest]])
        self.sent += 1
        return self._request(f"Isend to {dest}, tag {tag}", lambda: True)

    def Irecv(self, array: NDArray[Any], source: int, tag: int = 0) -> Request:
        what = f"Recv from {source}, tag {tag}"
        with self.hub.lock:
            self.hub.check()
            channel = self.shared.channels[source, self.rank, tag]
            number = channel.asked
            channel.asked += 1
        return self._request(
            what, lambda: number in channel.arrived, lambda: _put(array, channel.arrived.pop(number), what)
        )

    def Send(self, array: NDArray[Any], dest: int, tag: int = 0) -> None:
        self.Isend(array, dest, tag).Wait()

    def Recv(self, array: NDArray[Any], source: int, tag: int = 0) -> None:
        self.Irecv(array, source, tag).Wait()

    def Sendrecv(
        self, array: NDArray[Any], dest: int, sendtag: int, into: NDArray[Any], source: int, recvtag: int
    ) -> None:
        request = self.Irecv(into, source, recvtag)
        self.Isend(array, dest, sendtag)
        request.Wait()

    # Collectives.

    def _meet(
        self, kind: str, value: Any, complete: Callable[[list[Any]], None] | None = None, root: int | None = None
    ) -> Request:
        """Bring `value` to the next collective. complete: takes the values of all ranks, by rank, when they are there.

        root: the only rank whose value is needed, the others' being None. Without `complete` nothing is waited for.
        """
        number, self.calls = self.calls, self.calls + 1
        what = f"{kind}, collective {number} of {self.size} ranks"
        with self.hub.lock:
            self.hub.check()
            meeting = self.shared.meetings.setdefault(number, Meeting(kind))
            if meeting.kind != kind:
                raise RuntimeError(f"rank {self.rank} calls {what}, where others call {meeting.kind}")
            values = meeting.values
            values[self.rank] = value
            if complete is None:
                self._through(number, meeting)
            self.hub.wake(self.shared.members)

        def ready() -> bool:
            return len(values) == self.size if root is None else root in values

        def finish() -> None:
            assert complete is not None
            complete([values.get(rank) for rank in range(self.size)])
            self._through(number, meeting)

        return self._request(what, (lambda: True) if complete is None else ready, None if complete is None else finish)

    def _through(self, number: int, meeting: Meeting) -> None:
        meeting.through += 1
        if meeting.through == self.size:
            del self.shared.meetings[number]

    def Barrier(self) -> None:
        self._meet("Barrier", None, lambda values: None).Wait()

    def Ibcast(self, array: NDArray[Any], root: int = 0) -> Request:
        kind = f"Bcast from {root}"
        if self.rank == root:
            return self._meet(kind, _flat(array).copy())
        return self._meet(kind, None, lambda values: _put(array, values[root], kind), root)

    def Bcast(self, array: NDArray[Any], root: int = 0) -> None:
        self.Ibcast(array, root).Wait()

    def Ireduce(self, sent: Any, into: NDArray[Any] | None, op: Any = None, root: int = 0) -> Request:
        kind = f"Reduce to {root}"
        if self.rank != root:
            return self._meet(kind, _flat(sent).copy())
        assert into is not None
        place = into
        return self._meet(kind, self._own(sent, into), lambda values: _put(place, _reduced(values, op, root), kind))

    def Reduce(self, sent: Any, into: NDArray[Any] | None, op: Any = None, root: int = 0) -> None:
        self.Ireduce(sent, into, op, root).Wait()

    def Iallreduce(self, sent: Any, into: NDArray[Any], op: Any = None) -> Request:
        return self._meet(
            "Allreduce", self._own(sent, into), lambda values: _put(into, _reduced(values, op), "Allreduce")
        )

    def Allreduce(self, sent: Any, into: NDArray[Any], op: Any = None) -> None:
        self.Iallreduce(sent, into, op).Wait()

    def _own(self, sent: Any, into: NDArray[Any]) -> NDArray[Any]:
        from mpi4py import MPI

        own: NDArray[Any] = _flat(into if sent is MPI.IN_PLACE else sent).copy()
        return own

    def Reduce_scatter(self, sent: Any, into: NDArray[Any], counts: Sequence[int]) -> None:
        """In place: what is behind the sum is anything then, here NaN."""
        start, own = sum(counts[: self.rank]), counts[self.rank]

        def complete(values: list[Any]) -> None:
            found = _reduced(values)[start : start + own]
            _flat(into)[:] = np.nan
            _flat(into)[:own] = found

        self._meet("Reduce_scatter", self._own(sent, into), complete).Wait()

    def Scatterv(self, sent: Sequence[Any] | None, into: Any, root: int = 0) -> None:
        kind = f"Scatterv from {root}"
        if self.rank == root:
            assert sent is not None
            self._meet(kind, [run.copy() for run in _runs(sent)]).Wait()
        else:
            self._meet(kind, None, lambda values: _put(into, values[root][self.rank], kind), root).Wait()

    def Gatherv(self, sent: Any, into: Sequence[Any] | None, root: int = 0) -> None:
        kind = f"Gatherv to {root}"
        if self.rank != root:
            self._meet(kind, _flat(sent).copy()).Wait()
            return
        assert into is not None
        places = _runs(into)

        def complete(values: list[Any]) -> None:
            for rank, place in enumerate(places):
                if rank != root:
                    _put(place, values[rank], kind)

        self._meet(kind, None, complete).Wait()

    def Gather(self, sent: NDArray[Any], into: NDArray[Any] | None, root: int = 0) -> None:
        kind = f"Gather to {root}"
        if self.rank != root:
            self._meet(kind, _flat(sent).copy()).Wait()
            return
        assert into is not None
        rows = into
        self._meet(kind, _flat(sent).copy(), lambda values: _put(rows, np.concatenate(values), kind)).Wait()

    def Allgather(self, sent: NDArray[Any], into: NDArray[Any]) -> None:
        self._meet(
            "Allgather", _flat(sent).copy(), lambda values: _put(into, np.concatenate(values), "Allgather")
        ).Wait()

    def Allgatherv(self, sent: Any, into: Sequence[Any]) -> None:
        from mpi4py import MPI

        places = _runs(into)
        own = places[self.rank] if sent is MPI.IN_PLACE else _flat(sent)

        def complete(values: list[Any]) -> None:
            for place, value in zip(places, values, strict=True):
                _put(place, value, "Allgatherv")

        self._meet("Allgatherv", own.copy(), complete).Wait()

    def Alltoallv(self, sent: Sequence[Any], into: Sequence[Any]) -> None:
        places = _runs(into)

        def complete(values: list[Any]) -> None:
            for place, value in zip(places, values, strict=True):
                _put(place, value[self.rank], "Alltoallv")

        self._meet("Alltoallv", [run.copy() for run in _runs(sent)], complete).Wait()

    def allgather(self, value: Any) -> list[Any]:
        found: list[Any] = []
        self._meet("allgather", value, found.extend).Wait()
        return found

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        found = self.allgather(value)
        return found if self.rank == root else None

    def allreduce(self, value: Any) -> Any:
        return sum(self.allgather(value))


def run_ranks(
    size: int, work: Callable[[Any], Result], *, patience: float = PATIENCE, timeout: float | None = None
) -> list[Result]:
    """work(world) on every rank of a world of threads; what each returns.

    What a rank raises ends the others and is raised here: that of the lowest rank where several raise. Ranks that wait
    for what nobody sends are a DeadlockError, and so is a call that takes longer than `patience` seconds; a world that
    takes longer than `timeout` seconds is a TimeoutError.
    """
    hub = Hub(size, patience)
    shared = Shared(hub, range(size))
    found: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def rank(number: int) -> None:
        try:
            found[number] = work(Comm(shared, number))
        except StoppedError:
            pass
        except BaseException as error:
            errors[number] = error
            hub.stop(error)
        finally:
            hub.end(number)

    threads = [threading.Thread(target=rank, args=(k,), name=f"rank {k}", daemon=True) for k in range(size)]
    for thread in threads:
        thread.start()
    try:
        _join(threads, hub, timeout)
    except BaseException as error:
        hub.stop(error)
        raise
    if errors:
        raise errors[min(errors)]
    if hub.error is not None:
        raise hub.error
    return [found[number] for number in range(size)]


def _join(threads: Sequence[threading.Thread], hub: Hub, timeout: float | None) -> None:
    """Wait for all threads: `timeout` seconds, or GRACE once the world has ended."""
    end = None if timeout is None else time.monotonic() + timeout
    grace = None
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5 if end is not None or hub.stopped else 1.0)
            now = time.monotonic()
            if hub.stopped and grace is None:
                grace = now + GRACE
            if grace is not None and now > grace and thread.is_alive():
                return
            if end is not None and now > end and not hub.stopped:
                with hub.lock:
                    report = hub.report()
                raise TimeoutError(f"no end within {timeout:.0f} s: {report}")
