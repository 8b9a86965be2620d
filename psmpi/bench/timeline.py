"""What ranks do in a step, from records of their operations: how long each computes, optimizes, waits and transfers.

An operation between ranks waits until those that it needs have begun theirs, and transfers from then on: a message
needs its sender, a collective from a root the root, one to a root all others for the root, any other one all ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from psmpi.comm.watch.flight import BEGINS

# What the time of a step is made of.
KINDS = ("compute", "optimizer", "wait", "transfer")
FROM_ROOT = frozenset({"Bcast", "Ibcast", "Scatterv"})
TO_ROOT = frozenset({"Reduce", "Ireduce", "Gather", "Gatherv"})
SENDS, RECEIVES = frozenset({"Send", "Isend"}), frozenset({"Recv", "Irecv"})


class Operation(NamedTuple):
    """An operation of a rank, in seconds on one clock.

    key, members: of its group, and the ranks of the job in it; number: of a collective among those of the group, else
    0; peer: the root or the other rank in the group, -1 where there is none. since: where this is a wait, the place of
    the rank's operation that began what is waited for, else -1.
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
    """What one rank did: its operations, times in its optimizer (begin, end), and steps (begin, end)."""

    rank: int
    operations: list[Operation] = field(default_factory=list)
    optimizing: list[tuple[float, float]] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)


class Meetings:
    """When ranks began the operations that others need."""

    def __init__(self, tracks: Iterable[Track]):
        # Begins of a collective by rank; of messages by group, sender and receiver, in their order.
        self.collectives: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
        self.sent: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        self.received: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        self.exchanged: dict[tuple[str, int], list[float]] = defaultdict(list)
        # Of each message its number among those of its group, sender and receiver, by rank and place.
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
        """When what an operation of a rank needs of others was there; 0 where it needs nothing, or it is not known."""
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
    """A piece of a rank's step: its kind, one of KINDS, and what it does, in seconds."""

    kind: str
    name: str
    begun: float
    ended: float


def spans_of(track: Track, step: int, meetings: Meetings) -> Iterator[Span]:
    """The pieces of a rank's step, one after the other, without gaps."""
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
    """The pieces of a time without operations between ranks: in the optimizer or not."""
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
    """Seconds by kind, and the whole step's, of each step of each rank: [rank][step]."""
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
    """The steps as a trace in Chrome's JSON format, which Perfetto opens: a process for each rank, in microseconds."""
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
