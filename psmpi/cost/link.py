"""Networks: the time of a message between two ranks as a function of its bytes, measured or given."""

from __future__ import annotations

import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from psmpi.errors import UserError

# Sizes of timed messages in bytes; limits in seconds for one message, and for all messages of a size.
SIZES = (0, 256, 1024, 4096, 16384, 65536, 1 << 18, 1 << 20, 1 << 22)
LONGEST, PATIENCE = 1.0, 2.0


@dataclass(frozen=True)
class Link:
    """Times of messages as increasing points (bytes, seconds), with linear interpolation.

    The slope of the last two points is the time a byte occupies the link, during which it takes no other message. The
    rest of a time is latency, during which the link is free.
    """

    times: tuple[tuple[int, float], ...]

    @staticmethod
    def of(latency: float, bandwidth: float) -> Link:
        """The link with this latency in seconds and bandwidth in bytes a second."""
        return Link(((0, latency), (1 << 20, latency + (1 << 20) / bandwidth)))

    @staticmethod
    def measured(comm: Any, a: int = 0, b: int = 1) -> Link | None:
        """Measure the link between two ranks by round trips; returns None on ranks other than `a`."""
        return _measure(comm, a, b)

    @property
    def per_byte(self) -> float:
        """Seconds a byte of large messages."""
        (small, before), (large, after) = self.times[-2:]
        return max(0.0, (after - before) / (large - small))

    def seconds(self, nbytes: int) -> float:
        """Seconds from the send call to the end of the receive call, without other messages."""
        sizes = [size for size, _ in self.times]
        k = min(max(1, bisect_left(sizes, nbytes)), len(sizes) - 1)
        (a, before), (b, after) = self.times[k - 1], self.times[k]
        if nbytes > b:
            return after + (nbytes - b) * self.per_byte
        return before + (after - before) * (nbytes - a) / (b - a)

    def parts(self, nbytes: int) -> tuple[float, float]:
        """(latency, occupation) of a message in seconds: the link is free, or busy."""
        busy = nbytes * self.per_byte
        whole = self.seconds(nbytes)
        return max(0.0, whole - busy), min(busy, whole)


@dataclass(frozen=True)
class Network:
    """Hosts and the links between them; all messages of a host to other hosts share its link.

    of_host: for each rank the number of its host.
    """

    of_host: tuple[int, ...]
    within: Link
    between: Link

    def link(self, a: int, b: int) -> Link:
        """The link between two ranks."""
        return self.within if self.of_host[a] == self.of_host[b] else self.between


def save(links: dict[str, Link], path: Path) -> None:
    """Write links by name, as JSON."""
    path.write_text(json.dumps({name: [list(pair) for pair in link.times] for name, link in links.items()}) + "\n")


def load(path: Path) -> dict[str, Link]:
    """Read a file of `save`. UserError for other files."""
    try:
        content = json.loads(path.read_text())
        if not content or not set(content) <= {"within", "between"}:
            raise ValueError
        return {str(name): Link(_pairs(pairs)) for name, pairs in content.items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{path}: no links: expected the file that 'psmpi bench links --save' writes") from None


def _pairs(points: Sequence[Sequence[float]]) -> tuple[tuple[int, float], ...]:
    pairs = tuple((int(size), float(seconds)) for size, seconds in points)
    if len(pairs) < 2 or any(a >= b for (a, _), (b, _) in pairwise(pairs)):
        raise ValueError
    if pairs[0][0] < 0 or any(seconds < 0 or not np.isfinite(seconds) for _, seconds in pairs):
        raise ValueError
    return pairs


def _measure(comm: Any, a: int, b: int) -> Link | None:
    """Time messages there and back between two ranks of an MPI communicator; the link on `a`, None elsewhere."""
    times: list[tuple[int, float]] = []
    going = np.zeros(1)
    for size in SIZES:
        data, samples = np.zeros(size, np.uint8), list[float]()
        begun = time.perf_counter()
        # The first message is not timed: it sets up buffers.
        while len(samples) < 21:
            before = time.perf_counter()
            if comm.rank == a:
                comm.Send(data, b)
                comm.Recv(data, b)
            elif comm.rank == b:
                comm.Recv(data, a)
                comm.Send(data, a)
            now = time.perf_counter()
            samples.append((now - before) / 2)
            # Rank `a` decides whether to continue.
            going[0] = now - begun < PATIENCE
            if comm.rank == a:
                comm.Send(going, b)
            elif comm.rank == b:
                comm.Recv(going, a)
            if not going[0] and len(samples) > 2:
                break
        times.append((size, median(samples[1:])))
        going[0] = times[-1][1] < LONGEST
        if comm.rank == a:
            comm.Send(going, b)
        elif comm.rank == b:
            comm.Recv(going, a)
        if not going[0]:
            break
    return Link(tuple(times)) if comm.rank == a else None
