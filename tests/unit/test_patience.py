"""Ranks that sleep while they wait: bells between processes, the choice to sleep, and cores for each rank."""

import os
import sys
import time

import pytest

pytest.importorskip("mpi4py.MPI")

from helpers.processes import launch

from psmpi.comm import bells, patience
from psmpi.comm.bells import Bells
from psmpi.comm.patience import PatientRequest, patient
from psmpi.errors import UserError
from psmpi.testing import run_ranks

linux = pytest.mark.skipif(sys.platform != "linux", reason="bells are Linux's")


class Request:
    """A request that is done at the test number `look`, counted from 1."""

    def __init__(self, look):
        self.looks, self.look = 0, look

    def Test(self):
        self.looks += 1
        return self.looks >= self.look


def on_two(work):
    """Run work(bells) on two ranks of one host, which are threads."""
    return run_ranks(2, lambda world: work(Bells(world)))


@linux
def test_a_bell_ends_a_sleep():
    def work(bells):
        if bells.number == 1:
            time.sleep(0.1)
            bells.ring([0])
            return True
        bells.arm()
        return bells.sleep(0.9)

    assert on_two(work) == [True, True]


@linux
def test_a_bell_that_rang_before_the_sleep_is_heard():
    """A rank that misses a bell between its last look and its sleep would sleep although its message is there."""

    def work(bells):
        bells.arm()
        bells.ring([bells.number])
        return bells.sleep(0.9)

    assert on_two(work) == [True, True]


def test_without_a_bell_a_sleep_ends_in_time():
    def work(bells):
        bells.arm()
        return bells.sleep(0.01)

    assert on_two(work) == [False, False]


def test_without_bells_ranks_sleep_some_time(monkeypatch):
    monkeypatch.setattr(bells, "FUTEX", {})

    def work(bells):
        request = PatientRequest(Request(9), bells, (), (), patience.UNCALLED)
        request.Wait()
        return request.request.looks

    assert on_two(work) == [9, 9]


def test_bells_leave_no_files(tmp_path, monkeypatch):
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    on_two(lambda bells: None)
    after = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    assert not [name for name in after - before if name.startswith("psmpi-bells")]


@pytest.mark.parametrize("awake", [False, True])
def test_who_may_wait_is_woken_at_the_begin_and_at_the_end(awake):
    rings = []

    def work(bells):
        bells.awake = awake
        bells.ring = lambda places: rings.append((bells.number, tuple(places)))
        if bells.number == 0:
            PatientRequest(Request(12), bells, (1,), (0, 1), (1e-4, 1e-4, 0.0)).Wait()

    on_two(work)
    assert rings[0] == (0, (1,)) and rings[-1] == (0, (0, 1))


def test_a_test_that_finds_it_done_wakes_too():
    rings = []

    def work(bells):
        bells.ring = rings.append
        request = PatientRequest(Request(2), bells, (), (5,), (1e-4, 1e-4, 0.0))
        return [request.Test(), len(rings), request.Test(), len(rings)]

    assert run_ranks(1, lambda world: work(Bells(world))) == [[False, 1, True, 2]]


@pytest.mark.parametrize(
    ("said", "ranks", "cores", "sleeps"),
    [("", 2, 2, False), ("", 3, 2, True), ("spin", 3, 2, False), ("sleep", 1, 2, True)],
)
def test_ranks_sleep_where_they_outnumber_cores_or_are_told_to(monkeypatch, said, ranks, cores, sleeps):
    """One of two hosts has these ranks and cores; the other has cores enough."""
    monkeypatch.setenv("PSMPI_WAIT", said)

    class Answer(Exception):
        pass

    def raise_answer(local):
        raise Answer

    monkeypatch.setattr(patience, "Bells", raise_answer)

    def work(world):
        try:
            return patient(world, *((ranks, cores) if world.rank else (1, 8))) is not world
        except Answer:
            return True

    assert run_ranks(2, work) == [sleeps, sleeps]


def test_other_ways_to_wait_are_refused(monkeypatch):
    monkeypatch.setenv("PSMPI_WAIT", "dream")
    with pytest.raises(UserError, match="PSMPI_WAIT=dream: expected spin or sleep"):
        run_ranks(2, lambda world: patient(world, 3, 2))


@linux
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_ranks_that_compute_get_a_core_each(tmp_path):
    """Of three ranks on two cores the first does not compute; if it computes too, all ranks stay awake."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "cores = sorted(os.sched_getaffinity(0))[:2]\n"
        "os.sched_setaffinity(0, cores)\n"
        "from psmpi.comm.patience import settle\n"
        "from psmpi.comm.world import start\n"
        "world = start()\n"
        "settle(world, cores, world.rank > 0)\n"
        "own_cores = sorted(os.sched_getaffinity(0))\n"
        "expected = [cores, cores[:1], cores[1:]][world.rank]\n"
        "assert own_cores == expected, (world.rank, own_cores)\n"
        "assert world.bells.awake == (world.rank > 0)\n"
        "settle(world, cores, True)\n"
        "assert sorted(os.sched_getaffinity(0)) == expected\n"
        "assert world.bells.awake\n"
    )
    status, out, err = launch(3, program)
    assert status == 0, err + out
