"""The base classes of transfers: linear maps between vectors of ranks, their adjoints, and their messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.comm.group import all_done, wait_all
from psmpi.comm.protocol import Request

# (source, destination, bytes); ranks of the job.
Message = tuple[int, int, int]
# MPI guarantees tags below this; a tag is the number of a minibatch in flight modulo this.
TAGS = 1 << 15


@dataclass(frozen=True)
class Step:
    """A step, as an argument of `Transfer.messages`: samples of its minibatch, and number of its round."""

    batch: int = 1
    round: int = 0


class Transfer:
    """A movement of values from `src`, this rank's vector as an owner, to `dst`, its vector as a user.

    Vectors are contiguous arrays, or None on a rank without one. If both share memory, nothing is copied. All ranks of
    the transfer make the same calls in the same order.
    """

    def forward(self, src: Any, dst: Any) -> None:
        """dst = F src: each user receives the values that it needs. Other elements of dst keep their values."""
        raise NotImplementedError

    def backward(self, dst: Any, src: Any) -> None:
        """src = F* dst: each element that forward moves becomes the sum over all its destinations.

        <F x, y> = <x, F* y> for all x and y, over the moved elements. An element that several ranks have in `src` has
        the same value on each, and counts once. `dst` may be overwritten.
        """
        raise NotImplementedError

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        """All ranks' messages of `forward` (or with `back` of `backward`) in a step, from plans that each rank has.

        Collectives count as in `Group`: rooted ones from or to the root, all-to-all ones from each rank to each other,
        an all-reduce around a ring. Values that stay on their rank are no message.
        """
        raise NotImplementedError

    def stage(self, src: Any) -> None:
        """Begin to prepare the messages of forward, so that consecutive transfers overlap."""

    def stage_back(self, dst: Any, src: Any) -> None:
        """Begin to prepare the messages of backward."""


class Handle:
    """A transfer under way. Do not touch its vectors before `poll` returns True or `finish` returns."""

    def __init__(self, requests: Sequence[Request], arrive: Callable[[], None] | None = None):
        self.requests, self.arrive, self.done = requests, arrive, False

    def poll(self) -> bool:
        """Whether the transfer is done; makes progress without waiting."""
        if not self.done and all_done(self.requests):
            self._end()
        return self.done

    def finish(self) -> None:
        """Wait until the transfer is done."""
        if not self.done:
            wait_all(self.requests)
            self._end()

    def _end(self) -> None:
        self.done = True
        if self.arrive is not None:
            self.arrive()


class Overlapping(Transfer):
    """A transfer that overlaps with other work; several may be under way at once.

    number: of the minibatch, which tells transfers between two ranks apart. All ranks begin them in the same order.
    """

    def begin(self, src: Any, dst: Any, number: int = 0) -> Handle:
        """Begin forward."""
        raise NotImplementedError

    def begin_back(self, dst: Any, src: Any, number: int = 0) -> Handle:
        """Begin backward."""
        raise NotImplementedError

    def forward(self, src: Any, dst: Any) -> None:
        self.begin(src, dst).finish()

    def backward(self, dst: Any, src: Any) -> None:
        self.begin_back(dst, src).finish()


def keep(values: np.ndarray | None, into: np.ndarray | None) -> None:
    """Copy values that stay on their rank, unless one array is None or both are the same."""
    if values is not None and into is not None and values is not into:
        into[...] = values


def to_others(ranks: Sequence[int], rank: int, nbytes: int) -> list[Message]:
    """Messages of `nbytes` from `rank` to each other rank."""
    return [(rank, other, nbytes) for other in ranks if other != rank]


def around(ranks: Sequence[int], nbytes: int) -> list[Message]:
    """Messages of an all-reduce of `nbytes`, counted as a ring."""
    size = len(ranks)
    moved = 2 * (size - 1) * nbytes // size
    return [(rank, ranks[(k + 1) % size], moved) for k, rank in enumerate(ranks) if size > 1]


def turned(messages: Iterable[Message]) -> list[Message]:
    """The same messages from destination to source."""
    return [(destination, source, nbytes) for source, destination, nbytes in messages]


def totals(messages: Iterable[Message], rank: int) -> tuple[int, int]:
    """Bytes that a rank sends and receives, as its `Counter` counts them."""
    sent = received = 0
    for source, destination, nbytes in messages:
        sent += nbytes * (source == rank)
        received += nbytes * (destination == rank)
    return sent, received
