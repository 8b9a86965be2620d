"""The base classes of transfers: linear maps between vectors of ranks, their adjoints and accounts of messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.comm.group import all_done, wait_all
from psmpi.comm.protocol import Request

# Source and destination, ranks of the job, and the bytes that go from one to the other.
Message = tuple[int, int, int]
# Numbers of minibatches in flight become tags below this, which every MPI has.
TAGS = 1 << 15


@dataclass(frozen=True)
class Step:
    """The step whose messages are asked for: samples of its minibatch, number of its round."""

    batch: int = 1
    round: int = 0


class Transfer:
    """A move of values from `src`, this rank's vector on the side of the owners, to `dst`, on the side of the users.

    Vectors are contiguous arrays, or None on a rank that has none there; where both are the same memory, nothing is
    copied. All ranks of the transfer make the same calls in the same order.
    """

    def forward(self, src: Any, dst: Any) -> None:
        """dst = F src: every user gets the values that it needs. What is not moved stays as it is."""
        raise NotImplementedError

    def backward(self, dst: Any, src: Any) -> None:
        """src = F* dst: every element that forward moves becomes the sum over all places that it went to.

        <F x, y> = <x, F* y> for all x and y, over the elements that are moved; one that several ranks have in `src`
        has the same value on each, and counts once. `dst` may be used up.
        """
        raise NotImplementedError

    def messages(self, step: Step, back: bool = False) -> list[Message]:
        """The messages of `forward`, or `backward`, of all ranks in a step, from plans that every rank knows.

        Collectives count as `Group` counts them: from and to the root, all-to-all ones from each rank to each other,
        an all-reduce around a ring. What stays on a rank is no message.
        """
        raise NotImplementedError

    def stage(self, src: Any) -> None:
        """Begin to get ready what forward sends from here, so that transfers made one after the other overlap."""

    def stage_back(self, dst: Any, src: Any) -> None:
        """Begin to get ready what backward sends from here."""


class Handle:
    """A transfer under way. Its vectors are not to be touched until `poll` is true or `finish` has returned."""

    def __init__(self, requests: Sequence[Request], arrive: Callable[[], None] | None = None):
        self.requests, self.arrive, self.done = requests, arrive, False

    def poll(self) -> bool:
        """Whether it is done; drives it on without waiting."""
        if not self.done and all_done(self.requests):
            self._end()
        return self.done

    def finish(self) -> None:
        """Wait until it is done."""
        if not self.done:
            wait_all(self.requests)
            self._end()

    def _end(self) -> None:
        self.done = True
        if self.arrive is not None:
            self.arrive()


class Overlapping(Transfer):
    """A transfer that goes on beside other work, several of them at once.

    number: of the minibatch. Between two ranks it tells those in flight apart; all ranks begin in the same order.
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
    """Copy what stays on a rank, unless one of the two is not there or they are one array."""
    if values is not None and into is not None and values is not into:
        into[...] = values


def to_others(ranks: Sequence[int], rank: int, nbytes: int) -> list[Message]:
    """The same to each of the other ranks."""
    return [(rank, other, nbytes) for other in ranks if other != rank]


def around(ranks: Sequence[int], nbytes: int) -> list[Message]:
    """An all-reduce of so many bytes as `Group` counts it: around a ring."""
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
