"""Watches of several ranks in one process, over loopback, on a simulated clock."""

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from psmpi.comm.control import Control
from psmpi.comm.watch import watch as watch_module
from psmpi.comm.watch.flight import NO_GROUP, Flight, recorded
from psmpi.comm.watch.link import (
    ASK,
    BEAT,
    BYE,
    DUMP,
    END,
    FLIGHT,
    HEAD,
    HELLO,
    LONGEST,
    Courier,
    Datagrams,
    Message,
    own_addresses,
    pack,
)
from psmpi.comm.watch.link import unpack as unpack_message
from psmpi.comm.watch.monitor import HEARTBEAT, Patience, heartbeat, pack_flight, unpack_flight
from psmpi.comm.watch.process import Process, show_stacks, start_of, wake_children
from psmpi.comm.watch.stalls import to_table
from psmpi.comm.watch.watch import FLIGHTS, FOLDER, Watch, watched, write_flights
from psmpi.inspect.flight import read_flights
from psmpi.testing import run_ranks

TOKEN = b"t" * 32
PATIENCE = Patience(warn=10.0, abort=30.0, interval=1.0, settle=5.0)


class Job:
    """Ranks without MPI: their recorders and watches, and the texts of these. The first of `monitors` prints."""

    def __init__(self, folder, size=3, monitors=(0, 1), patience=PATIENCE, reach=lambda address: [address]):
        self.now, self.notes, self.left, self.shown = 1000.0, [], [], []
        self.size, self.patience, self.folder = size, patience, folder
        sockets = [Datagrams(local=True) for _ in range(size)]
        addresses = {rank: [a for address in sockets[rank].addresses for a in reach(address)] for rank in monitors}
        ranks = [Process(f"host{rank}", "net", "pids", rank, "") for rank in range(size)]
        self.flights = [Flight() for _ in range(size)]
        self.watches = [
            Watch(
                self.flights[rank], rank, ranks, patience, TOKEN, addresses, sockets[rank],
                tell=lambda lines, rank=rank: self.notes.append((rank, "\n".join(lines))),
                leave=lambda status, rank=rank: self.left.append((rank, status)),
                show=lambda rank, size, host: self.shown.append(rank),
                clock=lambda: self.now, look=3.0,
            )
            for rank in range(size)
        ]  # fmt: skip
        for watch in self.watches:
            watch.folder = folder
        self.groups = [SimpleNamespace(key=f"world 1 ranks 0-{size - 1}", ranks=tuple(range(size)), calls=0)
                       for _ in range(size)]  # fmt: skip
        for flight, group in zip(self.flights, self.groups, strict=True):
            flight.groups.append(group)

    def call(self, rank, name="Allreduce"):
        """Begin a collective of all ranks on one of them."""
        self.groups[rank].calls += 1
        flight = self.flights[rank]
        return flight.begin([name, 0, self.groups[rank].calls, -1, 8, flight.step, time.monotonic(), 0.0])

    def step(self):
        """Begin and end a call of all ranks."""
        for record in [self.call(rank) for rank in range(self.size)]:
            record[-1] = time.monotonic()

    def run(self, seconds, stopped=(), progress=False):
        """Let the time pass in halves of a second; stopped ranks do nothing."""
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            if progress:
                self.step()
            # Twice: messages and their answers.
            for watch in [*self.watches, *self.watches]:
                if watch.rank not in stopped:
                    watch.turn()
                    if watch.courier is not None:
                        watch.courier.turn()

    def close(self):
        for watch in self.watches:
            watch.datagrams.close()
            if watch.courier is not None:
                watch.courier.close()
            os.close(watch.wake)
            os.close(watch.waker)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function that makes jobs, whose files are read and written by the test and not by threads."""
    jobs = []
    monkeypatch.setattr(Courier, "start", lambda courier: None)
    monkeypatch.setattr(Courier, "close", lambda courier: (courier.stopping.set(), courier._run()))

    def make(**options):
        jobs.append(Job(tmp_path, **options))
        return jobs[-1]

    yield make
    for made_job in jobs:
        made_job.close()


def stop(job, rank):
    """Let all ranks work, then stop one and let the others wait for it."""
    job.run(5, progress=True)
    for other in range(job.size):
        if other != rank:
            job.call(other)


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_a_stopped_rank_is_named_by_the_first_monitor_that_goes_on(job, tmp_path, culprit):
    job = job()
    stop(job, culprit)
    job.run(9, stopped=[culprit])
    assert job.notes == []
    job.run(6, stopped=[culprit])
    [(speaker, text), (_, where)] = job.notes
    assert speaker == (1 if culprit == 0 else 0)
    assert text.startswith("no progress for ") and f"s: rank {culprit} on host{culprit} is silent" in text
    assert text.count("on host") == 1 and "wait in Allreduce, call 11 among ranks 0-2 (world), step 0" in text
    assert f"psmpi inspect flight {tmp_path}" in where
    ranks, warn, _ = read_flights(tmp_path / FLIGHTS)
    assert [one.state for one in ranks] == ["silent" if k == culprit else "waiting" for k in range(3)] and warn == 10
    assert all(len(one.operations) == (0 if one.rank == culprit else 11) for one in ranks)
    # A stall is told once.
    job.run(8, stopped=[culprit])
    assert len(job.notes) == 2 and job.left == []


def test_it_is_said_when_it_goes_on_and_again_when_it_stands_still(job):
    job = job()
    stop(job, 2)
    job.run(15, stopped=[2])
    assert len(job.notes) == 2
    job.call(2)
    for flight in job.flights:
        flight.last()[-1] = time.monotonic()
    job.run(4, progress=True)
    assert job.notes[2] == (0, job.notes[2][1]) and "training goes on, after a stall of about" in job.notes[2][1]
    stop(job, 1)
    job.run(15, stopped=[1])
    assert "rank 1 on host1 is silent" in job.notes[3][1] and len(job.notes) == 5


def test_another_culprit_is_told_too(job):
    job = job(patience=Patience(10.0, 0.0, 1.0))
    stop(job, 2)
    job.run(15)
    assert "rank 2 on host2 computes since" in job.notes[0][1] and "endless loop" in job.notes[0][1]
    job.run(25, stopped=[2])
    assert "rank 2 on host2 is silent" in job.notes[2][1] and len(job.notes) == 3


def test_a_rank_in_a_file_operation_is_named_with_it(job):
    job = job()
    stop(job, 1)
    with job.flights[1].task("reading samples from /data/x.npy"):
        job.run(15)
    assert "rank 1 on host1 is in reading samples from /data/x.npy, step 0" in job.notes[0][1]


def test_ranks_that_wait_for_each_other(job):
    job = job()
    job.run(3, progress=True)
    job.call(0, "Bcast")
    job.call(1, "Allreduce")
    job.call(2, "Allreduce")
    job.run(15)
    assert "ranks wait for each other" in job.notes[0][1]
    assert "rank 0 makes Bcast, call 7 among ranks 0-2 (world), where rank 1 makes Allreduce, call 7" in job.notes[0][1]


def test_long_waits_for_ranks_that_go_on_are_no_stall(job):
    """Rank 1 waits for rank 0, which exchanges with rank 2 for long; then all compute for long."""
    job = job()
    job.run(2, progress=True)
    job.call(1)
    for _ in range(60):
        for rank in (0, 2):
            job.flights[rank].begin(["Recv", 0, 0, 2 - rank, 8, 0, time.monotonic(), time.monotonic()])
        job.run(0.5)
    job.call(0)[-1] = job.call(2)[-1] = job.flights[1].last()[-1] = time.monotonic()
    job.run(40)
    assert job.notes == []


def test_what_took_long_before_may_take_long_again(job):
    """A test of 20 s warns once that rank 0 computes, a second one does not."""
    job = job(patience=Patience(10.0, 0.0, 1.0))
    for _ in range(2):
        job.run(5, progress=True)
        waiting = [job.call(rank) for rank in (1, 2)]
        job.run(20)
        for record in (job.call(0), *waiting):
            record[-1] = time.monotonic()
    assert [text.partition(",")[0].partition(" for")[0] for _, text in job.notes] == [
        "no progress", "the last operations of all ranks: psmpi inspect flight " + str(job.folder), "training goes on"
    ]  # fmt: skip


def test_a_job_that_was_suspended_as_a_whole_is_not_warned_of(job):
    job = job()
    job.run(5, progress=True)
    for rank in (0, 1):
        job.call(rank)
    job.run(5)
    job.now += 3600
    job.run(8)
    assert job.notes == []
    job.run(8)
    assert "rank 2 on host2 computes" in job.notes[0][1]


def test_the_job_ends_with_all_stacks(job):
    job = job()
    stop(job, 2)
    job.run(26, stopped=[2])
    assert job.left == []
    job.run(13, stopped=[2])
    # Both monitors show their stacks, and the first one leaves first.
    assert job.shown == [0, 1] and set(job.left) == {(0, 1)}
    job.run(3, stopped=[2])
    assert set(job.left) == {(0, 1), (1, 1)}
    assert "the job ends with status 1 (--stall-abort 30)" in job.notes[2][1]
    # The stopped rank ends when it is woken.
    job.run(5)
    assert job.shown == [0, 1, 2] and (2, 1) in job.left


def test_a_rank_ends_after_its_stacks_though_nobody_says_so(job):
    job = job()
    job.run(2)
    job.watches[2]._obey(Message(DUMP, 0, 2, b"[]"))
    job.run(9, stopped=[0, 1])
    assert job.shown == [2] and job.left == []
    job.run(3, stopped=[0, 1])
    assert (2, 1) in job.left


def test_only_monitors_are_obeyed(job):
    job = job()
    job.run(2)
    for kind in (ASK, DUMP, END):
        job.watches[1]._take(pack(Message(kind, 2, 1, b"[]"), TOKEN), ("127.0.0.1", 9))
    assert job.shown == job.left == []


def test_strangers_are_not_heard(job):
    """Datagrams that are malformed, altered, of another job or to another rank are ignored."""
    job = job()
    job.run(2, progress=True)
    [address] = job.watches[0].datagrams.addresses
    beat = heartbeat(job.flights[1])
    good, rng = pack(Message(BEAT, 1, 0, beat), TOKEN), random.Random(0)
    before = [vars(monitored).copy() for monitored in job.watches[0].monitor.seen]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for data in (
            b"", b"psw1", os.urandom(500), bytes(LONGEST), good[:-1], good + b"x",
            pack(Message(BEAT, 1, 0, beat), b"another token"),
            *(good[:k] + bytes([good[k] ^ 1]) + good[k + 1 :] for k in range(len(good))),
            *(bytes(rng.randrange(256) for _ in range(rng.randrange(80))) for _ in range(200)),
        ):  # fmt: skip
            sender.sendto(data, address)
            # One by one: the kernel keeps few.
            job.watches[0].turn()
        for message in (
            Message(BEAT, 7, 0, beat), Message(BEAT, 1, 2, beat), Message(BEAT, 0, 0, beat), Message(77, 1, 0, beat),
            Message(BEAT, 1, 0, b"short"), Message(FLIGHT, 1, 0, b"no zlib"), Message(END, 2, 0, b"[0]"),
        ):  # fmt: skip
            sender.sendto(pack(message, TOKEN), address)
            job.watches[0].turn()
    for state, old_state in zip(job.watches[0].monitor.seen, before, strict=True):
        assert vars(state) | {"at": 0} == old_state | {"at": 0}
    assert job.left == job.notes == []
    # A correct datagram is heard.
    job.step()
    assert unpack_message(good, TOKEN, 3).body == beat
    job.run(1)
    assert job.watches[0].monitor.seen[1].count == job.flights[1].count > before[1]["count"]


def test_where_no_datagram_arrives_files_do(job, tmp_path):
    """Nobody listens at the addresses: heartbeats, flights and the end go through the run directory."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        job = job(reach=lambda address: [nobody.getsockname()])
        job.run(6, progress=True)
        assert all(not watch.routes and watch.courier is not None for watch in job.watches)
        for rank in (0, 1):
            job.call(rank)
        job.run(20)
        assert "rank 2 on host2 computes" in job.notes[0][1]
        assert [len(rank.operations) for rank in read_flights(tmp_path / FLIGHTS)[0]] == [13, 13, 12]
        job.run(30)
        assert sorted(job.shown) == [0, 1, 2] and (2, 1) in job.left
    job.watches[0].courier.close()
    assert not (tmp_path / FOLDER).exists()


def test_who_can_be_reached_by_nothing_is_told_at_the_start(job):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        job = job(reach=lambda address: [nobody.getsockname()])
        job.watches[2].folder = None
        job.run(7, progress=True)
    assert job.notes == [(0, "note: rank 2 cannot be watched: neither datagrams nor files arrive from there")]


def test_the_first_address_that_answers_is_taken(job):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        job = job(reach=lambda address: [nobody.getsockname(), ("127.0.0.1", 0), address])
        job.run(2)
    assert job.watches[2].routes == {rank: job.watches[rank].datagrams.addresses[0] for rank in (0, 1)}
    assert all(watch.courier is None for watch in job.watches)


def test_a_folder_that_does_not_answer_holds_up_nobody(job, tmp_path, monkeypatch):
    """The stall is told, and the job ends, though the flights cannot be written."""
    monkeypatch.setattr("psmpi.comm.watch.watch.WRITE", 0.05)
    free = threading.Event()
    monkeypatch.setattr("psmpi.comm.watch.watch.write_flights", lambda folder, tables: free.wait(30))
    job = job()
    stop(job, 2)
    job.run(45, stopped=[2])
    free.set()
    assert "rank 2 on host2 is silent" in job.notes[0][1] and "does not answer" in job.notes[1][1]
    assert (0, 1) in job.left


def test_a_rank_that_leaves_is_not_missed(job):
    job = job()
    job.run(3, progress=True)
    job.watches[2].post(BYE, 0)
    job.watches[2].post(BYE, 1)
    job.run(20, stopped=[2])
    assert job.notes == []


def test_a_flight_fits_a_datagram():
    flight = Flight()
    for k in range(2000):
        flight.begin([random.Random(k).randbytes(20).hex(), NO_GROUP, 0, -1, k, k, time.monotonic(), 0.0])
    table = to_table(flight, 1, "host")
    for limit, fewest in ((LONGEST, 500), (8000, 50), (1200, 3), (300, 0)):
        data = pack_flight(table, limit)
        unpacked = unpack_flight(data)
        assert len(data) <= limit and fewest <= len(unpacked["operations"]) <= 2000
        assert unpacked["operations"] == table["operations"][2000 - len(unpacked["operations"]) :]
    for data in (b"", b"x", pack_flight({**table, "rank": "one"}, 10**6)):
        with pytest.raises(ValueError):
            unpack_flight(data)


def test_watches_of_a_world_of_ranks_begin_and_end(capfd):
    """Ranks exchange tokens and addresses as control data; no thread is left, and nothing is printed."""
    before = set(threading.enumerate())

    def work(world):
        control = Control(recorded(world))
        with watched(control, 60.0, 1800.0) as watch:
            end = time.monotonic() + 10
            while len(watch.routes) < 1 and time.monotonic() < end:
                time.sleep(0.01)
            control.wait_for_all()
            heard = [state.heard for state in watch.monitor.seen] if watch.monitor else []
            return watch.patience, list(watch.monitors), len(watch.token), watch.thread.daemon, heard

    results = run_ranks(3, work)
    assert {result[:4] for result in results if not isinstance(result[1], list)} == set()
    assert all(
        result[0] == Patience(60.0, 1800.0, 1.0, 15.0) and result[1] == [0, 1] and result[2] == 32 for result in results
    )
    assert not {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("watch")}
    assert capfd.readouterr() == ("", "")


def test_watches_that_do_not_begin_leave_no_socket(monkeypatch, capfd):
    """Another rank ends the job while addresses are collected, or the system has no thread left."""
    sockets = []

    def note(**options):
        sockets.append(Datagrams(**options))
        return sockets[-1]

    monkeypatch.setattr(watch_module, "Datagrams", note)

    def leave(world):
        control = Control(recorded(world))
        if world.rank == 1:
            control.collect_texts(json.dumps(Process.own()))
            control.share("")
            raise ValueError("this rank ends the job")
        with watched(control, 60.0, 1800.0):
            raise AssertionError

    with pytest.raises(ValueError, match="this rank ends the job"):
        run_ranks(2, leave)
    assert [datagrams.socket for datagrams in sockets] == [None]

    original_init = Watch.__init__

    def without_thread(self, *words, **options):
        original_init(self, *words, **options)
        self.thread.start = refuse

    def refuse():
        raise RuntimeError("can't start new thread")

    def go_on(world):
        with watched(Control(recorded(world)), 60.0, 1800.0) as watch:
            return watch

    monkeypatch.setattr(Watch, "__init__", without_thread)
    assert run_ranks(2, go_on) == [None, None]
    assert [datagrams.socket for datagrams in sockets] == [None, None, None]
    assert "is not watched: can't start new thread" in capfd.readouterr().err


def test_one_rank_and_no_warnings_have_no_watch():
    def work(world):
        with watched(Control(recorded(world)), 0.0, 0.0) as watch:
            return watch

    assert run_ranks(2, work) == [None, None] and run_ranks(1, work) == [None]


def test_an_error_in_the_watch_is_no_error_of_the_training(job, capfd, monkeypatch):
    watch = job().watches[2]
    monkeypatch.setattr(watch, "turn", lambda: 1 / 0)
    watch.start()
    watch.thread.join(10)
    assert not watch.thread.is_alive()
    assert "note: rank 2 is not watched any more: ZeroDivisionError" in capfd.readouterr().err


def test_flights_are_written_whole_and_through_no_link(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in (FLIGHTS, f".{FLIGHTS}.part"):
        (tmp_path / name).symlink_to(outside)
    write_flights(tmp_path, [{"rank": 0}, {"rank": 1}])
    assert outside.read_text() == "mine" and not (tmp_path / FLIGHTS).is_symlink()
    assert [json.loads(line)["rank"] for line in (tmp_path / FLIGHTS).read_text().splitlines()] == [0, 1]


def test_stacks_name_the_rank_and_every_thread(capfd):
    show_stacks(3, 8, "somewhere")
    err = capfd.readouterr().err
    assert err.startswith("psmpi, rank 3 of 8 on somewhere: ") and "test_stacks_name_the_rank" in err


def test_a_process_is_known_by_its_number_and_start():
    own = Process.own()
    if not own.start:
        pytest.skip("no /proc here")
    assert own.lives and own.start == start_of(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        other_process = own._replace(pid=child.pid, start=start_of(child.pid))
        assert f"though its process {child.pid} is there" in own.condition(other_process)
        assert own.condition(other_process._replace(processes="of another host")) == ""
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        assert f"stopped by a signal (kill -CONT {child.pid}" in own.condition(other_process)
        os.kill(child.pid, signal.SIGCONT)
    assert own.condition(other_process) == "its process has ended"
    assert not own._replace(start="1").lives and not own._replace(pid=2**22 + 1).lives


def test_stopped_children_go_on():
    if not Process.own().start:
        pytest.skip("no /proc here")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        os.kill(child.pid, signal.SIGSTOP)
        os.waitpid(child.pid, os.WUNTRACED)
        wake_children()
        child.stdin.write(b"go on\n")
        child.stdin.close()
        assert child.wait(30) == 0


def test_own_addresses_begin_with_the_loopback():
    addresses = own_addresses()
    assert addresses[0] == "127.0.0.1" and len(set(addresses)) == len(addresses)
    assert all(socket.inet_aton(address) for address in addresses)


def test_heads_have_one_layout():
    """The first bytes of a message are known to tools that look at the network."""
    data = pack(Message(HELLO, 5, 6, b"body"), TOKEN)
    assert data[: HEAD.size] == b"psw1" + bytes([1]) + struct.pack("!II", 5, 6) and len(data) == HEAD.size + 4 + 16
    assert HEARTBEAT.size == 17


def test_a_rank_whose_messages_are_lost_does_not_end_a_job_that_goes_on(job):
    """No rank waits for the silent one: the silence is told, and the job goes on."""
    job = job()
    job.run(5, progress=True)
    job.run(100, stopped=[2], progress=True)
    assert "rank 2 on host2 is silent" in job.notes[0][1] and "the job ends" not in job.notes[0][1]
    assert job.left == job.shown == [] and len(job.notes) == 2


def test_a_watch_that_fails_is_neither_silent_nor_missed(job):
    job = job()
    job.run(12, progress=True)
    job.watches[2]._leave(b"failed")
    job.run(60, stopped=[2], progress=True)
    assert job.notes == []
    for rank in (0, 1):
        job.call(rank)
    job.run(15, stopped=[2])
    assert "rank 2 on host2 is waited for, and is not watched" in job.notes[0][1]


def test_the_time_that_a_rank_was_stopped_is_none_that_it_computed(job):
    job = job(patience=Patience(10.0, 0.0, 1.0))
    stop(job, 2)
    job.run(100, stopped=[2])
    job.call(2)
    for flight in job.flights:
        flight.last()[-1] = time.monotonic()
    job.run(5, progress=True)
    assert all(state.longest < 12 for state in job.watches[0].monitor.seen)


def test_heartbeats_of_many_ranks_are_spread_over_the_interval(job):
    job = job(size=20)
    starts = [watch.next - watch.begun for watch in job.watches]
    assert starts == sorted(starts) and starts[0] == 0 and 0.9 < starts[-1] < 1.0


def test_files_of_messages_are_in_no_other_folder(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "0-1-3").write_text("mine")
    (tmp_path / FOLDER).symlink_to(outside)
    courier = Courier(tmp_path / FOLDER, 0, 1.0, clears=True)
    courier.send(b"hello", Message(HELLO, 0, 1, b""))
    courier.turn()
    courier.stopping.set()
    courier._run()
    assert [path.read_text() for path in outside.iterdir()] == ["mine"] and not list(courier.receive())


def test_messages_by_files_go_by_a_thread_of_their_own(tmp_path):
    """The messages are removed with their folder when the courier that clears it has closed."""
    first, second = Courier(tmp_path / FOLDER, 0, 0.02, clears=True), Courier(tmp_path / FOLDER, 1, 0.02)
    first.start()
    second.start()
    end, received = time.monotonic() + 20, []
    while not received and time.monotonic() < end:
        second.send(b"hello", Message(HELLO, 1, 0, b""))
        time.sleep(0.01)
        received += first.receive()
    assert received[0] == b"hello"
    first.close(20)
    second.send(b"bye", Message(BYE, 1, 0, b""))
    second.close(20)
    assert not (tmp_path / FOLDER).exists() and not first.thread.is_alive() and not second.thread.is_alive()
