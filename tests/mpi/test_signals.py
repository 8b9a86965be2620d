"""Runs that a signal stops: saved at a step that all ranks agree on, and gone on with to the same bits."""

import signal
import socket
import threading
import time
from functools import cache

import numpy as np
import pytest
from helpers.processes import finish, start
from helpers.runs import Trained, trainer

from psmpi.comm import signals
from psmpi.comm.control import Control, Poll
from psmpi.comm.signals import StopSignals
from psmpi.testing import run_ranks

OPTIONS = ("--dtype", "float64", "--threads", "1", "--batch-size", "20", "--epochs", "24", "--lr", "0.001",
           "--checkpoint-every", "9999")  # fmt: skip


def stopped(ranks, out, number, *options):
    """A run that gets a signal when it has some rows of metrics; how it ended."""
    process = start(ranks, "-m", "psmpi.train", "--out", out, *OPTIONS, *options)
    rows = out / "metrics.jsonl"
    begun = time.monotonic()
    while not (rows.exists() and rows.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() - begun < 60
        time.sleep(0.02)
    process.send_signal(number)
    return finish(process, 60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(ranks, *options): a training to its end, made once."""
    return cache(trainer(tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        (1, signal.SIGTERM),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
        (1, signal.SIGHUP),
        (3, signal.SIGUSR1),
        pytest.param(3, signal.SIGTERM, marks=pytest.mark.slow),
        (3, signal.SIGINT),
    ],
)
def test_a_stopped_run_is_saved_and_ends_as_if_it_had_not_been(train, undisturbed, tmp_path, ranks, number):
    method = ("--method", "local_sgd", "--local-steps", "7") if ranks > 1 else ()
    status, out, err = stopped(ranks, tmp_path / "run", number, *method)
    assert status == 85, err
    assert "and saved in" in out and "--resume auto --out" in out and "Traceback" not in err
    assert err.count("another signal ends it at once") == 1
    begun = Trained(tmp_path / "run", out)
    assert len(begun.rows) < 24
    resumed = train(ranks, *OPTIONS, *method, "--resume", "auto", out=tmp_path / "run")
    whole = undisturbed(ranks, *OPTIONS, *method)
    assert [row["epoch"] for row in resumed.rows] == list(range(1, 25))
    for name, tensor in whole.tensors().items():
        assert np.array_equal(tensor, resumed.tensors()[name]), name


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_all_ranks_find_a_yes_at_the_same_call(ranks):
    """Whoever said it, however fast they go, and at most two sums later."""
    for speaker in range(ranks):

        def work(world, speaker=speaker):
            poll, said = Poll(Control(world), seconds=0.01), 0
            for call in range(2000):
                # Not all of one speed.
                time.sleep(0.0001 * (world.rank + 1))
                if call == 40 and world.rank == speaker:
                    said = call
                if poll(said > 0)[0]:
                    poll.close()
                    return call
            raise AssertionError("nobody was told")

        found = run_ranks(ranks, work, timeout=60)
        assert len(set(found)) == 1 and 40 <= found[0] < 1000


def test_an_answer_to_the_second_question_can_be_taken_back():
    """All ranks hear it at the same call, and after it is forgotten only if it is said again; the first one stays."""

    def work(world):
        poll, heard = Poll(Control(world), seconds=0.01), []
        for call in range(1500):
            time.sleep(0.0001)
            first, second = poll(call == 900 and world.rank == 0, call in (40, 500) and world.rank == 2)
            if second:
                heard.append(call)
                poll.forget()
            if first:
                poll.close()
                return [*heard, call]
        raise AssertionError(f"heard at {heard}")

    found = run_ranks(3, work, timeout=60)
    assert found[0] == found[1] == found[2] and len(found[0]) == 3
    assert 40 <= found[0][0] < 500 <= found[0][1] < 900 <= found[0][2]


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_hear_the_sums_of_what_all_gave_at_one_call(ranks):
    def work(world):
        poll, heard = Poll(Control(world), seconds=0.001, numbers=2), []
        for call in range(300):
            poll.given[:] = call, world.rank + 1
            poll(False)
            heard.append(poll.heard.copy())
        poll.close()
        return np.array(heard)

    found = run_ranks(ranks, work)
    everyone = ranks * (ranks + 1) / 2
    for one in found:
        assert np.array_equal(one, found[0])
        told = one[one[:, 1] > 0]
        calls = told[:, 0] / ranks
        # Of one call each, some calls ago, and later ones later.
        assert len(told) > 200 and np.all(told[:, 1] == everyone) and np.all(calls == np.round(calls))
        assert np.all(np.diff(calls) >= 0) and np.all(calls <= np.arange(300)[one[:, 1] > 0]) and calls[-1] > 100


def test_what_is_said_at_a_signal_may_go_to_another_place(tmp_path, capfd):
    """As to the terminal of a launcher that passes on nothing more; where that cannot be opened, as ever."""
    place = tmp_path / "terminal"
    for shown in (place, tmp_path / "none" / "there"):
        place.write_text("")
        with StopSignals(message="soon", shown=str(shown)):
            signal.raise_signal(signal.SIGTERM)
        err = capfd.readouterr().err
        assert (place.read_text(), err) == (("\nSIGTERM: soon\n", "") if shown == place else ("", "SIGTERM: soon\n"))


def test_a_person_alone_need_not_wait_with_the_second_signal():
    caught = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    try:
        with StopSignals(one=0.05):
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(0.1)
            signal.raise_signal(signal.SIGUSR1)
            assert caught == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_sums_are_few_and_counted():
    def work(world):
        control = Control(world)
        poll = Poll(control, seconds=0.1)
        for _ in range(3000):
            assert not any(poll(False))
        poll.close()
        return control.counter.sent

    sent = run_ranks(2, work)
    assert 0 < sent[0] == sent[1] < 3000 * 16 / 10


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(signals, "ONE", 0.05)


def test_a_later_signal_does_what_it_did_before(quick):
    before = signal.getsignal(signal.SIGUSR1)
    caught = []
    signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    try:
        with StopSignals() as noted:
            assert not noted
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            assert noted and noted.name == "SIGUSR1" and caught == []
            time.sleep(0.1)
            signal.raise_signal(signal.SIGUSR1)
            assert caught == [signal.SIGUSR1]
        with StopSignals():
            pass
        signal.raise_signal(signal.SIGUSR1)
        assert caught == [signal.SIGUSR1] * 2
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_who_listens_to_signals_already_does_so_again():
    """As an event loop of asyncio does."""
    mine, other = socket.socketpair()
    other.setblocking(False)
    signal.set_wakeup_fd(other.fileno())
    try:
        with StopSignals():
            pass
        assert signal.set_wakeup_fd(-1) == other.fileno()
    finally:
        signal.set_wakeup_fd(-1)
        mine.close()
        other.close()


def test_signals_of_one_event_are_one():
    with StopSignals() as noted:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.raise_signal(number)
        assert noted.name == "SIGTERM"


def test_another_signal_may_be_the_one_that_saves():
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGUSR2)
    with StopSignals("USR2") as noted:
        assert signal.getsignal(signal.SIGUSR1) == before[0] and signal.getsignal(signal.SIGUSR2) != before[1]
        signal.raise_signal(signal.SIGUSR2)
        assert noted.name == "SIGUSR2"
    assert signal.getsignal(signal.SIGUSR2) == before[1]


def test_what_was_to_be_ignored_stays_ignored():
    """As of a process that nohup starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as noted:
            signal.raise_signal(signal.SIGHUP)
            assert not noted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_waits_in_a_library_ends_at_a_later_signal(tmp_path):
    code = (
        "import numpy as np\nfrom psmpi.comm import signals, world\nsignals.ONE, signals.GRACE = 0.2, 0.5\n"
        "comm = world.start()\nwith signals.StopSignals(message='soon'):\n"
        "    print('ready', flush=True)\n    comm.Recv(np.zeros(1), 0)\n"
    )
    process = start(1, "-c", code)
    assert process.stdout.readline() == "ready\n"
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
    assert finish(process, 20)[0] == 128 + signal.SIGTERM


def test_a_closed_terminal_ends_programs_that_do_not_train():
    """Libraries of MPI catch SIGHUP, and do nothing."""
    # Whoever starts the tests may have told them to ignore it.
    code = "import signal, time\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\nfrom psmpi.comm import world\n"
    code += "world.start()\nprint('ready', flush=True)\ntime.sleep(30)\n"
    process = start(1, "-c", code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert finish(process, 20)[0] == -signal.SIGHUP


def test_other_threads_than_the_main_one_note_nothing():
    found = []

    def work():
        with StopSignals() as signals:
            found.append(signals.before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [{}]
