"""State that the ranks of a communicator of threads share, and conversions of the buffers of MPI calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psmpi.testing.hub import Hub


class Channel:
    """Messages with one tag from one rank to another: the n-th send matches the n-th receive."""

    def __init__(self) -> None:
        self.arrived: dict[int, NDArray[Any]] = {}
        self.sent = self.asked = 0


class Meeting:
    """One collective call: the value that each rank contributes."""

    def __init__(self, kind: str):
        self.kind = kind
        self.values: dict[int, Any] = {}
        # Number of ranks that have completed the call.
        self.through = 0


class Shared:
    """State that the ranks of one communicator share. members: the world rank of each of its ranks."""

    def __init__(self, hub: Hub, members: Sequence[int]):
        self.hub, self.members = hub, tuple(members)
        self.meetings: dict[int, Meeting] = {}
        self.channels: defaultdict[tuple[int, int, int], Channel] = defaultdict(Channel)
        # Communicators that were created from this one, by key.
        self.made: dict[Any, Shared] = {}

    def sub(self, key: Any, ranks: Sequence[int]) -> Shared:
        """The state of the communicator of `ranks` with this key; the first caller creates it."""
        with self.hub.lock:
            if key not in self.made:
                self.made[key] = Shared(self.hub, [self.members[rank] for rank in ranks])
            return self.made[key]


def flat(array: NDArray[Any]) -> NDArray[Any]:
    if not array.flags.c_contiguous:
        raise ValueError(f"MPI needs a contiguous array, but this one has strides {array.strides}")
    return array.reshape(-1)


def put(into: NDArray[Any], value: NDArray[Any], what: str) -> None:
    """Copy a received message into a buffer; ValueError if dtypes or sizes differ. what: the call, for the message."""
    into = flat(into)
    if into.dtype != value.dtype or into.size != value.size:
        raise ValueError(
            f"{what}: the message has {value.size} {value.dtype}, the receive buffer {into.size} {into.dtype}"
        )
    into[:] = value


def spoil(into: NDArray[Any]) -> None:
    """Fill a floating point receive buffer with NaN, so that reading it before the message arrives shows."""
    if into.dtype.kind == "f":
        into.fill(np.nan)


def runs_of(spec: Sequence[Any]) -> list[NDArray[Any]]:
    """Views of the runs of an MPI buffer [array, counts, starts, type], one for each rank."""
    from mpi4py import MPI

    array, counts, starts, kind = spec
    vector = flat(array).view(np.uint8) if kind is MPI.BYTE else flat(array)
    return [vector[a : a + n] for a, n in zip(starts, counts, strict=True)]


def reduced(values: Sequence[NDArray[Any]], op: Any = None, root: int = 0) -> NDArray[Any]:
    """Sum or maximum of the values of all ranks, in a fixed order: a binary tree of neighbours, starting at `root`."""
    from mpi4py import MPI

    if op not in (None, MPI.SUM, MPI.MAX):
        raise NotImplementedError("the reduction must be MPI.SUM or MPI.MAX")
    combine: np.ufunc = np.maximum if op == MPI.MAX else np.add
    remaining = [*values[root:], *values[:root]]
    while len(remaining) > 1:
        pairs = [combine(a, b) for a, b in zip(remaining[::2], remaining[1::2], strict=False)]
        remaining = pairs + remaining[2 * len(pairs) :]
    return remaining[0]
