"""Ranks that others wait for, found from hand-made records of operations."""

import itertools
from types import SimpleNamespace

import pytest

from psmpi.comm.watch.flight import Flight
from psmpi.comm.watch.stalls import (
    BUSY,
    COMPUTING,
    SILENT,
    UNWATCHED,
    WAITING,
    Operation,
    Rank,
    describe,
    diagnose,
    from_table,
    to_table,
)

ALL = ("world 1 ranks 0-2", (0, 1, 2))
PAIR = ("group 1 ranks 1-2", (1, 2))


def call(name, group=ALL, number=0, peer=-1, ended=0.0):
    return Operation(name, *group, number, peer, 8, 5, 100.0, ended)


def done(name, group=ALL, number=0, peer=-1):
    return call(name, group, number, peer, 101.0)


def rank(number, state, *operations, seconds=100.0, **fields):
    calls = {}
    for operation in operations:
        calls[operation.group] = max(calls.get(operation.group, 0), operation.number)
    return Rank(number, "host", state, seconds, len(operations), 5, "", "", calls, operations, **fields)


def named(*ranks, warn=60.0, **options):
    """The ranks that are waited for, or None."""
    finding = diagnose(ranks, warn, **options)
    return None if finding is None else [culprit_rank.rank for culprit_rank in finding.culprits]


@pytest.mark.parametrize("state", [SILENT, COMPUTING, BUSY])
@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_whoever_is_not_in_the_call_is_waited_for(state, culprit):
    last = call("reading the file x", ("", ())) if state == BUSY else done("Bcast", number=3)
    ranks = [
        rank(k, state, done("Bcast", number=3), last) if k == culprit else rank(k, WAITING, call("Allreduce", number=4))
        for k in range(3)
    ]
    finding = diagnose(ranks, 60.0)
    assert [culprit_rank.rank for culprit_rank in finding.culprits] == [culprit] and finding.seconds == 100.0
    text = "\n".join(describe(finding, 1e9))
    assert f"rank {culprit} on host" in text.splitlines()[0]
    waiting = [k for k in range(3) if k != culprit]
    assert f"ranks {waiting[0]}, {waiting[1]} wait in Allreduce, call 4 among ranks 0-2 (world), step 5" in text
    perhaps = "perhaps " if state == SILENT else ""
    assert f"missing: Allreduce, call 4 among ranks 0-2 (world): {perhaps}not made by rank {culprit}" in text
    assert {SILENT: "stopped", COMPUTING: "endless loop", BUSY: "reading the file x"}[state] in text


def test_a_chain_of_waits_ends_at_the_one_who_does_not_wait():
    """Rank 0 waits for a message of rank 1, which waits in a call for rank 2, which computes."""
    culprits = named(
        rank(0, WAITING, call("Recv", peer=1)),
        rank(1, WAITING, call("Wait(Iallreduce)", PAIR, 9)),
        rank(2, COMPUTING, done("Allreduce", PAIR, 8)),
    )
    assert culprits == [2]


def test_a_rank_that_passed_the_call_is_not_at_fault():
    """Rank 1 has left a reduction early, and waits in the next call, for the root that waits for rank 2."""
    culprits = named(
        rank(0, WAITING, call("Reduce", number=4, peer=0)),
        rank(1, WAITING, done("Reduce", number=4, peer=0), call("Bcast", number=5, peer=0)),
        rank(2, COMPUTING, done("Bcast", number=3, peer=0)),
    )
    assert culprits == [2]


def test_a_rank_that_goes_on_is_waited_for_rightly():
    """Others may wait long for a rank that evaluates, or that exchanges many messages with a third rank."""
    waiting = rank(0, WAITING, call("Recv", peer=1), seconds=500.0)
    for state in (COMPUTING, WAITING, BUSY):
        busy = rank(1, state, call("Recv", PAIR, peer=2), seconds=0.5)
        assert named(waiting, busy, rank(2, COMPUTING, done("Send", PAIR, peer=1), seconds=0.1)) is None


def test_all_computing_is_no_stall():
    assert named(*(rank(k, COMPUTING, done("Bcast", number=1), seconds=900.0) for k in range(3))) is None


def test_a_rank_is_not_suspected_before_twice_the_time_that_it_has_computed_before():
    ranks = [
        rank(0, WAITING, call("Barrier", number=1)),
        rank(1, COMPUTING),
        rank(2, WAITING, call("Barrier", number=1)),
    ]
    assert named(*ranks) == [1]
    assert named(*ranks, longest={1: 49.0}) == [1]
    assert named(*ranks, longest={1: 51.0}) is None


def test_silent_and_busy_ranks_are_named_though_nobody_waits():
    computing = [rank(k, COMPUTING, seconds=500.0) for k in range(2)]
    assert named(*computing, rank(2, SILENT)) == [2]
    assert named(*computing, rank(2, BUSY, call("writing metrics.jsonl", ("", ())))) == [2]
    assert named(*computing, rank(2, BUSY, call("writing metrics.jsonl", ("", ())), seconds=59.0)) is None


def test_ranks_in_different_calls_and_the_call_that_is_missing():
    ranks = [
        rank(0, WAITING, call("Bcast", ALL, 7, 0)),
        rank(1, WAITING, done("Bcast", ALL, 7, 0), call("Allreduce", PAIR, 3)),
        rank(2, WAITING, call("Barrier", ALL, 7)),
    ]
    finding = diagnose(ranks, 60.0)
    assert finding.culprits == []
    assert "Allreduce, call 3 among ranks 1-2 (group): not made by rank 2" in finding.missing
    assert any(text.startswith("rank 0 makes Bcast with root 0, call 7") and "rank 2 makes Barrier" in text
               for text in finding.missing)  # fmt: skip
    assert "ranks wait for each other" in describe(finding, 1e9)[0]


def test_messages_that_nobody_sends():
    finding = diagnose([rank(0, WAITING, call("Recv", peer=1)), rank(1, WAITING, call("Wait(Irecv)", peer=0))], 60.0)
    assert finding.culprits == []
    assert "rank 0 is in Recv from rank 1: the Send of rank 1 for it is missing" in finding.missing
    assert "rank 1 is in Wait(Irecv) from rank 0: the Send of rank 0 for it is missing" in finding.missing


def test_a_rank_that_was_never_heard_of_is_named_only_where_no_other_is():
    waiting = rank(0, WAITING, call("Barrier", number=1))
    assert named(waiting, rank(1, UNWATCHED), rank(2, COMPUTING)) == [2]
    assert named(waiting, rank(1, UNWATCHED), rank(2, WAITING, call("Barrier", number=1))) == [1]


def test_no_states_of_three_ranks_are_beyond_it():
    """diagnose ends for any states of the ranks, and names no rank that waits."""
    states = [
        lambda k: rank(k, WAITING, call("Barrier", number=2)),
        lambda k: rank(k, WAITING, call("Recv", peer=(k + 1) % 3)),
        lambda k: rank(k, WAITING, call("Recv", peer=k)),
        lambda k: rank(k, WAITING),
        lambda k: rank(k, SILENT),
        lambda k: rank(k, COMPUTING, done("Barrier", number=1)),
        lambda k: rank(k, UNWATCHED),
    ]
    for combination in itertools.product(states, repeat=3):
        ranks = [state(k) for k, state in enumerate(combination)]
        finding = diagnose(ranks, 60.0)
        assert all(candidate.state != WAITING for candidate in (finding.culprits if finding else ()))
        assert not any(candidate.state == SILENT for candidate in ranks) or finding.culprits
        assert finding is None or describe(finding, 1e9)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": "x"},
        {"state": "gone fishing"},
        {"groups": 3},
        {"groups": [["world", [[0, 10**12]], 1]]},
        {"groups": [["world", [[2, 1]], 1]]},
        {"groups": [["world", [[-1, 1]], 1]]},
        {"operations": [[1, 2]]},
        {"operations": [["a", 5, *[0] * 6]]},
    ],
)
def test_what_is_no_flight_is_refused(change):
    table = {"rank": 0, "host": "h", "state": "silent", "seconds": 0, "count": 0, "step": 0, "doing": "", "process": "",
             "groups": [], "operations": []}  # fmt: skip
    assert from_table(table).rank == 0
    with pytest.raises(ValueError):
        from_table({**table, **change})


def test_a_stall_of_many_ranks_takes_few_lines():
    ranks = tuple(range(1000))
    group = ("world 1 ranks 0-999", ranks)
    waiting = [rank(k, WAITING, call("Bcast", group, k // 10 + 1)) for k in range(900)]
    lines = describe(diagnose([*waiting, *(rank(k, COMPUTING) for k in range(900, 1000))], 60.0), 1e9)
    assert len(lines) < 20 and max(map(len, lines)) < 1200
    assert "and so do ranks 908-999" in lines[0] and "82 more calls that ranks wait in" in lines[-1]


def test_groups_of_many_ranks_are_kept_short():
    flight = Flight()
    flight.groups.append(SimpleNamespace(key="world 1", ranks=tuple(range(5000)), calls=3))
    table = to_table(flight, 0, "host")
    assert table["groups"] == [["world 1", [[0, 4999]], 3]] and from_table(table).calls == {"world 1": 3}
