"""The world of threads: errors end it with a message, and the state of the process is restored."""

import ast
import gc
import os
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from psmpi import testing
from psmpi.comm.group import Counter, Group
from psmpi.testing import DeadlockError, run_ranks


def test_a_rank_that_raises_ends_the_others():
    def work(world):
        if world.rank == 1:
            raise ValueError("the moon is full")
        world.Barrier()

    begun = time.monotonic()
    with pytest.raises(ValueError, match="the moon is full"):
        run_ranks(3, work)
    assert time.monotonic() - begun < 5


def test_ranks_compute_without_warnings_of_numbers():
    """Overflow does not warn on ranks, as in training; elsewhere in tests warnings are errors."""
    products = run_ranks(2, lambda world: np.float32([3e38]) * np.float32(world.rank + 10))
    assert np.isinf(products).all()


def test_a_rank_that_raises_ends_those_that_compute_at_their_next_call():
    def work(world):
        if world.rank == 0:
            raise ValueError("gone")
        for _ in range(10**6):
            world.Isend(np.zeros(1), 0)
            time.sleep(0.001)

    with pytest.raises(ValueError, match="gone"):
        run_ranks(2, work)


@pytest.mark.parametrize("ends", [False, True])
def test_a_deadlock_is_found_at_once(ends):
    def work(world):
        if world.rank > 0:
            world.Recv(np.zeros(2), 0, tag=7)
        elif not ends:
            world.Barrier()

    begun = time.monotonic()
    with pytest.raises(DeadlockError, match="rank 1 waits in Recv from 0, tag 7"):
        run_ranks(3, work)
    assert time.monotonic() - begun < 5


def test_a_rank_that_others_wait_for_too_long_is_named():
    def work(world):
        if world.rank == 0:
            time.sleep(1)
        world.Barrier()

    with pytest.raises(DeadlockError, match=r"has waited 0 s: rank 0 computes, rank 1 waits in Barrier"):
        run_ranks(2, work, patience=0.3)


def test_a_world_that_takes_too_long_is_ended():
    def work(world):
        for _ in range(10**6):
            time.sleep(0.01)
            world.Barrier()

    with pytest.raises(TimeoutError, match="no end within 0 s"):
        run_ranks(2, work, timeout=0.3)
    end = time.monotonic() + 5
    while any(thread.name.startswith("rank ") for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_collectives_that_do_not_match_are_named():
    def work(world):
        if world.rank == 0:
            world.Bcast(np.zeros(1), 0)
        else:
            world.Barrier()

    with pytest.raises(RuntimeError, match=r"calls (Barrier|Bcast from 0), collective 0 of 2 ranks, but other"):
        run_ranks(2, work)


@pytest.mark.parametrize("size", [2, 4])
def test_messages_of_another_size_or_type_are_refused(size):
    def work(world):
        if world.rank == 0:
            world.Send(np.zeros(3), 1)
        else:
            world.Recv(np.zeros(size, np.float32 if size == 4 else np.float64), 0)

    with pytest.raises(ValueError, match="the message has 3 float64"):
        run_ranks(2, work)


def test_messages_of_one_tag_come_in_the_order_of_their_receives():
    def work(world):
        first, second = np.zeros(1), np.zeros(1)
        if world.rank == 0:
            for value in (1.0, 2.0):
                world.Send(np.full(1, value), 1)
            return None
        requests = [world.Irecv(first, 0), world.Irecv(second, 0)]
        requests[1].Wait()
        requests[0].Wait()
        return first[0], second[0]

    assert run_ranks(2, work)[1] == (1, 2)


def test_groups_have_collectives_of_their_own():
    def work(world):
        group = Group(world, [2, 0], Counter())
        other_group = Group(world, [1, 0], Counter())
        value = np.full(1, 10.0 + world.rank)
        if group.rank >= 0:
            group.bcast(value)
        if other_group.rank >= 0:
            other_group.bcast(value)
        return value[0]

    assert run_ranks(3, work) == [11, 11, 12]


def state():
    pools = [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info()]
    return os.getcwd(), sys.stdout, sys.stderr, dict(os.environ), np.geterr(), pools, list(warnings.filters)


@pytest.mark.parametrize("options", [("--max-steps", "2"), ("--lr", "0"), ("--dataset", "none.npz")])
def test_the_process_is_afterwards_as_it_was(tmp_path, options):
    random = np.random.get_state()[1].copy()
    before = state()
    result = testing.train(3, ["--out", tmp_path / "run", *options], cwd=tmp_path)
    assert result.status == (options[0] != "--max-steps")
    assert state() == before and np.array_equal(np.random.get_state()[1], random)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("rank ", "builder"))]
    # The run directory is free.
    assert testing.train(1, ["--out", tmp_path / "run", "--max-steps", "3", "--resume", "auto"]).status == 0


def test_rank_zero_speaks_and_paths_are_of_the_folder(tmp_path):
    result = testing.train(3, ["--out", "here", "--max-steps", "2"], cwd=tmp_path)
    assert (tmp_path / "here" / "metrics.jsonl").exists()
    assert result.stdout.count("computes with") == 1 and result.stdout.count("\nepoch ") == 1 and not result.stderr


def test_a_failure_is_told_as_under_mpirun(tmp_path):
    result = testing.train(3, ["--out", tmp_path, "--dataset", "none.npz"])
    assert (
        result.status == 1 and result.stderr.startswith("psmpi, rank 0 of 3 on ") and "Traceback" not in result.stderr
    )


def test_ranks_may_all_parse_source_at_once(monkeypatch):
    """np.load and inspect parse source; a callback of the garbage collector lets other threads run meanwhile."""

    def wait(phase, info):
        time.sleep(1e-5)

    source = "x = [(1, 2), {3: f(4)}]\n" * 800
    monkeypatch.setitem(sys.modules, "parser", SimpleNamespace(main=lambda _: len(ast.parse(source).body) != 800))
    threshold = gc.get_threshold()
    gc.callbacks.append(wait)
    try:
        gc.set_threshold(100)
        result = testing.run_program(3, "parser", [])
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(wait)
    assert result.status == 0, result.stderr


def test_ranks_parse_their_command_lines_one_at_a_time(monkeypatch):
    inside, counts = [], []

    def cli(*_, **__):
        inside.append(1)
        time.sleep(0.05)
        counts.append(len(inside))
        inside.pop()
        raise SystemExit(0)

    monkeypatch.setattr("tyro.cli", cli)
    assert testing.run_program(3, "psmpi.bench", ["network"]).status == 0
    assert counts == [1, 1, 1]


def test_a_deadlock_in_a_program_is_an_error(tmp_path, monkeypatch):
    from psmpi.training.loop import Loop

    def save(self, best=False):
        if self.control.rank > 0:
            self.control.wait_for_all()

    monkeypatch.setattr(Loop, "_save", save)
    with pytest.raises(DeadlockError, match="rank 0 has ended"):
        testing.train(2, ["--out", tmp_path / "run", "--max-steps", "2"])


def test_what_is_to_come_is_no_number_before_it_is_there():
    def work(world):
        values = np.zeros(3)
        request = world.Irecv(values, 0) if world.rank else None
        before = values.copy()
        world.Barrier()
        if request is None:
            world.Send(values, 1)
        else:
            request.Wait()
        return before, values

    (_, _), (before, after) = run_ranks(2, work)
    assert np.isnan(before).all() and (after == 0).all()


@pytest.mark.parametrize("call", ["Isend", "Ibcast", "Ireduce"])
def test_what_is_sent_is_not_written_before_it_is_sent(call):
    def work(world):
        values, into = np.ones(3), np.empty(3)
        if call == "Isend":
            request = world.Isend(values, 1) if world.rank == 0 else world.Irecv(into, 0)
        elif call == "Ibcast":
            request = world.Ibcast(values if world.rank == 0 else into, 0)
        else:
            request = world.Ireduce(values, into if world.rank else None, root=1)
        values[0] = 2
        request.Wait()

    with pytest.raises(RuntimeError, match="rank 0 wrote to the array that it sends before"):
        run_ranks(2, work)
