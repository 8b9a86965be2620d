"""Windows of MPI and of ranks that are threads: no addition is lost, each ticket is drawn once, and no rank is too far
ahead."""

import json
import os
import signal
import time

import pytest
from helpers import program_windows
from helpers.paths import TESTS
from helpers.processes import finish, launch, start

from psmpi.backend import compiled
from psmpi.testing.world import run_ranks

PROGRAM = TESTS / "helpers" / "program_windows.py"
KINDS = [("threads", 1), ("threads", 4), ("mpirun", 3), ("mpirun", 4)]


def results(kind, ranks, check, *arguments):
    """Return rank 0's result of a check of program_windows.py."""
    if kind == "threads":
        return run_ranks(ranks, lambda world: program_windows.CHECKS[check](world, *arguments), timeout=60)[0]
    status, out, err = launch(ranks, PROGRAM, check, *map(json.dumps, arguments))
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize(("kind", "ranks"), KINDS)
def test_no_addition_is_lost(kind, ranks):
    assert results(kind, ranks, "sums") == ["", *[True] * 6]


@pytest.mark.skipif(not compiled.level(), reason="no compiled kernels, or none for this processor")
@pytest.mark.parametrize(("kind", "ranks"), KINDS)
def test_atomic_additions_are_all_there_and_of_plain_stores_no_more(kind, ranks):
    expected, atomic, plain = results(kind, ranks, "shared")
    print(f"{expected - plain:.0f} of {expected} increments lost by plain stores")
    assert atomic == expected
    assert 0 < plain <= expected


@pytest.mark.parametrize(("kind", "ranks"), KINDS)
def test_every_ticket_is_drawn_once(kind, ranks):
    first, later = results(kind, ranks, "tickets")
    assert list(first) == list(range(100))
    assert list(later) == list(range(105, 120))


@pytest.mark.parametrize("bound", [0, 2, 4])
@pytest.mark.parametrize(("kind", "ranks"), [("threads", 4), ("mpirun", 4)])
def test_nobody_begins_too_far_ahead(kind, ranks, bound):
    lead, difference, missed = results(kind, ranks, "bounded", bound)
    assert lead <= bound
    assert difference <= bound + 1
    assert missed == 0


@pytest.mark.parametrize(("kind", "ranks"), [("threads", 3), ("mpirun", 3)])
def test_windows_come_and_go(kind, ranks):
    assert results(kind, ranks, "cycles") < 20


@pytest.mark.parametrize("bound", [-1, 3])
def test_a_stopped_rank_stops_others_at_the_bound_alone(tmp_path, bound):
    process = start(3, PROGRAM, "stopped", bound, json.dumps(str(tmp_path)))

    def counts():
        return [int((tmp_path / f"count-{rank}").read_text()) for rank in range(3)]

    end = time.monotonic() + 30
    while not all((tmp_path / f"count-{rank}").exists() for rank in range(3)) and time.monotonic() < end:
        time.sleep(0.01)
    pid = int((tmp_path / "pid-1").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(0.5)
        before = counts()
        time.sleep(1.5)
        after = counts()
    finally:
        os.kill(pid, signal.SIGCONT)
    time.sleep(0.2)
    (tmp_path / "end").touch()
    status, out, err = finish(process, 60)
    assert status == 0, err
    total, clocks = json.loads(out)
    assert total == clocks
    # The stopped rank may have counted a clock that it had not written to its file.
    assert after[1] - before[1] <= 1
    for rank in (0, 2):
        if bound < 0:
            assert after[rank] > before[rank] + 5
        else:
            assert after[rank] == before[rank] and after[rank] - after[1] <= bound + 2
    assert clocks > sum(after)
