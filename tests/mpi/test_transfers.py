"""Every way of moving vectors between ranks: what it brings, that its backward is its adjoint, and what it sends."""

import json

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from helpers import program_transfers
from helpers.paths import TESTS
from helpers.processes import launch

from psmpi.comm.group import Counter, Group
from psmpi.comm.transfers import Gather, Neighbours, Step, Sum, Transfer, totals
from psmpi.layout import Runs
from psmpi.testing import run_ranks

ALL = {"spread", "deal", "sum", "exchange", "rows", "slices", "boundary", "gather", "neighbours", "halo", "subnets"}


# Processes wait in either way.
WORLDS = [
    *(("threads", ranks) for ranks in range(1, 6)),
    ("spin", 4),
    ("sleep", 4),
    *(pytest.param(kind, ranks, marks=pytest.mark.slow) for ranks in (1, 2, 3, 5) for kind in ("spin", "sleep")),
]


@pytest.fixture(scope="module")
def trials():
    """What went wrong on so many ranks, by claim."""
    known = {}

    def call(kind, ranks):
        if (kind, ranks) not in known:
            # One that ends with an error is not tried again.
            known[kind, ranks] = {"tried": [], "wrong": [], "bytes": 0, "error": "ended"}
            if kind == "threads":
                known[kind, ranks] = run_ranks(ranks, program_transfers.trials)[0]
            else:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("PSMPI_WAIT", kind)
                    status, out, err = launch(ranks, TESTS / "helpers" / "program_transfers.py")
                assert status == 0, err + out
                known[kind, ranks] = json.loads(out)
        assert "error" not in known[kind, ranks]
        return known[kind, ranks]

    return call


def wrong(found, *claims):
    return [what for claim, what in found["wrong"] if claim in claims]


@pytest.mark.parametrize(("kind", "ranks"), WORLDS)
def test_forward_selects_and_backward_is_its_adjoint(trials, kind, ranks):
    """Against indices of one vector of all ranks, and <F x, y> = <x, F* y>."""
    found = trials(kind, ranks)
    assert set(found["tried"]) == ALL
    assert wrong(found, "forward", "backward", "adjoint") == []


@pytest.mark.parametrize(("kind", "ranks"), WORLDS)
def test_what_is_counted_is_what_messages_say(trials, kind, ranks):
    found = trials(kind, ranks)
    assert wrong(found, "bytes", "messages") == [] and (found["bytes"] > 0) == (ranks > 1)


@pytest.mark.parametrize(("kind", "ranks"), WORLDS)
def test_several_minibatches_are_in_flight_at_once(trials, kind, ranks):
    assert wrong(trials(kind, ranks), "in flight") == []


def test_every_transfer_is_tried():
    def below(kind):
        return {one for sub in kind.__subclasses__() for one in ({sub} | below(sub))}

    import psmpi.comm.transfers as transfers

    assert len(below(Transfer) - {transfers.Overlapping}) == len(ALL)


class Alone:
    rank, size = 0, 1


def test_totals_are_of_one_rank():
    assert totals([(0, 1, 5), (1, 0, 7), (0, 2, 9), (1, 2, 4)], 0) == (14, 7)


def test_plans_need_no_messages_and_few_collectives():
    whole, dtype = Runs.union([(0, 10)]), np.dtype(np.float64)
    # As a rank that takes no part sees it.
    group = Group(Alone(), [4, 2, 3], Counter())
    assert Sum(group, 6, dtype).messages(Step(), back=True) == [(4, 2, 64), (2, 3, 64), (3, 4, 64)]
    gather = Gather(group, whole.split(3), whole, dtype)
    assert [span.counts for span in gather.spans] == [[4, 3, 3]]
    assert sorted(gather.messages(Step()))[:2] == [(2, 3, 24), (2, 4, 24)]
    mixed = [Runs.union([(0, 2), (4, 6)]), Runs.union([(2, 4), (6, 8)]), Runs.union([(8, 10)])]
    assert [span.counts for span in Gather(group, mixed, whole, dtype).spans] == [[2, 2, 0], [2, 2, 2]]


def test_plans_that_cannot_be_are_refused():
    group = Group(Alone(), [0], Counter())
    with pytest.raises(ValueError, match="in one shard"):
        Gather(group, [Runs.union([(0, 3)])], Runs.union([(0, 4)]), np.dtype(np.float64))
    with pytest.raises(ValueError, match="from a place to another"):
        Neighbours(group, [(0, 0)], 3, np.dtype(np.float64))
