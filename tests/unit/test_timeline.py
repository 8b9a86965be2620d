"""Times of ranks in a step, from operations at known times and from operations of ranks."""

import json

import numpy as np
import pytest

from psmpi.bench.step import Tracing, _moved, _track
from psmpi.bench.timeline import KINDS, Operation, Track, chrome_trace, shares, spans_of
from psmpi.comm.watch.flight import recorded
from psmpi.testing import run_ranks

ALL = (0, 1, 2)


def make_tracks(*tracks, optimizing=((), (), ()), steps=(0.0, 10.0)):
    """Tracks of ranks 0 to 2, whose operations are (name, begun, ended, options)."""
    result = []
    for rank, (operations, times) in enumerate(zip(tracks, optimizing, strict=True)):
        calls = [
            Operation(name, "world", ALL, options.get("number", 0), options.get("peer", -1), 8, begun, ended,
                      options.get("since", -1))
            for name, begun, ended, options in operations
        ]  # fmt: skip
        result.append(Track(rank, calls, list(times), [steps]))
    return result


def times(tracks, kind):
    return [steps[0][kind] for steps in shares(tracks)]


ONE = {"number": 1}


@pytest.mark.parametrize("name", ["Allreduce", "Barrier", "Reduce_scatter", "Allgatherv", "Alltoallv"])
def test_a_collective_of_all_waits_for_the_last(name):
    tracks = make_tracks([(name, 1, 6, ONE)], [(name, 4, 6, ONE)], [(name, 2, 7, ONE)])
    assert times(tracks, "wait") == [3, 0, 2] and times(tracks, "transfer") == [2, 2, 3]
    assert times(tracks, "compute") == [5, 8, 5]


@pytest.mark.parametrize("name", ["Bcast", "Scatterv"])
def test_what_comes_from_a_root_waits_for_the_root(name):
    root = {"number": 1, "peer": 1}
    tracks = make_tracks([(name, 1, 6, root)], [(name, 4, 5, root)], [(name, 9, 9.5, root)])
    assert times(tracks, "wait") == [3, 0, 0] and times(tracks, "transfer") == [2, 1, 0.5]


@pytest.mark.parametrize("name", ["Reduce", "Gather", "Gatherv"])
def test_what_goes_to_a_root_has_the_root_wait_for_the_others(name):
    root = {"number": 1, "peer": 1}
    tracks = make_tracks([(name, 1, 2, root)], [(name, 2, 9, root)], [(name, 8, 8.5, root)])
    assert times(tracks, "wait") == [0, 6, 0] and times(tracks, "transfer") == [1, 1, 0.5]


def test_messages_wait_for_their_sender_and_large_ones_for_their_receiver():
    """Rank 0 sends two messages to rank 1; the one that is begun at once waits in its Wait."""
    tracks = make_tracks(
        [("Isend", 1, 1, {"peer": 1}), ("Send", 6, 9, {"peer": 1})],
        [("Irecv", 0, 0, {"peer": 0}), ("Wait(Irecv)", 2, 3, {"peer": 0, "since": 0}), ("Recv", 5, 9, {"peer": 0})],
        [],
    )
    assert times(tracks, "wait") == [0, 1, 0] and times(tracks, "transfer") == [3, 4, 0]
    late = make_tracks([("Send", 1, 9, {"peer": 2})], [], [("Recv", 7, 9, {"peer": 0})])
    assert times(late, "wait") == [6, 0, 0]
    peers = {"peer": 2}, {"peer": 0}, {"peer": 1}
    ring = make_tracks(*([("Sendrecv", begun, 6, peer)] for begun, peer in zip((1, 2, 4), peers, strict=True)))
    assert times(ring, "wait") == [3, 0, 0]


def test_a_sum_that_was_begun_waits_from_when_its_end_is_waited_for():
    begun, wait = {"number": 1}, {"number": 1, "since": 0}
    tracks = make_tracks(
        [("Iallreduce", 1, 1, begun), ("Wait(Iallreduce)", 2, 8, wait)],
        [("Iallreduce", 7, 7, begun), ("Wait(Iallreduce)", 7.5, 8, wait)],
        [("Iallreduce", 0, 0, begun), ("Wait(Iallreduce)", 9, 9.5, wait)],
    )
    assert times(tracks, "wait") == [5, 0, 0] and times(tracks, "transfer") == [1, 0.5, 0.5]


def test_an_optimizer_is_no_computing_and_its_sums_are_no_optimizer():
    tracks = make_tracks([("Allreduce", 4, 5, ONE)], [], [], optimizing=([(3.0, 7.0)], [(0.0, 1.0)], []))
    assert times(tracks, "optimizer") == [3, 1, 0] and times(tracks, "compute") == [6, 9, 10]
    for track, steps in zip(tracks, shares(tracks), strict=True):
        assert sum(steps[0][kind] for kind in KINDS) == steps[0]["step"] == 10
        spans = list(spans_of(track, 0, _meetings(tracks)))
        assert [a.ended for a in spans[:-1]] == [b.begun for b in spans[1:]]


def _meetings(tracks):
    from psmpi.bench.timeline import Meetings

    return Meetings(tracks)


def test_a_trace_has_each_rank_s_steps_and_operations():
    tracks = make_tracks([("Bcast", 1, 6, {"number": 1, "peer": 1})], [("Bcast", 4, 5, {"number": 1, "peer": 1})], [])
    events = json.loads(json.dumps(chrome_trace(tracks, {0: "rank 0 master"})))["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["rank 0 master", "rank 1", "rank 2"]
    (first, second) = (e for e in events if e["name"] == "Bcast")
    assert (first["pid"], first["ts"], first["dur"]) == (0, 1e6, 5e6)
    assert first["args"] == {"bytes": 8, "group": "world", "wait_us": 3e6} and second["args"]["wait_us"] == 0
    assert sum(e["name"] == "step 0" for e in events) == 3


def test_operations_of_ranks_meet_each_other():
    """Each waiting operation is matched with those of the other ranks, and each Wait with its begin."""

    def work(world):
        flight = Tracing()
        comm = recorded(world, flight)
        group = comm.Create_group(comm.group.Incl([0, 1, 2]))
        values, received = np.ones(3), np.zeros(3)
        group.Bcast(values, 1)
        request = comm.Irecv(received, (comm.rank - 1) % 3)
        comm.Isend(values, (comm.rank + 1) % 3).Wait()
        request.Wait()
        group.Iallreduce(values, received).Wait()
        comm.Allreduce(values, received)
        track = Track(comm.rank, flight.operations(0), [], [(0.0, 1e12)])
        return _track(json.loads(json.dumps(_moved(track, 0.0))))

    tracks = run_ranks(3, work)
    meetings = _meetings(tracks)
    for track in tracks:
        waits = [operation for operation in track.operations if operation.name.startswith("Wait")]
        assert [track.operations[operation.since].name for operation in waits] == ["Isend", "Irecv", "Iallreduce"]
        for place, operation in enumerate(track.operations):
            known = meetings.ready(track, place) > 0
            needs = operation.name in ("Wait(Isend)", "Wait(Irecv)", "Wait(Iallreduce)", "Allreduce", "Create_group")
            assert known == (needs or (operation.name == "Bcast" and track.rank != 1)), operation
