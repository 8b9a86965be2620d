"""The diagnosis of a stall: the ranks that others wait for, from the last operations of all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from psmpi.comm.watch.flight import (
    BEGUN,
    BYTES,
    ENDED,
    GROUP,
    NAME,
    NO_GROUP,
    NUMBER,
    PEER,
    STEP,
    Flight,
    ranges,
    spans,
)

# States of a rank. SILENT: no heartbeat arrives; GONE: it has ended the training; UNWATCHED: none ever arrived.
SILENT, COMPUTING, WAITING, BUSY, GONE, UNWATCHED = "silent", "computing", "waiting", "busy", "gone", "unwatched"
STATES = (SILENT, COMPUTING, WAITING, BUSY, GONE, UNWATCHED)
# Ranks of a group; ranks, or calls, that are told one by one.
MOST_RANKS, MOST_TOLD = 1_000_000, 8
# Seconds since 1970 that every calendar has.
LAST_TIME = 1e11
FIELDS = ("name", "group", "number", "peer", "bytes", "step", "begun", "ended")


class Operation(NamedTuple):
    """One operation of a rank. group: its key, "" outside MPI; ranks: of the group; peer: a rank of the job, or -1.

    number: of a collective among those of its group, else 0. begun, ended: seconds since 1970; ended 0: it goes on.
    """

    name: str
    group: str
    ranks: tuple[int, ...]
    number: int
    peer: int
    nbytes: int
    step: int
    begun: float
    ended: float

    @property
    def kind(self) -> str:
        """The name of the call, for a wait that of the call that began it."""
        return self.name.removeprefix("Wait(").removesuffix(")")

    def __str__(self) -> str:
        if not self.group:
            return self.name
        if not self.number:
            way = "to" if self.kind in ("Send", "Isend") else "from"
            return f"{self.name} {way} rank {self.peer}"
        root = f" with root {self.peer}" if self.peer >= 0 else ""
        return f"{self.name}{root}, call {self.number} among {spans(self.ranks)} ({self.group.partition(' ')[0]})"


@dataclass
class Rank:
    """The last operation of a rank, and for how many seconds. calls: number of collectives begun, by group key."""

    rank: int
    host: str
    state: str
    seconds: float = 0.0
    count: int = 0
    step: int = 0
    # Its last action, if its operations are not known; the visible condition of its process.
    doing: str = ""
    process: str = ""
    calls: Mapping[str, int] = field(default_factory=dict)
    operations: Sequence[Operation] = ()

    @property
    def last(self) -> Operation | None:
        return self.operations[-1] if self.operations else None

    @property
    def action(self) -> str:
        """The last operation, in words."""
        return str(self.last) if self.last is not None else self.doing


def state_of(flight: Flight) -> str:
    """The state of a rank by its own recorder."""
    last = flight.last()
    if last is None or last[ENDED]:
        return COMPUTING
    return BUSY if last[GROUP] == NO_GROUP else WAITING


def to_table(flight: Flight, rank: int, host: str, newest: int | None = None) -> dict[str, Any]:
    """A rank's flight for JSON, with the `newest` operations, all by default."""
    # Another thread goes on recording: the operations first, so that the counts have all of them.
    state, records, groups = state_of(flight), flight.records(), list(flight.groups)
    shift = time.time() - time.monotonic()
    kept = records if newest is None else records[len(records) - min(newest, len(records)) :]
    rows = [
        [*one[:BEGUN], round(one[BEGUN] + shift, 6), round(one[ENDED] + shift, 6) if one[ENDED] else 0.0]
        for one in kept
        if one[GROUP] < len(groups)
    ]
    return {
        "rank": rank, "host": host, "state": state, "seconds": 0.0, "count": flight.count, "step": flight.step,
        "doing": str(records[-1][NAME]) if records else "", "process": "",
        "groups": [[group.key, ranges(group.ranks), group.calls] for group in groups],
        "fields": list(FIELDS), "operations": rows,
    }  # fmt: skip


def from_table(table: Mapping[str, Any]) -> Rank:
    """The rank in a table of `to_table`. ValueError for other tables."""
    try:
        groups = [(str(key), _expanded(pairs), int(calls)) for key, pairs, calls in table["groups"]]
        operations = [_operation(row, groups) for row in table["operations"]]
        if table["state"] not in STATES:
            raise ValueError(f"a state {table['state']!r}")
        return Rank(
            int(table["rank"]), str(table["host"]), str(table["state"]), seconds(table["seconds"]), int(table["count"]),
            int(table["step"]), str(table["doing"]), str(table["process"]), {key: calls for key, _, calls in groups},
            operations,
        )  # fmt: skip
    except (KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"no flight of a rank: {error!r}") from None


def _expanded(pairs: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The ranks in pairs of `ranges`."""
    numbers: list[int] = []
    for first, last in pairs:
        if not 0 <= first <= last <= first + MOST_RANKS - len(numbers):
            raise ValueError(f"ranks {first} to {last}")
        numbers += range(int(first), int(last) + 1)
    return tuple(numbers)


def _operation(row: Sequence[Any], groups: Sequence[tuple[str, tuple[int, ...], int]]) -> Operation:
    at, peer = int(row[GROUP]), int(row[PEER])
    key, ranks, _ = groups[at] if at >= 0 else ("", (), 0)
    if peer >= 0 and ranks:
        peer = ranks[peer]
    return Operation(
        str(row[NAME]), key, ranks, int(row[NUMBER]), peer, int(row[BYTES]), int(row[STEP]), seconds(row[BEGUN]),
        seconds(row[ENDED]),
    )  # fmt: skip


def seconds(value: Any) -> float:
    """A time or duration as a number. ValueError out of the range of clocks."""
    number = float(value)
    if not 0 <= number < LAST_TIME:
        raise ValueError(f"a time of {number} s")
    return number


@dataclass
class Finding:
    """A diagnosis: the ranks that others wait for (`culprits`), the waiting ranks, and the missing calls, in words.

    seconds: duration of the stall; waited: longest wait of a rank, 0 if none waits. Without `culprits` the ranks wait
    for each other, in `missing` calls.
    """

    culprits: list[Rank]
    waiting: list[Rank]
    missing: list[str]
    seconds: float
    waited: float

    @property
    def key(self) -> tuple[Any, ...]:
        """The key of the stall, which stays the same as long as it lasts."""
        return tuple((one.rank, one.state) for one in self.culprits), () if self.culprits else tuple(self.missing)


def diagnose(ranks: Sequence[Rank], warn: float, longest: Mapping[int, float] | None = None) -> Finding | None:
    """Find the ranks that others wait for; None if no rank has stood still for `warn` seconds.

    ranks: all of the job, in order. longest: longest time in seconds that a rank has computed between two operations; a
    computing rank is suspected after twice that time only. Ranks that make progress, however slowly, are no culprits.
    """
    longest = longest or {}

    def stands(one: Rank) -> bool:
        least = max(warn, 2 * longest.get(one.rank, 0.0)) if one.state == COMPUTING else warn
        return one.state in (SILENT, COMPUTING, BUSY) and one.seconds >= least

    waiting = [one for one in ranks if one.state == WAITING and one.seconds >= warn]
    # A rank that waits is not at fault, whoever it waits for; the others are where the search ends.
    seen: set[int] = set()
    near = [one.rank for one in waiting]
    while near:
        rank = near.pop()
        if rank not in seen:
            seen.add(rank)
            if ranks[rank].state == WAITING:
                near += waits_for(ranks[rank], ranks)
    ends = [ranks[rank] for rank in sorted(seen) if ranks[rank].state != WAITING]
    silent = [one for one in ranks if one.state in (SILENT, BUSY) and one.seconds >= warn]
    # Ranks wait long already for one that has just become silent.
    culprits = {one.rank: one for one in (*ends, *silent) if stands(one) or one.state == SILENT}
    # Without other culprits: ranks of which nothing is known.
    culprits = culprits or {one.rank: one for one in ends if one.state in (GONE, UNWATCHED)}
    if culprits:
        named = [culprits[rank] for rank in sorted(culprits)]
        longest_wait = max((one.seconds for one in waiting), default=0.0)
        seconds = max([longest_wait, *(one.seconds for one in named if one.state in (SILENT, BUSY))])
        if all(one.state == COMPUTING for one in named):
            seconds = min(seconds, max(one.seconds for one in named))
        # A silent rank that nobody waits for may go on: its messages may be what is lost.
        waited = longest_wait if seen & culprits.keys() else 0.0
        return Finding(named, waiting, _missing(waiting, ranks), seconds, min(seconds, waited))
    stuck = [ranks[rank] for rank in sorted(seen)]
    if ends or not stuck or any(one.seconds < warn for one in stuck):
        # Some rank goes on, or is not known.
        return None
    shortest = min(one.seconds for one in stuck)
    return Finding([], stuck, _missing(stuck, ranks), shortest, shortest)


def waits_for(one: Rank, ranks: Sequence[Rank]) -> list[int]:
    """The ranks that a rank's operation needs to end."""
    last = one.last
    if last is None or not last.group:
        return []
    if not last.number:
        return [last.peer] if 0 <= last.peer < len(ranks) else []
    return [
        rank
        for rank in last.ranks
        if rank != one.rank
        and rank < len(ranks)
        # A silent rank may have begun calls after its last heartbeat.
        and (ranks[rank].state == SILENT or ranks[rank].calls.get(last.group, 0) < last.number)
    ]


def _missing(waiting: Iterable[Rank], ranks: Sequence[Rank]) -> list[str]:
    """Collectives that some ranks wait in, and other ranks have not called, or called as another one."""
    missing: dict[str, None] = {}
    for one in waiting:
        last = one.last
        if last is None or not last.group:
            continue
        if not last.number:
            back = "Recv" if last.kind in ("Send", "Isend") else "Send"
            text = f"{_listed([one.rank])} is in {last}: the {back} of rank {last.peer} for it is missing"
            missing.setdefault(text)
            continue
        lacking = [rank for rank in waits_for(one, ranks) if ranks[rank].state not in (SILENT, UNWATCHED)]
        unknown = [rank for rank in waits_for(one, ranks) if rank not in lacking]
        for group, verb in ((lacking, "not made by"), (unknown, "perhaps not made by")):
            if group:
                missing.setdefault(f"{last.kind}, {str(last).partition(', ')[2]}: {verb} {_listed(group)}")
        for rank in last.ranks:
            other = _same_call(ranks[rank], last) if rank < len(ranks) else None
            if other is not None and (other.kind, other.peer) != (last.kind, last.peer):
                first, second = sorted([(one.rank, last), (rank, other)], key=lambda pair: pair[0])
                missing.setdefault(f"rank {first[0]} makes {first[1]}, where rank {second[0]} makes {second[1]}")
    return list(missing)


def _same_call(rank: Rank, last: Operation) -> Operation | None:
    """The operation of a rank that belongs to this collective."""
    for one in reversed(rank.operations):
        if (one.group, one.number) == (last.group, last.number):
            return one
    return None


def _listed(ranks: Sequence[int]) -> str:
    return spans(ranks) if len(ranks) > 4 else f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def describe(finding: Finding, now: float) -> list[str]:
    """The diagnosis as lines of text. now: seconds since 1970."""
    named = [_of(one, now) for one in finding.culprits[:MOST_TOLD]]
    if len(finding.culprits) > MOST_TOLD:
        named.append(f"and so do {spans([one.rank for one in finding.culprits[MOST_TOLD:]])}")
    lines = [f"no progress for {finding.seconds:.0f} s: {'; '.join(named)}"]
    if not finding.culprits:
        lines = [f"no progress for {finding.seconds:.0f} s: ranks wait for each other"]
    by_call: dict[tuple[str, int], list[Rank]] = {}
    for one in finding.waiting:
        by_call.setdefault((one.action, one.step), []).append(one)
    for (action, step), some in list(by_call.items())[:MOST_TOLD]:
        since = _clock(now - max(one.seconds for one in some))
        waits = "wait" if len(some) > 1 else "waits"
        lines.append(f"{_listed([one.rank for one in some])} {waits} in {action}, step {step}, since {since}")
    lines += [f"missing: {text}" for text in finding.missing[:MOST_TOLD]]
    more = max(0, len(by_call) - MOST_TOLD), max(0, len(finding.missing) - MOST_TOLD)
    return [*lines, f"{more[0]} more calls that ranks wait in, {more[1]} more missing"] if any(more) else lines


def _of(one: Rank, now: float) -> str:
    where, since = f"rank {one.rank} on {one.host}", _clock(now - one.seconds)
    after = f"after {one.action}" if one.action else "before its first operation"
    if one.state == SILENT:
        why = one.process or "stopped or its host gone (or in a library that keeps Python from going on)"
        return f"{where} is silent since {since}, {why}; seen last in step {one.step}, {after}"
    if one.state == BUSY:
        return f"{where} is in {one.action}, step {one.step}, since {since}: a file server or a disk may not answer"
    if one.state == UNWATCHED:
        return f"{where} is waited for, and is not watched: no message of its watch arrives"
    if one.state == GONE:
        return f"{where} is waited for, and has left the training since {since}"
    return f"{where} computes since {since}, perhaps in an endless loop: step {one.step}, {after}"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
