"""Protocols of a communicator: the calls that psmpi makes, as mpi4py and the tests' world of threads have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

# [array, counts, starts, MPI datatype]: one run of the array per rank.
VectorSpec = list[Any]
# An array, or MPI.IN_PLACE.
Sent = Any


class Request(Protocol):
    """A message or collective under way."""

    def Test(self) -> bool: ...

    def Wait(self) -> object: ...


class RankGroup(Protocol):
    """Ranks from which `Create_group` makes a communicator."""

    def Incl(self, ranks: Sequence[int], /) -> RankGroup: ...

    def Free(self) -> None: ...


class Communicator(Protocol):
    """Messages and collectives among ranks; buffers are contiguous, on the host or, for a GPU-aware MPI, a device."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def Split_type(self, kind: int, /) -> Communicator: ...

    def Free(self) -> None: ...

    def Abort(self, status: int, /) -> object: ...

    def Barrier(self) -> None: ...

    # Messages.

    def Send(self, buffer: np.ndarray, /, dest: int) -> None: ...

    def Recv(self, buffer: np.ndarray, /, source: int) -> None: ...

    def Isend(self, buffer: np.ndarray, /, dest: int, tag: int) -> Request: ...

    def Irecv(self, buffer: np.ndarray, /, source: int, tag: int) -> Request: ...

    def Sendrecv(
        self, sent: np.ndarray, dest: int, sent_tag: int, into: np.ndarray, source: int, into_tag: int, /
    ) -> None: ...

    # From and to a root.

    def Bcast(self, buffer: np.ndarray, root: int, /) -> None: ...

    def Ibcast(self, buffer: np.ndarray, root: int, /) -> Request: ...

    def Reduce(self, sent: Sent, into: np.ndarray | None, /, *, root: int) -> None: ...

    def Ireduce(self, sent: Sent, into: np.ndarray | None, /, *, root: int) -> Request: ...

    def Scatterv(self, sent: VectorSpec | None, into: Sent, /, *, root: int) -> None: ...

    def Gather(self, sent: np.ndarray, into: np.ndarray | None, /, *, root: int) -> None: ...

    def Gatherv(self, sent: Sent, into: VectorSpec | None, /, *, root: int) -> None: ...

    # Among all.

    def Allreduce(self, sent: Sent, into: np.ndarray, op: Any = ..., /) -> None: ...

    def Iallreduce(self, sent: Sent, into: np.ndarray, /) -> Request: ...

    def Reduce_scatter(self, sent: Sent, into: np.ndarray, counts: Sequence[int], /) -> None: ...

    def Allgather(self, sent: np.ndarray, into: np.ndarray, /) -> None: ...

    def Allgatherv(self, sent: Sent, into: VectorSpec, /) -> None: ...

    def Alltoallv(self, sent: VectorSpec, into: VectorSpec, /) -> None: ...


class World(Communicator, Protocol):
    """A communicator from whose ranks others can be made."""

    @property
    def group(self) -> RankGroup: ...

    def Create_group(self, group: Any, /) -> Communicator: ...
