"""What the ranks of one communicator of threads share, and the arrays and runs that MPI's calls name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psmpi.testing.hub import Hub


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


def flat(array: NDArray[Any]) -> NDArray[Any]:
    if not array.flags.c_contiguous:
        raise ValueError(f"MPI takes contiguous arrays, not one with strides {array.strides}")
    return array.reshape(-1)


def put(into: NDArray[Any], value: NDArray[Any], what: str) -> None:
    """Copy a message to where it was asked for; ValueError where the two do not fit."""
    into = flat(into)
    if into.dtype != value.dtype or into.size != value.size:
        raise ValueError(f"{what}: {value.size} {value.dtype} come where {into.size} {into.dtype} are asked for")
    into[:] = value


def spoil(into: NDArray[Any]) -> None:
    """Make numbers of what is to come, which nobody may look at before, no numbers."""
    if into.dtype.kind == "f":
        into.fill(np.nan)


def runs_of(spec: Sequence[Any]) -> list[NDArray[Any]]:
    """The runs that [array, counts, starts, type] names, as views."""
    from mpi4py import MPI

    array, counts, starts, kind = spec
    vector = flat(array).view(np.uint8) if kind is MPI.BYTE else flat(array)
    return [vector[a : a + n] for a, n in zip(starts, counts, strict=True)]


def reduced(values: Sequence[NDArray[Any]], op: Any = None, root: int = 0) -> NDArray[Any]:
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
