"""Latency and bandwidth between two ranks, by round trips, within bounds of time and bytes."""

from __future__ import annotations

import time
from statistics import median
from typing import NamedTuple

import numpy as np

from psmpi.comm.protocol import Communicator

# Sizes of the timed messages in bytes, and the largest number of round trips of each size.
SIZES, TIMES = (8, 1 << 16, 1 << 20, 1 << 22), (200, 50, 8, 8)


class Pace(NamedTuple):
    """Microseconds of a short message one way, and GB/s of messages of `nbytes` bytes, the largest timed size."""

    latency_us: float
    gigabytes: float
    nbytes: int


def ping_pong(comm: Communicator, a: int, b: int, seconds: float) -> Pace | None:
    """Messages between ranks `a` and `b`, which alone make this call; what `a` has measured, None on `b`.

    Rank `a` decides after each size, by the seconds that are left, whether and how often the next one goes; short ones
    and those of 64 kB go at least once. No rank sends more than the sum of SIZES times TIMES plus 2, 56 MB.
    """
    if comm.rank == b:
        _answer(comm, a)
        return None
    rows, buffers = [], np.zeros(SIZES[-1], np.uint8)
    end = time.perf_counter() + seconds
    for k, (size, most) in enumerate(zip(SIZES, TIMES, strict=True)):
        # The first message sets up connections and buffers.
        _call(comm, b, buffers[:size], 1)
        once = _call(comm, b, buffers[:size], 1)[0]
        left = end - time.perf_counter()
        rounds = min(most, int(left / 2 / max(2 * once, 1e-9)))
        times = _call(comm, b, buffers[:size], rounds) if rounds > 0 else [once]
        rows.append(median(times))
        grown = SIZES[k + 1] / size if 0 < k < len(SIZES) - 1 else 1
        if k and 4 * rows[-1] * grown > end - time.perf_counter():
            break
    comm.Send(np.array([0, 0]), b)
    nbytes = SIZES[len(rows) - 1]
    return Pace(1e6 * rows[0], nbytes / rows[-1] / 1e9, nbytes)


def _call(comm: Communicator, to: int, data: np.ndarray, rounds: int) -> list[float]:
    """Announce messages to the other rank; returns the seconds of each, one way."""
    comm.Send(np.array([data.size, rounds]), to)
    times = []
    for _ in range(rounds):
        before = time.perf_counter()
        comm.Send(data, to)
        comm.Recv(data, to)
        times.append((time.perf_counter() - before) / 2)
    return times


def _answer(comm: Communicator, to: int) -> None:
    """Send messages back until the other rank announces the end."""
    said, buffers = np.zeros(2, np.int64), np.zeros(SIZES[-1], np.uint8)
    while True:
        comm.Recv(said, to)
        size, rounds = said.tolist()
        if not size:
            return
        for _ in range(rounds):
            comm.Recv(buffers[:size], to)
            comm.Send(buffers[:size], to)
