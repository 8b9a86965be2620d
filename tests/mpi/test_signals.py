"""Runs that a signal stops: saved at a step that all ranks agree on, and resumed to the same bits."""

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
    """Start a run, send it a signal after two rows of metrics, and return (status, stdout, stderr)."""
    process = start(ranks, "-m", "psmpi.train", "--out", out, *OPTIONS, *options)
    rows = out / "metrics.jsonl"
    start_time = time.monotonic()
    while not (rows.exists() and rows.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() - start_time < 60
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
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
        (1, signal.SIGHUP),
        pytest.param(3, signal.SIGUSR1, marks=pytest.mark.slow),
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
    stopped_run = Trained(tmp_path / "run", out)
    assert len(stopped_run.rows) < 24
    resumed = train(ranks, *OPTIONS, *method, "--resume", "auto", out=tmp_path / "run")
    full_run = undisturbed(ranks, *OPTIONS, *method)
    assert [row["epoch"] for row in resumed.rows] == list(range(1, 25))
    for name, tensor in full_run.tensors().items():
        assert np.array_equal(tensor, resumed.tensors()[name]), name


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_all_ranks_find_a_yes_at_the_same_call(ranks):
    """Each rank in turn says yes, and ranks have different speeds."""
    for speaker in range(ranks):

        def work(world, speaker=speaker):
            poll, answered = Poll(Control(world), seconds=0.01), 0
            for call in range(2000):
                # Ranks have different speeds.
                time.sleep(0.0001 * (world.rank + 1))
                if call == 40 and world.rank == speaker:
                    answered = call
                if poll(answered > 0)[0]:
                    poll.close()
                    return call
            raise AssertionError("nobody was told")

        calls = run_ranks(ranks, work, timeout=60)
        assert len(set(calls)) == 1 and 40 <= calls[0] < 1000


def test_an_answer_to_the_second_question_can_be_taken_back():
    """All ranks hear the second answer at the same call, and after forget() only if it is given again; the first answer
    stays."""

    def work(world):
        poll, calls_with_yes = Poll(Control(world), seconds=0.01), []
        for call in range(1500):
            time.sleep(0.0001)
            first, second = poll(call == 900 and world.rank == 0, call in (40, 500) and world.rank == 2)
            if second:
                calls_with_yes.append(call)
                poll.forget()
            if first:
                poll.close()
                return [*calls_with_yes, call]
        raise AssertionError(f"heard at {calls_with_yes}")

    by_rank = run_ranks(3, work, timeout=60)
    assert by_rank[0] == by_rank[1] == by_rank[2] and len(by_rank[0]) == 3
    assert 40 <= by_rank[0][0] < 500 <= by_rank[0][1] < 900 <= by_rank[0][2]


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_hear_the_sums_of_what_all_gave_at_one_call(ranks):
    def work(world):
        poll, sums_by_call = Poll(Control(world), seconds=0.001, numbers=2), []
        for call in range(300):
            poll.numbers[:] = call, world.rank + 1
            poll(False)
            sums_by_call.append(poll.number_sums.copy())
        poll.close()
        return np.array(sums_by_call)

    by_rank = run_ranks(ranks, work)
    total = ranks * (ranks + 1) / 2
    for sums in by_rank:
        assert np.array_equal(sums, by_rank[0])
        received = sums[sums[:, 1] > 0]
        calls = received[:, 0] / ranks
        # Each sum is of one earlier call, and calls come in their order.
        assert len(received) > 200 and np.all(received[:, 1] == total) and np.all(calls == np.round(calls))
        assert np.all(np.diff(calls) >= 0) and np.all(calls <= np.arange(300)[sums[:, 1] > 0]) and calls[-1] > 100


def test_what_is_said_at_a_signal_may_go_to_another_place(tmp_path, capfd):
    """The message goes to a file, such as a launcher's terminal, or to stderr where the file cannot be opened."""
    place = tmp_path / "terminal"
    for path in (place, tmp_path / "none" / "there"):
        place.write_text("")
        with StopSignals(message="soon", shown=str(path)):
            signal.raise_signal(signal.SIGTERM)
        err = capfd.readouterr().err
        assert (place.read_text(), err) == (("\nSIGTERM: soon\n", "") if path == place else ("", "SIGTERM: soon\n"))


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
    """An event loop of asyncio sets a wakeup descriptor, and StopSignals restores it."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    try:
        with StopSignals():
            pass
        assert signal.set_wakeup_fd(-1) == writer.fileno()
    finally:
        signal.set_wakeup_fd(-1)
        reader.close()
        writer.close()


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
    """A process under nohup ignores SIGHUP."""
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
    """MPI libraries catch SIGHUP and do nothing; psmpi's programs end all the same."""
    # The tests themselves may run with SIGHUP ignored.
    code = "import signal, time\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\nfrom psmpi.comm import world\n"
    code += "world.start()\nprint('ready', flush=True)\ntime.sleep(30)\n"
    process = start(1, "-c", code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert finish(process, 20)[0] == -signal.SIGHUP


def test_other_threads_than_the_main_one_note_nothing():
    replaced = []

    def work():
        with StopSignals() as signals:
            replaced.append(signals.before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert replaced == [{}]
