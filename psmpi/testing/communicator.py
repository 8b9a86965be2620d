"""A communicator between threads of one process, with the part of mpi4py's interface that psmpi uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psmpi.testing.hub import Request
from psmpi.testing.shared import Meeting, Shared, flat, put, reduced, runs_of, spoil
from psmpi.testing.windows import ThreadWindows


class Comm:
    """One rank's view of a communicator. Methods have the names and arguments of mpi4py.MPI.Comm."""

    def __init__(self, shared: Shared, rank: int):
        self.shared, self.hub, self.rank, self.size = shared, shared.hub, rank, len(shared.members)
        # Number of point-to-point messages that this rank has sent.
        self.sent = 0
        self.calls = 0
        self.groups: defaultdict[tuple[int, ...], int] = defaultdict(int)
        self.group = SimpleNamespace(Incl=lambda ranks: SimpleNamespace(ranks=tuple(ranks), Free=lambda: None))

    # Communicators.

    @property
    def windows(self) -> ThreadWindows:
        """One-sided windows; replaces psmpi.comm.windows.MpiWindows."""
        return ThreadWindows(self)

    def Create_group(self, group: Any) -> Comm:
        # The same ranks may create several communicators: the count distinguishes them.
        self.groups[group.ranks] += 1
        shared = self.shared.sub(("group", group.ranks, self.groups[group.ranks]), group.ranks)
        return Comm(shared, group.ranks.index(self.rank))

    def Dup(self) -> Comm:
        number = self.calls
        self.Barrier()
        return Comm(self.shared.sub(("copy", number), range(self.size)), self.rank)

    def Split_type(self, kind: Any) -> Comm:
        """Return a communicator of all ranks, since threads of one process share their memory."""
        number = self.calls
        self.Barrier()
        return Comm(self.shared.sub(("host", number), range(self.size)), self.rank)

    def Free(self) -> None:
        """Do nothing: no resource needs to be released."""

    # Single messages.

    def _request(self, what: str, ready: Callable[[], bool], complete: Callable[[], None] | None = None) -> Request:
        return Request(self.hub, self.shared.members[self.rank], what, ready, complete)

    @staticmethod
    def _keeping(request: Request, array: NDArray[Any], message: NDArray[Any]) -> Request:
        """Return `request`, which then checks on completion that `array` still equals the copy `message`."""
        request.sent = array, message
        return request

    def Isend(self, array: NDArray[Any], dest: int, tag: int = 0) -> Request:
        message = flat(array).copy()
        with self.hub.lock:
            self.hub.check()
            channel = self.shared.channels[self.rank, dest, tag]
            channel.arrived[channel.sent] = message
            channel.sent += 1
            self.hub.wake([self.shared.members[dest]])
        self.sent += 1
        return self._keeping(self._request(f"Isend to {dest}, tag {tag}", lambda: True), array, message)

    def Irecv(self, array: NDArray[Any], source: int, tag: int = 0) -> Request:
        what = f"Recv from {source}, tag {tag}"
        spoil(array)
        with self.hub.lock:
            self.hub.check()
            channel = self.shared.channels[source, self.rank, tag]
            number = channel.asked
            channel.asked += 1
        return self._request(
            what, lambda: number in channel.arrived, lambda: put(array, channel.arrived.pop(number), what)
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
        """Contribute `value` to the next collective; RuntimeError if other ranks have begun a different collective.

        complete: called with the values of all ranks, ordered by rank, once they have arrived. Without it the request
        is ready at once. root: the only rank whose value is needed; the values of the other ranks may be None.
        """
        number, self.calls = self.calls, self.calls + 1
        what = f"{kind}, collective {number} of {self.size} ranks"
        with self.hub.lock:
            self.hub.check()
            meeting = self.shared.meetings.setdefault(number, Meeting(kind))
            if meeting.kind != kind:
                raise RuntimeError(f"rank {self.rank} calls {what}, but other ranks call {meeting.kind}")
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
            message = flat(array).copy()
            return self._keeping(self._meet(kind, message), array, message)
        spoil(array)
        return self._meet(kind, None, lambda values: put(array, values[root], kind), root)

    def Bcast(self, array: NDArray[Any], root: int = 0) -> None:
        self.Ibcast(array, root).Wait()

    def Ireduce(self, sent: Any, into: NDArray[Any] | None, op: Any = None, root: int = 0) -> Request:
        kind = f"Reduce to {root}"
        if self.rank != root:
            message = flat(sent).copy()
            return self._keeping(self._meet(kind, message), sent, message)
        assert into is not None
        place = into
        return self._meet(kind, self._own(sent, into), lambda values: put(place, reduced(values, op, root), kind))

    def Reduce(self, sent: Any, into: NDArray[Any] | None, op: Any = None, root: int = 0) -> None:
        self.Ireduce(sent, into, op, root).Wait()

    def Iallreduce(self, sent: Any, into: NDArray[Any], op: Any = None) -> Request:
        return self._meet(
            "Allreduce", self._own(sent, into), lambda values: put(into, reduced(values, op), "Allreduce")
        )

    def Allreduce(self, sent: Any, into: NDArray[Any], op: Any = None) -> None:
        self.Iallreduce(sent, into, op).Wait()

    def _own(self, sent: Any, into: NDArray[Any]) -> NDArray[Any]:
        from mpi4py import MPI

        own: NDArray[Any] = flat(into if sent is MPI.IN_PLACE else sent).copy()
        return own

    def Ireduce_scatter(self, sent: Any, into: NDArray[Any], counts: Sequence[int]) -> Request:
        """Write this rank's segment of the sum to the beginning of `into` and NaN to the rest.

        MPI leaves the rest of the buffer undefined when the call is made in place.
        """
        start, own = sum(counts[: self.rank]), counts[self.rank]

        def complete(values: list[Any]) -> None:
            segment = reduced(values)[start : start + own]
            flat(into)[:] = np.nan
            flat(into)[:own] = segment

        own_values = self._own(sent, into)
        spoil(into)
        return self._meet("Reduce_scatter", own_values, complete)

    def Reduce_scatter(self, sent: Any, into: NDArray[Any], counts: Sequence[int]) -> None:
        self.Ireduce_scatter(sent, into, counts).Wait()

    def Scatterv(self, sent: Sequence[Any] | None, into: Any, root: int = 0) -> None:
        kind = f"Scatterv from {root}"
        if self.rank == root:
            assert sent is not None
            self._meet(kind, [run.copy() for run in runs_of(sent)]).Wait()
        else:
            self._meet(kind, None, lambda values: put(into, values[root][self.rank], kind), root).Wait()

    def Gatherv(self, sent: Any, into: Sequence[Any] | None, root: int = 0) -> None:
        kind = f"Gatherv to {root}"
        if self.rank != root:
            self._meet(kind, flat(sent).copy()).Wait()
            return
        assert into is not None
        places = runs_of(into)

        def complete(values: list[Any]) -> None:
            for rank, place in enumerate(places):
                if rank != root:
                    put(place, values[rank], kind)

        self._meet(kind, None, complete).Wait()

    def Gather(self, sent: NDArray[Any], into: NDArray[Any] | None, root: int = 0) -> None:
        kind = f"Gather to {root}"
        if self.rank != root:
            self._meet(kind, flat(sent).copy()).Wait()
            return
        assert into is not None
        rows = into
        self._meet(kind, flat(sent).copy(), lambda values: put(rows, np.concatenate(values), kind)).Wait()

    def Allgather(self, sent: NDArray[Any], into: NDArray[Any]) -> None:
        self._meet("Allgather", flat(sent).copy(), lambda values: put(into, np.concatenate(values), "Allgather")).Wait()

    def Iallgatherv(self, sent: Any, into: Sequence[Any]) -> Request:
        from mpi4py import MPI

        places = runs_of(into)
        own = places[self.rank] if sent is MPI.IN_PLACE else flat(sent)

        def complete(values: list[Any]) -> None:
            for place, value in zip(places, values, strict=True):
                put(place, value, "Allgatherv")

        payload = own.copy()
        for place in places:
            spoil(place)
        return self._meet("Allgatherv", payload, complete)

    def Allgatherv(self, sent: Any, into: Sequence[Any]) -> None:
        self.Iallgatherv(sent, into).Wait()

    def Alltoallv(self, sent: Sequence[Any], into: Sequence[Any]) -> None:
        places = runs_of(into)

        def complete(values: list[Any]) -> None:
            for place, value in zip(places, values, strict=True):
                put(place, value[self.rank], "Alltoallv")

        self._meet("Alltoallv", [run.copy() for run in runs_of(sent)], complete).Wait()

    def allgather(self, value: Any) -> list[Any]:
        values: list[Any] = []
        self._meet("allgather", value, values.extend).Wait()
        return values

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        values = self.allgather(value)
        return values if self.rank == root else None

    def allreduce(self, value: Any) -> Any:
        return sum(self.allgather(value))
