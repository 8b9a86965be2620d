"""The monitor of a job: it receives heartbeats of all ranks, and reports ranks that stand still."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from psmpi.comm.watch.flight import Flight, spans
from psmpi.comm.watch.link import ASK, BEAT, BYE, DUMP, DUMPED, END, FLIGHT, LONGEST, Message
from psmpi.comm.watch.stalls import (
    BUSY,
    COMPUTING,
    GONE,
    SILENT,
    UNWATCHED,
    WAITING,
    Finding,
    Rank,
    describe,
    diagnose,
    from_table,
    state_of,
)

# Count of operations, step, and which of DOING; the name of the last operation follows.
HEARTBEAT = struct.Struct("!QqB")
DOING = (COMPUTING, WAITING, BUSY)
LIMIT = struct.Struct("!I")
# Bytes of a flight that are asked for, less where the answer does not arrive: large datagrams are cut on the way.
SIZES = (LONGEST, 8000, 1200)
# Bytes that a flight may have when it is unpacked.
UNPACKED = 1 << 22
# Seconds that ranks get to show their stacks.
SHOWN = 3.0
# Entries of a line of the file of flights that come from the monitor.
TABLE = ("rank", "host", "state", "seconds", "count", "step", "doing", "process")
# Flights that are asked for at a time.
ASKED = 4


class Patience(NamedTuple):
    """Seconds until a stall is reported and until it ends the job (0: never), between heartbeats, and for answers."""

    warn: float
    abort: float = 0.0
    interval: float = 1.0
    settle: float = 15.0

    @property
    def quiet(self) -> float:
        """Seconds without a heartbeat after which a rank that does not answer either is silent."""
        return max(3 * self.interval, self.warn / 2)

    @property
    def jump(self) -> float:
        """Seconds between two looks that show that this process, or the whole job, was stopped."""
        return max(4 * self.interval, 2.0)


def heartbeat(flight: Flight) -> bytes:
    """The heartbeat of a rank: its current operation."""
    last, state = flight.last(), state_of(flight)
    name = str(last[0]) if last is not None else ""
    return HEARTBEAT.pack(flight.count, flight.step, DOING.index(state)) + name.encode()[:200]


def pack_flight(table: dict[str, Any], limit: int) -> bytes:
    """Pack a rank's flight into at most `most` bytes, with as many of the newest operations as fit."""
    operations = table["operations"]
    while True:
        data = zlib.compress(json.dumps({**table, "operations": operations}, separators=(",", ":")).encode())
        if len(data) <= limit or not operations:
            return data
        operations = operations[-(len(operations) // 2) :] if len(operations) > 1 else []


def unpack_flight(data: bytes) -> dict[str, Any]:
    """Unpack a flight to a table. ValueError for other bytes."""
    try:
        text = zlib.decompressobj().decompress(data, UNPACKED)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    table = json.loads(text)
    from_table(table)
    return dict(table)


@dataclass
class Seen:
    """A monitor's knowledge of a rank, with the times, by its own clock, of the last message and the last change."""

    at: float
    changed: float
    heard: bool = False
    gone: bool = False
    count: int = 0
    step: int = 0
    state: str = COMPUTING
    name: str = ""
    # The longest time that it computed at a stretch.
    longest: float = 0.0


class Ending(NamedTuple):
    """The end of the job: its deadline, the ranks that have not yet shown their stacks, and the silent ranks."""

    until: float
    awaited: set[int]
    silent: list[int]


class Monitor:
    """The watch over all ranks from one of them. first: the rank that reports unless it is silent itself.

    post(kind, to, body) sends a message, to this rank too; tell(lines) prints; keep(tables) writes the flights and
    returns a line on where they are; condition(rank) is what can be seen of a process. All of it is called by the
    thread that calls `tick`.
    """

    def __init__(
        self,
        rank: int,
        first: int,
        hosts: Sequence[str],
        patience: Patience,
        post: Callable[[int, int, bytes], None],
        tell: Callable[[list[str]], None],
        keep: Callable[[list[dict[str, Any]]], str],
        condition: Callable[[int], str],
        now: float,
    ):
        self.rank, self.first, self.hosts, self.patience = rank, first, hosts, patience
        self.post, self.tell, self.keep, self.condition = post, tell, keep, condition
        self.seen = [Seen(now, now) for _ in hosts]
        self.last_tick = self.begun = now
        # When it is said who has not been heard.
        self.report_unheard_at = float("inf")
        # Flights that have come, and ranks asked: how often, and when last.
        self.collecting = False
        self.flights: dict[int, dict[str, Any]] = {}
        self.asked: dict[int, tuple[int, float]] = {}
        # The stall that was looked into last, when to look again, and what was told.
        self.stuck: frozenset[Any] = frozenset()
        self.next_look = now
        self.reported: tuple[Any, ...] | None = None
        self.since = now
        self.ending: Ending | None = None

    def hear(self, message: Message, now: float) -> None:
        """Process a message of a rank."""
        seen, rank = self.seen[message.sender], message.sender
        # After a silence the time of computing is not known.
        steady = now - seen.at < self.patience.quiet
        seen.at, seen.heard = now, True
        if message.kind == BYE:
            # With a body where the watch ends, and not the training.
            seen.gone, seen.heard = not message.body, not message.body
        elif message.kind == BEAT and len(message.body) >= HEARTBEAT.size:
            count, step, doing = HEARTBEAT.unpack_from(message.body)
            name = message.body[HEARTBEAT.size :].decode(errors="replace")
            self._note(seen, count, step, DOING[min(doing, len(DOING) - 1)], name, now, steady)
        elif message.kind == FLIGHT and self.collecting:
            try:
                table = unpack_flight(message.body)
            except ValueError:
                return
            if table["rank"] == rank:
                self.flights[rank] = table
                self._note(seen, table["count"], table["step"], table["state"], table["doing"], now, steady)
        elif message.kind == DUMPED and self.ending is not None:
            self.ending.awaited.discard(rank)

    def _note(self, seen: Seen, count: int, step: int, state: str, name: str, now: float, steady: bool) -> None:
        if (count, step, state) != (seen.count, seen.step, seen.state):
            if seen.state == COMPUTING and steady:
                seen.longest = max(seen.longest, now - seen.changed)
            seen.changed = now
        seen.count, seen.step, seen.state, seen.name = count, step, state, name

    def tick(self, now: float) -> None:
        """Look at all ranks. now: seconds of a monotonic clock."""
        if now - self.last_tick > self.patience.jump:
            self._forget_times(now)
        self.last_tick = now
        if self.ending is not None:
            self._continue_ending(now)
            return
        if self.collecting:
            self._ask(now)
            return
        if not self._reports(now):
            self.reported = None
            return
        if now >= self.report_unheard_at:
            self.report_unheard_at = float("inf")
            unheard = [rank for rank, one in enumerate(self.seen) if not one.heard]
            if unheard:
                self.tell([f"note: {spans(unheard)} cannot be watched: neither datagrams nor files arrive from there"])
        stuck = self._stuck(now)
        if not stuck:
            self._report_progress(now)
            self.stuck = stuck
        elif stuck != self.stuck or now >= self.next_look:
            self.stuck, self.collecting = stuck, True
            self.flights, self.asked = {}, {}
            self._ask(now)

    def _forget_times(self, now: float) -> None:
        """Reset all times after a stop of this process, during which heartbeats were not heard."""
        for one in self.seen:
            one.at = one.changed = now
        self.begun, self.collecting = now, False

    def _reports(self, now: float) -> bool:
        first = self.seen[self.first]
        silent = first.heard and not first.gone and now - first.at >= max(self.patience.warn, self.patience.quiet)
        return self.rank == self.first or silent

    def _stuck(self, now: float) -> frozenset[Any]:
        """Ranks that have long been in one operation, or silent."""
        patience, ranks = self.patience, set()
        for rank, one in enumerate(self.seen):
            if one.gone or not one.heard:
                continue
            if now - one.at >= max(patience.warn, patience.quiet):
                ranks.add((rank, SILENT, one.count))
            elif one.state != COMPUTING and now - one.changed >= patience.warn:
                ranks.add((rank, one.state, one.count))
        return frozenset(ranks)

    def _ask(self, now: float) -> None:
        """Ask for missing flights, some at a time and in smaller pieces each time; then conclude."""
        wait = max(0.5, self.patience.interval)

        def is_open(rank: int) -> bool:
            times, last = self.asked.get(rank, (0, now))
            known = self.seen[rank].gone or not self.seen[rank].heard or rank in self.flights
            return not known and (times < len(SIZES) or now - last < wait)

        under_way = sum(is_open(rank) and now - last < wait for rank, (_, last) in self.asked.items())
        for rank in filter(is_open, range(len(self.seen))):
            times, last = self.asked.get(rank, (0, now - wait))
            if now - last >= wait and under_way < ASKED:
                under_way += 1
                self.asked[rank] = times + 1, now
                self.post(ASK, rank, LIMIT.pack(SIZES[times]))
        if not any(map(is_open, range(len(self.seen)))):
            self.collecting = False
            self._conclude(now)

    def _rank(self, rank: int, now: float) -> Rank:
        """The state of a rank as far as it is known."""
        seen, host = self.seen[rank], self.hosts[rank]
        known = Rank(rank, host, seen.state, now - seen.changed, seen.count, seen.step, seen.name)
        if seen.gone:
            known.state = GONE
        elif rank in self.flights:
            flight = from_table(self.flights[rank])
            known.calls, known.operations = flight.calls, flight.operations
        elif not seen.heard:
            known.state, known.seconds = UNWATCHED, now - self.begun
        elif now - seen.at >= self.patience.quiet:
            known.state, known.seconds = SILENT, now - seen.at
            known.process = self.condition(rank)
        return known

    def _conclude(self, now: float) -> None:
        """Report the ranks that others wait for, once; end the job if it is time."""
        patience = self.patience
        if self.rank != self.first and self.first in self.flights:
            return
        ranks = [self._rank(rank, now) for rank in range(len(self.seen))]
        longest = {rank: one.longest for rank, one in enumerate(self.seen)}
        finding = diagnose(ranks, patience.warn, longest)
        self.next_look = now + max(2 * patience.interval, patience.warn / 4)
        if finding is None:
            self._report_progress(now)
            return
        slow = max([0.0, *(2 * longest[one.rank] for one in finding.culprits if one.state == COMPUTING)])
        abort = max(patience.abort, slow) if patience.abort else 0.0
        ends = bool(abort) and finding.waited >= abort
        if finding.key != self.reported or ends:
            self._report_stall(finding, ranks, abort, ends, now)
        self.reported, self.since = finding.key, now - finding.seconds
        self.next_look = now + patience.warn
        if ends:
            silent = [one.rank for one in ranks if one.state in (SILENT, UNWATCHED)]
            # Silent ones too: they may only have been stopped, and are woken.
            lacking = {one.rank for one in ranks if one.state not in (UNWATCHED, GONE)}
            self.ending = Ending(now + SHOWN, lacking, silent)
            for rank in sorted(lacking):
                self.post(DUMP, rank, json.dumps(silent).encode())
        elif abort:
            self.next_look = min(self.next_look, now + max(2 * patience.interval, abort - finding.waited))

    def _report_stall(self, finding: Finding, ranks: Sequence[Rank], abort: float, ends: bool, now: float) -> None:
        lines = describe(finding, time.time())
        if ends:
            lines.append(f"the job ends with status 1 (--stall-abort {self.patience.abort:g})")
        elif abort and finding.waited:
            lines.append(f"the job ends in {max(0.0, abort - finding.waited):.0f} s unless it goes on (--stall-abort)")
        # Told before anything is written: it may be the folder that does not answer.
        self.tell(lines)
        where = self.keep([self._table(one) for one in ranks])
        if where and (self.reported is None or ends):
            self.tell([where])

    def _table(self, one: Rank) -> dict[str, Any]:
        """A rank's line of the file of flights."""
        empty: Mapping[str, Any] = {"groups": [], "fields": [], "operations": []}
        table = {**empty, **self.flights.get(one.rank, {})}
        fields = {name: getattr(one, name) for name in TABLE}
        return {**table, **fields, "seconds": round(one.seconds, 3), "warn": self.patience.warn, "written": time.time()}

    def _report_progress(self, now: float) -> None:
        if self.reported is not None:
            self.reported = None
            self.tell([f"training goes on, after a stall of about {now - self.since:.0f} s"])

    def _continue_ending(self, now: float) -> None:
        assert self.ending is not None
        if not self.ending.awaited or now >= self.ending.until:
            body = json.dumps(self.ending.silent).encode()
            for rank in sorted(range(len(self.seen)), key=lambda rank: rank == self.rank):
                if not self.seen[rank].gone:
                    self.post(END, rank, body)
