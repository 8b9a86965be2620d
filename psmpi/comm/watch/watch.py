"""The watch of a rank: a thread that sends heartbeats to the monitors, without MPI, and may end the job.

Rank 0 and a deputy, on another host if there is one, have a monitor. Messages are datagrams, or files in the run
directory if datagrams do not arrive. The thread neither raises into the training nor keeps the process alive.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from psmpi import output
from psmpi.comm.control import Control
from psmpi.comm.watch.flight import Flight
from psmpi.comm.watch.link import (
    ANSWER,
    ASK,
    BEAT,
    BYE,
    DUMP,
    DUMPED,
    END,
    FLIGHT,
    HELLO,
    LONGEST,
    Address,
    Courier,
    Datagrams,
    Message,
    pack,
    unpack,
)
from psmpi.comm.watch.monitor import LIMIT, Monitor, Patience, heartbeat, pack_flight
from psmpi.comm.watch.process import Process, kill_later, show_stacks, wake_children
from psmpi.comm.watch.stalls import to_table
from psmpi.comm.world import abort
from psmpi.files.whole import written

# Seconds in which datagrams are tried before files; that a folder gets to take the flights; that the thread gets to
# end; and after which a rank that has shown its stacks ends by itself.
LOOK, WRITE, JOIN, LEFT = 3.0, 5.0, 5.0, 10.0
# Seconds that the launcher gets to end a rank with the job.
ENDED = 3.0
# The file of flights in a run directory, and the folder of messages.
FLIGHTS, FOLDER = "flight.jsonl", ".watch"


class Watch:
    """One rank's watch. monitors: addresses of the ranks that have a monitor; the first of these ranks reports.

    folder: the run directory, once it is known. show(rank, size, host) prints this process's stacks; leave(status) ends
    it at once.
    """

    def __init__(
        self,
        flight: Flight,
        rank: int,
        processes: Sequence[Process],
        patience: Patience,
        token: bytes,
        monitors: Mapping[int, Sequence[Address]],
        datagrams: Datagrams,
        *,
        tell: Callable[[list[str]], None] | None = None,
        leave: Callable[[int], Any] = abort,
        show: Callable[[int, int, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        look: float = LOOK,
    ):
        self.flight, self.rank, self.processes, self.patience = flight, rank, processes, patience
        self.token, self.monitors, self.datagrams = token, dict(monitors), datagrams
        self.size, self.host = len(processes), processes[rank].host
        self.leave, self.show, self.clock, self.look = leave, show or show_stacks, clock, look
        self.folder: Path | None = None
        now = clock()
        self.begun = now
        # Not all ranks at one time: a socket takes a few hundred datagrams.
        self.next = now + patience.interval * rank / self.size
        # How other ranks are reached: by datagrams to an address, or by files.
        self.routes: dict[int, Address] = {}
        self.by_files: set[int] = set()
        self.courier: Courier | None = None
        self.monitor: Monitor | None = None
        if rank in self.monitors:
            hosts, tell = [one.host for one in processes], tell or _complain
            first = next(iter(self.monitors))
            self.monitor = Monitor(rank, first, hosts, patience, self.post, tell, self._keep, self._condition, now)
        self.settled: float | None = None
        self.deadline = float("inf")
        self.stopping = threading.Event()
        self.wake, self.waker = os.pipe()
        self.thread = threading.Thread(target=self._run, name=f"watch of rank {rank}", daemon=True)

    def start(self) -> None:
        """Start the thread. RuntimeError if the system has no thread left."""
        try:
            self.thread.start()
        except RuntimeError:
            self.datagrams.close()
            self._close_pipe()
            raise

    def close(self) -> None:
        """Announce the end of this rank to the monitors, and end the thread."""
        self.stopping.set()
        with contextlib.suppress(OSError):
            os.write(self.waker, b"x")
        self.thread.join(JOIN)
        if not self.thread.is_alive():
            self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self.wake)
        os.close(self.waker)

    def _run(self) -> None:
        # Signals are for the thread that trains, whose waits they end.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            while not self.stopping.is_set():
                self._wait()
                self.turn()
            self._leave(b"")
        except Exception as error:
            output.complain(f"psmpi: note: rank {self.rank} is not watched any more: {error!r}")
            self._leave(b"failed")
        finally:
            self.datagrams.close()
            if self.courier is not None:
                self.courier.close()

    def _leave(self, reason: bytes) -> None:
        """Announce the end of this rank to the monitors."""
        for monitor in self.monitors:
            if monitor != self.rank:
                self.post(BYE, monitor, reason)

    def _wait(self) -> None:
        """Wait for a datagram, or for the time of the next look."""
        busy = self.monitor is not None and (self.monitor.collecting or self.monitor.ending is not None)
        seconds = min(max(0.0, self.next - self.clock()), 0.1 if busy else self.patience.interval)
        # Not select: it cannot take the large descriptors that a rank with many connections has.
        waiting = select.poll()
        waiting.register(self.wake, select.POLLIN)
        if self.datagrams.socket is not None:
            waiting.register(self.datagrams.socket, select.POLLIN)
        waiting.poll(1000 * seconds + 1)

    def turn(self) -> None:
        """Process received messages, and send a heartbeat if it is time."""
        for data, address in self.datagrams.receive():
            self._take(data, address)
        now = self.clock()
        if now >= self.next:
            self.next = now + self.patience.interval
            self._use_folder(now)
            self._find_monitors(now)
            beat = heartbeat(self.flight)
            for monitor in self.monitors:
                self.post(BEAT, monitor, beat)
        if self.monitor is not None:
            self.monitor.tick(self.clock())
        if now >= self.deadline:
            self.leave(1)

    def _use_folder(self, now: float) -> None:
        """Use files in the run directory if datagrams do not arrive: the directory itself may not answer."""
        if self.folder is None:
            return
        if self.monitor is not None and self.settled is None:
            self.settled = now
            self.monitor.report_unheard_at = now + self.patience.settle
        unheard = self.monitor is not None and len(self.routes) < self.size - 1
        if self.courier is None and now - self.begun >= self.look and (self.by_files or unheard):
            clears = self.rank == next(iter(self.monitors))
            self.courier = Courier(self.folder / FOLDER, self.rank, self.patience.interval, clears)
            self.courier.start()
        for data in self.courier.receive() if self.courier is not None else ():
            self._take(data, None)

    def _find_monitors(self, now: float) -> None:
        """Try all addresses of monitors that have not answered; after a while use files."""
        for monitor, addresses in self.monitors.items():
            if monitor in self.routes or monitor in self.by_files or monitor == self.rank:
                continue
            data = pack(Message(HELLO, self.rank, monitor, b""), self.token)
            for address in addresses:
                self.datagrams.send(data, address)
            if now - self.begun >= self.look and self.folder is not None:
                self.by_files.add(monitor)

    def post(self, kind: int, to: int, body: bytes = b"") -> None:
        """Send a message to a rank that can be reached, or to this one."""
        message = Message(kind, self.rank, to, body)
        if to == self.rank:
            self._obey(message)
        elif to in self.routes:
            self.datagrams.send(pack(message, self.token), self.routes[to])
        elif to in self.by_files and self.courier is not None:
            self.courier.send(pack(message, self.token), message)

    def _take(self, data: bytes, address: Address | None) -> None:
        """Process the bytes of a message, whose sender is not trusted."""
        message = unpack(data, self.token, self.size)
        if message is None or message.to != self.rank or message.sender == self.rank:
            return
        if address is None:
            self.by_files.add(message.sender)
        elif message.kind in (HELLO, ANSWER):
            # The first address that works.
            self.routes.setdefault(message.sender, address)
        if message.kind == HELLO and self.monitor is not None:
            self.post(ANSWER, message.sender)
        self._obey(message)

    def _obey(self, message: Message) -> None:
        if message.sender in self.monitors and message.kind in (ASK, DUMP, END):
            if message.kind == ASK and len(message.body) == LIMIT.size:
                limit = min(LIMIT.unpack(message.body)[0], LONGEST)
                table = to_table(self.flight, self.rank, self.host)
                self.post(FLIGHT, message.sender, pack_flight(table, limit))
            elif message.kind == DUMP:
                self._show(message.sender, message.body)
            elif message.kind == END:
                self._end(message.sender, message.body)
        elif self.monitor is not None:
            self.monitor.hear(message, self.clock())

    def _show(self, monitor: int, body: bytes) -> None:
        """Print the stacks of this process, and continue stopped processes of its host, which are asked, too."""
        if self.deadline == float("inf"):
            self.deadline = self.clock() + LEFT
            for other in self._reachable(body):
                with contextlib.suppress(OSError):
                    os.kill(other.pid, signal.SIGCONT)
            self.show(self.rank, self.size, self.host)
            # The process that writes checkpoints, which nobody else would end.
            wake_children()
        self.post(DUMPED, monitor)

    def _end(self, monitor: int, body: bytes) -> None:
        """End the job from the monitor that decides it; other ranks end by themselves after some seconds.

        Silent processes of this host are killed if the launcher does not.
        """
        answer = self._reachable(body)
        if answer:
            with contextlib.suppress(OSError):
                kill_later(answer)
        if monitor == self.rank:
            self.leave(1)
        else:
            self.deadline = min(self.deadline, self.clock() + ENDED)

    def _reachable(self, body: bytes) -> list[Process]:
        """Processes of the ranks in a message to which this process may send signals."""
        try:
            ranks = [int(rank) for rank in json.loads(body)]
        except (ValueError, TypeError):
            return []
        own = self.processes[self.rank]
        others = [self.processes[rank] for rank in ranks if 0 <= rank < self.size]
        return [one for one in others if one.processes == own.processes and one.pid != own.pid and one.lives]

    def _condition(self, rank: int) -> str:
        """The visible condition of a rank's process."""
        return self.processes[self.rank].condition(self.processes[rank])

    def _keep(self, tables: list[dict[str, Any]]) -> str:
        """Write the flights of all ranks to the run directory; returns a line with the path."""
        folder = self.folder
        if folder is None:
            return ""
        failed: list[str] = []

        def write() -> None:
            try:
                write_flights(folder, tables)
            except OSError as error:
                failed.append(f"the last operations of the ranks cannot be written: {error}")

        # In a thread, since this folder may be the one that does not answer.
        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        writing.join(WRITE)
        if writing.is_alive():
            return f"the last operations of the ranks cannot be written: {folder} does not answer"
        return failed[0] if failed else f"the last operations of all ranks: psmpi inspect flight {folder}"


def write_flights(folder: Path, tables: Sequence[Mapping[str, Any]]) -> None:
    """Write the flights of all ranks, a line each, whole or not at all."""
    with written(folder / FLIGHTS, flushed=False) as file:
        file.writelines(json.dumps(table).encode() + b"\n" for table in tables)


def _complain(lines: list[str]) -> None:
    first, *rest = lines
    kind = "WARNING: " if first.startswith("no progress") else ""
    output.complain("\n".join([f"psmpi: {kind}{first}", *(f"    {line}" for line in rest)]))


@contextlib.contextmanager
def watched(control: Control, warn: float, abort: float) -> Iterator[Watch | None]:
    """A block in which the ranks of a job are watched; it yields None with one rank or `warn` 0. All ranks enter it."""
    watch = _connect(control, warn, abort) if control.size > 1 and warn > 0 else None
    if watch is None:
        yield None
        return
    try:
        watch.start()
    except RuntimeError as error:
        output.complain(f"psmpi: note: rank {control.rank} is not watched: {error}")
        yield None
        return
    try:
        yield watch
    finally:
        watch.close()


def _connect(control: Control, warn: float, abort: float) -> Watch:
    """Make this rank's watch; addresses and the token of the job are exchanged by MPI."""
    rows = control.collect_texts(json.dumps(Process.own()))
    rows = json.loads(control.share(json.dumps(rows)))
    processes = [Process(*json.loads(row)) for row in rows]
    # A deputy of the first rank that is not stopped with its host.
    apart = (rank for rank, one in enumerate(processes) if one.host != processes[0].host)
    ranks = [0, next(apart, 1)]
    datagrams = Datagrams(local=len({one.network for one in processes}) == 1)
    with contextlib.ExitStack() as unused:
        # Another rank may end the job meanwhile.
        unused.callback(datagrams.close)
        own = datagrams.addresses[:20] if control.rank in ranks else []
        texts = control.collect_texts(json.dumps(own))
        said = [os.urandom(32).hex(), [texts[rank] for rank in ranks]] if control.rank == 0 else []
        token, address = json.loads(control.share(json.dumps(said)))
        unused.pop_all()
    monitors = {
        rank: [(str(host), int(port)) for host, port in json.loads(text)]
        for rank, text in zip(ranks, address, strict=True)
    }
    interval = max(min(1.0, warn / 4), control.size / 200)
    patience = Patience(warn, abort, interval, max(15.0, 5 * interval))
    return Watch(control.flight, control.rank, processes, patience, bytes.fromhex(token), monitors, datagrams)
