"""MPI's collectives between emulated distant hosts end at the times that the cost model predicts."""

import json
import sys

import pytest
from helpers.paths import TESTS

from psmpi.bench.hosts import slow_hosts, wrapper
from psmpi.bench.network import launcher, run_program
from psmpi.comm.world import library
from psmpi.cost import Call, Link, Network, Program, make_schedule, simulate
from psmpi.errors import UserError

SECONDS, MEGABITS = 0.1, 100.0
ONE_SIZE = ("Bcast", "Reduce", "Allreduce", "Barrier")
# No message exceeds the first window of TCP.
WORDS = ("Barrier:0", "Bcast:8000", "Reduce:2048", "Reduce:8000", "Allreduce:8", "Allreduce:512", "Allgather:800",
         "Reduce_scatter:800")  # fmt: skip


def predicted(size, word):
    name, nbytes = word.split(":")
    sizes = (int(nbytes),) if name in ONE_SIZE else (int(nbytes),) * size
    peer = 0 if name in ("Bcast", "Reduce") else -1
    call = Call(0.0, name, "all", tuple(range(size)), 0, peer, sizes)
    link = Link.of(SECONDS, MEGABITS * 1e6 / 8)
    times = simulate(
        make_schedule([Program([call], [1], [0.0]) for _ in range(size)]), Network(tuple(range(size)), link, link)
    )
    return [ends[-1] for ends in times.ends]


# Five ranks wait on two cores, so this test does not run beside others.
@pytest.mark.parametrize("size", [2, pytest.param(5, marks=[pytest.mark.slow, pytest.mark.repeated])])
def test_collectives_end_when_the_cost_model_says(size):
    """The times, in latencies between two hosts, show the rounds of each algorithm, and which algorithm MPICH takes."""
    if "MPICH" not in library():
        pytest.skip("other MPIs have other algorithms")
    try:
        with slow_hosts(size, MEGABITS, delay_ms=1e3 * SECONDS) as hosts:
            program = [sys.executable, str(TESTS / "helpers" / "program_latencies.py"), *WORDS]
            out = run_program([launcher(), "-n", str(size), *wrapper(hosts), *program], True, 120)
    except UserError as error:
        pytest.skip(f"no such hosts here: {error}")
    seconds = json.loads(out.splitlines()[-1])
    for word in WORDS:
        expected = predicted(size, word)
        assert seconds[word] == pytest.approx(expected, abs=0.4 * SECONDS), word
