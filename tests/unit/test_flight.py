"""The flight recorder keeps the operations of communicators, alike on all ranks, and changes no result."""

import time

import numpy as np
import pytest

from psmpi.comm.allreduce import doubling
from psmpi.comm.control import Control, Poll
from psmpi.comm.group import Counter, Group
from psmpi.comm.protocol import Communicator, World
from psmpi.comm.watch import flight
from psmpi.comm.watch.flight import BYTES, ENDED, NAME, NUMBER, PEER, ROOM, STEP, Flight, Recorded, recorded, spans
from psmpi.comm.watch.stalls import from_table, to_table
from psmpi.testing import run_ranks


def calls(world):
    """Make every call of a group and of control data; return the results."""
    results = []
    everyone = Group(world, range(world.size), Counter())
    two_ranks = Group(world, [0, 2], Counter())
    own = np.arange(6.0) + world.rank
    everyone.bcast(own, 1)
    everyone.reduce(own, own, 0)
    everyone.allreduce(own)
    everyone.wait(own, everyone.iallreduce(own))
    everyone.ibcast(own, 2).Wait()
    everyone.ireduce(own, 1).Wait()
    everyone.gather_all(own, [2, 2, 2])
    everyone.reduce_scatter(own.copy(), [2, 2, 2])
    everyone.scatterv(own, [2, 2, 2], [0, 2, 4], own[:2])
    everyone.gatherv(own[:2], own, [2, 2, 2], [0, 2, 4])
    everyone.alltoallv(own, [2, 2, 2], own.copy())
    into = np.empty(18)
    everyone.allgatherv(own, into, [6, 6, 6])
    results += [own, into]
    if world.rank == 0:
        everyone.send(own, 1)
        everyone.isend(own, 1, 3).Wait()
    elif world.rank == 1:
        everyone.receive(own, 0)
        everyone.irecv(own, 0, 3).Wait()
    if two_ranks.rank >= 0:
        two_ranks.allreduce(own)
        doubling(two_ranks, own)
    control = Control(world)
    control.wait_for_all()
    results += [own, control.total(own), control.rows(own), np.array(control.share_flag(world.rank == 0))]
    control.collect_texts("text")
    return results


def test_recorded_ranks_get_what_unrecorded_ones_get():
    plain = run_ranks(3, calls)
    for expected, actual in zip(plain, run_ranks(3, lambda world: calls(recorded(world))), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_collectives_have_one_name_and_number_on_all_their_ranks():
    def work(world):
        world = recorded(world)
        calls(world)
        return from_table(to_table(world.flight, world.rank, "here"))

    ranks = run_ranks(3, work)
    assert all(record.state == "computing" and record.operations[-1].ended for record in ranks)
    by_number = {}
    for record in ranks:
        for operation in record.operations:
            if operation.number and not operation.name.startswith("Wait"):
                by_number.setdefault((operation.group, operation.number), []).append(
                    (operation.name, operation.peer, operation.ranks)
                )
    assert len({group for group, _ in by_number}) == 3
    for same_call in by_number.values():
        assert len(set(same_call)) == 1 and len(same_call) == len(same_call[0][2])
    assert [operation.peer for operation in ranks[1].operations if operation.kind in ("Recv", "Irecv")] == [0, 0, 0]
    # The peer is a rank of the job, not a number in the group.
    assert [operation.peer for operation in ranks[0].operations if operation.name == "Sendrecv"] == [2]


def test_every_call_of_the_protocol_is_recorded():
    """Free and Abort send no message and are not recorded."""
    required = {name for kind in (Communicator, World) for name in vars(kind) if name[0].isupper()}
    recorded_calls = {name for name in vars(Recorded) if name[0].isupper()}
    assert required - {"Free", "Abort"} <= recorded_calls and len(required) > 20


def test_peers_bytes_steps_and_ends_are_kept():
    def work(world):
        world = recorded(world)
        world.flight.step = 7
        if world.rank == 0:
            world.Send(np.zeros(5, np.float32), 1)
        else:
            request = world.Irecv(np.zeros(5, np.float32), 0)
            request.Wait()
        return world.flight.records()

    [send], [irecv, wait] = run_ranks(2, work)
    assert [send[field] for field in (NAME, PEER, BYTES, STEP, NUMBER)] == ["Send", 1, 20, 7, 0]
    assert (
        [record[NAME] for record in (irecv, wait)] == ["Irecv", "Wait(Irecv)"] and wait[PEER] == 0 and wait[BYTES] == 20
    )
    assert all(0 < record[flight.BEGUN] <= record[ENDED] <= time.monotonic() for record in (send, irecv, wait))


def test_the_last_operations_are_kept_and_all_are_counted():
    recorder = Flight()
    for k in range(ROOM + 5):
        with recorder.task(str(k)):
            assert recorder.last()[ENDED] == 0
    records = recorder.records()
    assert recorder.count == ROOM + 5 and [record[NAME] for record in records] == [str(k) for k in range(5, ROOM + 5)]
    assert all(record[ENDED] for record in records)


def test_seconds_between_ranks_are_those_of_all_operations_and_of_no_task():
    """The seconds are those of the records, all of which the ring still holds; a record counts when it has ended."""

    def work(world):
        recorder = Flight()
        comm = recorded(world, recorder)
        for k in range(5):
            if world.rank == 1:
                time.sleep(0.02)
            comm.Barrier()
            with recorder.task("a file"):
                time.sleep(0.01)
            request = comm.Iallreduce(np.ones(1), np.empty(1))
            request.Wait()
            durations = [
                record[ENDED] - record[flight.BEGUN] for record in recorder.records() if record[flight.GROUP] >= 0
            ]
            assert recorder.spent() == pytest.approx(sum(durations), rel=1e-9) and len(durations) == 3 * (k + 1)
        before = recorder.spent()
        with recorder.task("another"):
            assert recorder.spent() == before
        assert recorder.spent() == before
        return before

    waits, _ = run_ranks(2, work)
    assert waits >= 5 * 0.01


def test_one_rank_records_nothing():
    assert run_ranks(1, lambda world: recorded(world) is world) == [True]


def test_a_poll_counts_and_waits_as_before():
    def work(world):
        poll = Poll(Control(recorded(world)), seconds=0.001)
        flags = [poll(world.rank == 1 and k == 3)[0] for k in range(200)]
        poll.close()
        return flags

    first, second = run_ranks(2, work)
    assert first == second and True in first


@pytest.mark.parametrize(
    ("ranks", "text"),
    [((3,), "rank 3"), ((0, 1, 2), "ranks 0-2"), ((0, 1, 2, 5), "ranks 0-2 5"), ((2, 0), "ranks 2 0")],
)
def test_ranks_in_few_characters(ranks, text):
    assert spans(ranks) == text


@pytest.mark.parametrize("options", [("--resume", "auto"), ("--on-nan", "rollback"), ()])
def test_no_operation_of_a_training_is_inside_another(train, tmp_path, monkeypatch, options):
    """With nesting, a rank would seem to compute after the end of the inner operation."""
    begin, nested = Flight.begin, []

    def check(recorder, record):
        last = recorder.last()
        if last is not None and not last[ENDED]:
            nested.append((last[NAME], record[NAME]))
        return begin(recorder, record)

    monkeypatch.setattr(Flight, "begin", check)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=rng.random((300, 8), np.float32), y=rng.integers(0, 3, 300))
    plain = ("--method", "data_parallel", "--model", "mlp", "--widths", "8", "--loss", "nll", "--dataset",
             tmp_path / "mine.npz", "--checkpoint-every", "3")  # fmt: skip
    train(2, *plain, "--epochs", "2", out=tmp_path / "run")
    if options:
        out = tmp_path / ("run" if "auto" in options else "other")
        train(2, *(plain if "auto" not in options else ("--dataset", tmp_path / "mine.npz")), *options, "--epochs", "3",
              out=out)  # fmt: skip
    assert nested == []
