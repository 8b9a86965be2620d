"""Communicators whose ranks sleep while they wait, for hosts with more ranks than cores.

MPI waits by polling, which takes the core from a rank that computes. `patient` wraps the communicator of all ranks, and
communicators made from it wait in the same way; transfers and methods do not know of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.comm.bells import Bells
from psmpi.comm.protocol import Communicator, Request, Sent, VectorSpec
from psmpi.errors import UserError

# The environment variable that sets how ranks wait: spin or sleep.
SETTING = "PSMPI_WAIT"
# Number of tests before the first sleep, for messages that have arrived or are about to.
LOOKS = 3
# Seconds that a rank sleeps at most, first, after long, and between these as a share of the time waited so far: where
# those that it waits for ring its bell, which they do not for all that MPI does on the way; and where they do not.
CALLED, UNCALLED = (5e-3, 2e-2, 1 / 4), (2e-4, 4e-3, 1 / 8)
# Number of short sleeps, and seconds of each, at the beginning of a wait and after a bell: a message under way makes
# progress only while both ranks test it.
NAPS, NAP = 8, 1e-4
# Messages of up to so many bytes are sent without waiting for the receiver.
AT_ONCE = 4096
# Wake-ups without effect after which a rank wakes others in turn: its test may have let a message make progress.
TURNS = 4


class PatientRequest:
    """A request whose rank sleeps while it waits. It wakes ranks that may wait for its begin (`before`) and its end
    (`after`), given by their numbers on this host.
    """

    __slots__ = ("after", "bells", "naps", "request")

    def __init__(
        self,
        request: Request,
        bells: Bells,
        before: Sequence[int],
        after: Sequence[int],
        naps: tuple[float, float, float],
    ):
        self.request, self.bells, self.after, self.naps = request, bells, after, naps
        bells.ring(before)

    def Test(self) -> bool:
        if not self.request.Test():
            return False
        self.bells.ring(self.after)
        return True

    def Wait(self) -> object:
        request, bells = self.request, self.bells
        if bells.awake:
            while not request.Test():
                os.sched_yield()
        elif not any(request.Test() for _ in range(LOOKS)):
            begun, turns, (shortest, longest, share) = time.monotonic(), TURNS, self.naps
            short = NAPS
            bells.arm()
            while not request.Test():
                nap = NAP if short else min(longest, max(shortest, share * (time.monotonic() - begun)))
                short = max(0, short - 1)
                if bells.sleep(nap):
                    short = NAPS
                    if turns and not request.Test():
                        turns -= 1
                        bells.ring(self.after)
                bells.arm()
            bells.disarm()
        bells.ring(self.after)
        return None


class Patient:
    """A communicator of mpi4py whose blocking calls are made of non-blocking ones.

    Blocking and non-blocking collectives do not match each other, so all ranks of the job use it, or none.
    """

    def __init__(self, comm: Any, bells: Bells, places: Sequence[int]):
        self.comm, self.bells, self.rank, self.size = comm, bells, comm.rank, comm.size
        # For each rank of the communicator its number on this host, -1 for ranks elsewhere and for this rank.
        self.host_numbers = list(places)
        self.host_peers = [place for place in places if place >= 0]
        called = bells.call is not None and len(self.host_peers) == self.size - 1
        self.naps = CALLED if called else UNCALLED

    def _made(self, comm: Any) -> Patient:
        ranks = range(comm.size)
        numbers = comm.group.Translate_ranks(list(ranks), self.comm.group)
        return Patient(comm, self.bells, [self.host_numbers[rank] for rank in numbers])

    def _sent(self, request: Request, rank: int) -> PatientRequest:
        return PatientRequest(request, self.bells, self._on_host(rank), (), self.naps)

    def _received(self, request: Request, rank: int, nbytes: int) -> PatientRequest:
        return PatientRequest(request, self.bells, (), self._on_host(rank) if nbytes > AT_ONCE else (), self.naps)

    def _on_host(self, rank: int) -> Sequence[int]:
        place = self.host_numbers[rank]
        return (place,) if place >= 0 else ()

    def _rooted(self, request: Request, root: int, out: bool, nbytes: int, tree: bool) -> PatientRequest:
        """The request of a collective from (`out`) or to a root; tree: whether some ranks pass messages on."""
        handing = tree and self.size > 3
        peers = self.host_peers if handing or self.rank == root else self._on_host(root)
        gives = (self.rank == root) == out
        after = peers if handing or (not gives and nbytes > AT_ONCE) else ()
        return PatientRequest(request, self.bells, peers if gives else (), after, self.naps)

    def _among(self, request: Request, nbytes: int) -> PatientRequest:
        """The request of a collective among all ranks."""
        after = self.host_peers if self.size > 2 or nbytes > AT_ONCE else ()
        return PatientRequest(request, self.bells, self.host_peers, after, self.naps)

    # Communicators.

    @property
    def group(self) -> Any:
        return self.comm.group

    def Create_group(self, group: Any, /) -> Patient:
        return self._made(self.comm.Create_group(group))

    def Dup(self) -> Patient:
        return Patient(self.comm.Dup(), self.bells, self.host_numbers)

    def Split_type(self, kind: int, /) -> Patient:
        return self._made(self.comm.Split_type(kind))

    def Free(self) -> None:
        self.comm.Free()

    def Abort(self, status: int, /) -> object:
        return self.comm.Abort(status)

    def Barrier(self) -> None:
        self._among(self.comm.Ibarrier(), 0).Wait()

    # Messages.

    def Send(self, buffer: np.ndarray, /, dest: int) -> None:
        self.Isend(buffer, dest, 0).Wait()

    def Recv(self, buffer: np.ndarray, /, source: int) -> None:
        self.Irecv(buffer, source, 0).Wait()

    def Isend(self, buffer: np.ndarray, /, dest: int, tag: int = 0) -> Request:
        return self._sent(self.comm.Isend(buffer, dest, tag), dest)

    def Irecv(self, buffer: np.ndarray, /, source: int, tag: int = 0) -> Request:
        return self._received(self.comm.Irecv(buffer, source, tag), source, buffer.nbytes)

    def Sendrecv(
        self, sent: np.ndarray, dest: int, sent_tag: int, into: np.ndarray, source: int, into_tag: int, /
    ) -> None:
        coming = self.Irecv(into, source, into_tag)
        self.Isend(sent, dest, sent_tag).Wait()
        coming.Wait()

    # From and to a root.

    def Bcast(self, buffer: np.ndarray, root: int, /) -> None:
        self.Ibcast(buffer, root).Wait()

    def Ibcast(self, buffer: np.ndarray, root: int, /) -> Request:
        return self._rooted(self.comm.Ibcast(buffer, root), root, True, buffer.nbytes, tree=True)

    def Reduce(self, sent: Sent, into: np.ndarray | None, /, *, root: int) -> None:
        self.Ireduce(sent, into, root=root).Wait()

    def Ireduce(self, sent: Sent, into: np.ndarray | None, /, *, root: int) -> Request:
        nbytes = 0 if into is None else into.nbytes
        return self._rooted(self.comm.Ireduce(sent, into, root=root), root, False, nbytes, tree=True)

    def Scatterv(self, sent: VectorSpec | None, into: Sent, /, *, root: int) -> None:
        nbytes = into.nbytes if sent is None else 0
        self._rooted(self.comm.Iscatterv(sent, into, root=root), root, True, nbytes, tree=False).Wait()

    def Gather(self, sent: np.ndarray, into: np.ndarray | None, /, *, root: int) -> None:
        self._rooted(self.comm.Igather(sent, into, root=root), root, False, sent.nbytes, tree=True).Wait()

    def Gatherv(self, sent: Sent, into: VectorSpec | None, /, *, root: int) -> None:
        nbytes = 0 if into is None else into[0].nbytes
        self._rooted(self.comm.Igatherv(sent, into, root=root), root, False, nbytes, tree=False).Wait()

    # Among all.

    def Allreduce(self, sent: Sent, into: np.ndarray, /, *op: Any) -> None:
        self._among(self.comm.Iallreduce(sent, into, *op), into.nbytes).Wait()

    def Iallreduce(self, sent: Sent, into: np.ndarray, /) -> Request:
        return self._among(self.comm.Iallreduce(sent, into), into.nbytes)

    def Reduce_scatter(self, sent: Sent, into: np.ndarray, counts: Sequence[int], /) -> None:
        self.Ireduce_scatter(sent, into, counts).Wait()

    def Ireduce_scatter(self, sent: Sent, into: np.ndarray, counts: Sequence[int], /) -> Request:
        return self._among(self.comm.Ireduce_scatter(sent, into, counts), into.nbytes)

    def Allgather(self, sent: np.ndarray, into: np.ndarray, /) -> None:
        self._among(self.comm.Iallgather(sent, into), into.nbytes).Wait()

    def Allgatherv(self, sent: Sent, into: VectorSpec, /) -> None:
        self.Iallgatherv(sent, into).Wait()

    def Iallgatherv(self, sent: Sent, into: VectorSpec, /) -> Request:
        return self._among(self.comm.Iallgatherv(sent, into), into[0].nbytes)

    def Alltoallv(self, sent: VectorSpec, into: VectorSpec, /) -> None:
        self._among(self.comm.Ialltoallv(sent, into), into[0].nbytes).Wait()


def patient(world: Any, ranks: int, cores: int) -> Any:
    """Wrap `world` in a communicator whose ranks sleep, if ranks outnumber the cores of a host; else return it.

    ranks, cores: of this rank's host. PSMPI_WAIT of rank 0, spin or sleep, overrides that; UserError for another value.
    All ranks call it.
    """
    if world.size == 1:
        return world
    from mpi4py import MPI

    said = os.environ.get(SETTING, "") if world.rank == 0 else ""
    answers = {"": 0, "spin": 1, "sleep": 2}
    if said not in answers:
        raise UserError(f"{SETTING}={said}: expected spin or sleep")
    answer = np.array([int(ranks > cores), answers[said]])
    world.Allreduce(MPI.IN_PLACE, answer, MPI.MAX)
    crowded, decided = answer.tolist()
    if decided == 1 or not (crowded or decided):
        return world
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    bells = Bells(local)
    numbers = local.group.Translate_ranks(list(range(local.size)), world.group)
    places = [-1] * world.size
    for place, rank in enumerate(numbers):
        places[rank] = place if rank != world.rank else -1
    local.Free()
    return Patient(world, bells, places)


def settle(world: Communicator, cores: Sequence[int], computes: bool) -> None:
    """Choose how ranks of a `Patient` communicator wait. All ranks call it. cores: those that this rank may use.

    If the ranks of a host that compute have a core each, each is bound to a core and yields it, while the others, such
    as masters, sleep. (Without binding Linux now and then lets two ranks share a core for some milliseconds while
    another core is idle.) If more ranks compute than there are cores, all ranks yield and none sleeps: they wait for
    short times, and for ranks that need the core.
    """
    inner: Any = world
    while not isinstance(inner, Patient):
        inner = getattr(inner, "comm", None)
        if inner is None:
            return
    local = inner.Split_type(_shared_memory())
    padded = np.zeros(8193, np.uint8)
    padded[list(cores)], padded[-1] = 1, computes
    rows = np.empty((local.size, len(padded)), np.uint8)
    local.Allgather(padded, rows)
    local.Free()
    computing, available = int(rows[:, -1].sum()), int(rows[:, :-1].any(axis=0).sum())
    if len(rows) > available:
        inner.bells.awake = bool(computes) or computing > available
    # Ranks with different sets of cores were bound by the launcher.
    alike = bool((rows[:, :-1] == rows[0, :-1]).all())
    if computes and alike and computing <= available < len(rows) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores[int(rows[: local.rank, -1].sum())]})


def _shared_memory() -> int:
    from mpi4py import MPI

    return MPI.COMM_TYPE_SHARED
