"""Split the time of a step on each rank into computing, optimizer, waiting and transfers, from records of operations.

An operation waits until the ranks that it needs have begun their operations, and transfers from then on. A message
needs its sender. A collective from a root needs the root; one to a root needs all other ranks, on the root only. Any
other collective needs all ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from psmpi.comm.watch.flight import BEGINS

# The parts of the time of a step.
KINDS = ("compute", "optimizer", "wait", "transfer")
FROM_ROOT = frozenset({"Bcast", "Ibcast", "Scatterv"})
TO_ROOT = frozenset({"Reduce", "Ireduce", "Gather", "Gatherv"})
SENDS, RECEIVES = frozenset({"Send", "Isend"}), frozenset({"Recv", "Irecv"})


class Operation(NamedTuple):
    """An operation of a rank; begun and ended are seconds on a clock that all ranks share.

    key: the key of its group. members: the world ranks in the group. number: position of a collective among those of
    the group, from 1; 0 for other operations. peer: root or other rank, in the group; -1 if there is none. since: for a
    wait, the position of the operation of this rank that it waits for; else -1.
    """

    name: str
    key: str
    members: tuple[int, ...]
    number: int
    peer: int
    nbytes: int
    begun: float
    ended: float
    since: int = -1


@dataclass
class Track:
    """The record of one rank: its operations, and (begin, end) of its optimizer's work and of its steps, in seconds."""

    rank: int
    operations: list[Operation] = field(default_factory=list)
    optimizing: list[tuple[float, float]] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)


class Meetings:
    """The times at which ranks began their operations, to find those that other ranks wait for."""

    def __init__(self, tracks: Iterable[Track]):
        # Begin of each collective by rank, and begins of messages by group, sender and receiver, in their order.
        self.collectives: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
        self.sent: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        self.received: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        self.exchanged: dict[tuple[str, int], list[float]] = defaultdict(list)
        # Number of a message among those with its group, sender and receiver, by rank and position of the operation.
        self.numbers: dict[tuple[int, int], int] = {}
        for track in tracks:
            for place, one in enumerate(track.operations):
                self._note(track.rank, place, one)

    def _note(self, rank: int, place: int, one: Operation) -> None:
        if one.number and one.since < 0:
            self.collectives[one.key, one.number][rank] = one.begun
        elif one.name in SENDS | RECEIVES:
            other, sends = one.members[one.peer], one.name in SENDS
            ends = (rank, other) if sends else (other, rank)
            waiting = (self.sent if sends else self.received)[one.key, ends[0], ends[1]]
            self.numbers[rank, place] = len(waiting)
            waiting.append(one.begun)
        elif one.name == "Sendrecv":
            self.numbers[rank, place] = len(self.exchanged[one.key, rank])
            self.exchanged[one.key, rank].append(one.begun)

    def ready(self, track: Track, place: int) -> float:
        """The time at which all ranks that an operation needs had begun; 0 if it needs none, or the time is unknown.

        place: the position of the operation in the track.
        """
        one = track.operations[place]
        if one.name in BEGINS:
            return 0.0
        first, start = (one, place) if one.since < 0 else (track.operations[one.since], one.since)
        if first.number:
            begun = self.collectives[first.key, first.number]
            root = first.members[first.peer] if first.peer >= 0 else -1
            if first.name in FROM_ROOT:
                return begun.get(root, 0.0) if track.rank != root else 0.0
            if first.name in TO_ROOT and track.rank != root:
                return 0.0
            return max((at for rank, at in begun.items() if rank != track.rank), default=0.0)
        if first.name in SENDS | RECEIVES:
            other, receives = first.members[first.peer], first.name in RECEIVES
            ends = (other, track.rank) if receives else (track.rank, other)
            times = (self.sent if receives else self.received).get((first.key, ends[0], ends[1]), [])
        elif first.name == "Sendrecv":
            times = self.exchanged.get((first.key, first.members[first.peer]), [])
        else:
            return 0.0
        number = self.numbers.get((track.rank, start), len(times))
        return times[number] if number < len(times) else 0.0


class Span(NamedTuple):
    """A part of the time of a rank's step. kind: one of KINDS; name: the operation; begun, ended: in seconds."""

    kind: str
    name: str
    begun: float
    ended: float


def spans_of(track: Track, step: int, meetings: Meetings) -> Iterator[Span]:
    """Iterate over the spans of a rank's step, in order and without gaps."""
    begun, ended = track.steps[step]
    at = begun
    for place, one in enumerate(track.operations):
        if not begun <= one.begun < ended:
            continue
        yield from _between(track, at, one.begun)
        ready = min(max(meetings.ready(track, place), one.begun), one.ended)
        if ready > one.begun:
            yield Span("wait", one.name, one.begun, ready)
        yield Span("transfer", one.name, ready, one.ended)
        at = one.ended
    yield from _between(track, at, ended)


def _between(track: Track, begun: float, ended: float) -> Iterator[Span]:
    """Split a time without operations between ranks into spans of the optimizer and of computing."""
    at = begun
    for first, last in track.optimizing:
        first, last = max(first, at), min(last, ended)
        if first >= last:
            continue
        if first > at:
            yield Span("compute", "compute", at, first)
        yield Span("optimizer", "optimizer", first, last)
        at = last
    if ended > at:
        yield Span("compute", "compute", at, ended)


def shares(tracks: Sequence[Track]) -> list[list[dict[str, float]]]:
    """For each rank and step, [rank][step], the seconds of each kind and of the whole "step"."""
    meetings = Meetings(tracks)
    steps: list[list[dict[str, float]]] = []
    for track in tracks:
        steps.append([])
        for step, (begun, ended) in enumerate(track.steps):
            row = dict.fromkeys(KINDS, 0.0)
            for span in spans_of(track, step, meetings):
                row[span.kind] += span.ended - span.begun
            steps[-1].append({**row, "step": ended - begun})
    return steps


def chrome_trace(tracks: Sequence[Track], names: Mapping[int, str]) -> dict[str, Any]:
    """The steps in Chrome's trace format (JSON, microseconds), which Perfetto opens. Each rank is a process."""
    meetings, start = Meetings(tracks), min(track.steps[0][0] for track in tracks)
    events: list[dict[str, Any]] = []

    def add(rank: int, name: str, category: str, begun: float, ended: float, **more: Any) -> None:
        events.append(
            {
                "name": name, "cat": category, "ph": "X", "pid": rank, "tid": 0, "ts": 1e6 * (begun - start),
                "dur": 1e6 * (ended - begun), "args": more,
            }
        )  # fmt: skip

    for track in tracks:
        name = names.get(track.rank, f"rank {track.rank}")
        events.append({"name": "process_name", "ph": "M", "pid": track.rank, "tid": 0, "args": {"name": name}})
        for step, (begun, ended) in enumerate(track.steps):
            add(track.rank, f"step {step}", "step", begun, ended)
            for span in spans_of(track, step, meetings):
                if span.kind in ("compute", "optimizer"):
                    add(track.rank, span.name, span.kind, span.begun, span.ended)
        for place, one in enumerate(track.operations):
            ready = min(max(meetings.ready(track, place), one.begun), one.ended)
            add(
                track.rank, one.name, "operation", one.begun, one.ended, bytes=one.nbytes, group=one.key,
                wait_us=1e6 * (ready - one.begun),
            )  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}
