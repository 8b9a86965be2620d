"""Every transfer of vectors between ranks: its values, its adjoint, and its bytes."""

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


# Processes wait by spinning or by sleeping.
WORLDS = [
    *(("threads", ranks) for ranks in range(1, 6)),
    ("spin", 4),
    *(
        pytest.param(kind, ranks, marks=pytest.mark.slow)
        for ranks in range(1, 6)
        for kind in ("spin", "sleep")
        if (kind, ranks) != ("spin", 4)
    ),
]


@pytest.fixture(scope="module")
def trials():
    """trials(kind, ranks): the report of program_transfers.py, made once."""
    reports = {}

    def call(kind, ranks):
        if (kind, ranks) not in reports:
            # A run that ends with an error is not repeated.
            reports[kind, ranks] = {"tried": [], "wrong": [], "bytes": 0, "error": "ended"}
            if kind == "threads":
                reports[kind, ranks] = run_ranks(ranks, program_transfers.trials)[0]
            else:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("PSMPI_WAIT", kind)
                    status, out, err = launch(ranks, TESTS / "helpers" / "program_transfers.py")
                assert status == 0, err + out
                reports[kind, ranks] = json.loads(out)
        assert "error" not in reports[kind, ranks]
        return reports[kind, ranks]

    return call


def failures(report, *claims):
    return [what for claim, what in report["wrong"] if claim in claims]


@pytest.mark.parametrize(("kind", "ranks"), WORLDS)
def test_forward_selects_and_backward_is_its_adjoint(trials, kind, ranks):
    """Compare with indices of one vector of all ranks, and check <F x, y> = <x, F* y>."""
    report = trials(kind, ranks)
    assert set(report["tried"]) == ALL
    assert failures(report, "forward", "backward", "adjoint") == []


@pytest.mark.parametrize(("kind", "ranks"), WORLDS)
def test_what_is_counted_is_what_messages_say(trials, kind, ranks):
    report = trials(kind, ranks)
    assert failures(report, "bytes", "messages") == [] and (report["bytes"] > 0) == (ranks > 1)


@pytest.mark.parametrize(("kind", "ranks"), WORLDS)
def test_several_minibatches_are_in_flight_at_once(trials, kind, ranks):
    assert failures(trials(kind, ranks), "in flight") == []


def test_every_transfer_is_tried():
    def subclasses(kind):
        return {subclass for sub in kind.__subclasses__() for subclass in ({sub} | subclasses(sub))}

    import psmpi.comm.transfers as transfers

    assert len(subclasses(Transfer) - {transfers.Overlapping}) == len(ALL)


class Alone:
    rank, size = 0, 1


def test_totals_are_of_one_rank():
    assert totals([(0, 1, 5), (1, 0, 7), (0, 2, 9), (1, 2, 4)], 0) == (14, 7)


def test_plans_need_no_messages_and_few_collectives():
    full, dtype = Runs.union([(0, 10)]), np.dtype(np.float64)
    # This process is no rank of the group.
    group = Group(Alone(), [4, 2, 3], Counter())
    assert Sum(group, 6, dtype).messages(Step(), back=True) == [(4, 2, 64), (2, 3, 64), (3, 4, 64)]
    gather = Gather(group, full.split(3), full, dtype)
    assert [span.counts for span in gather.spans] == [[4, 3, 3]]
    assert sorted(gather.messages(Step()))[:2] == [(2, 3, 24), (2, 4, 24)]
    mixed = [Runs.union([(0, 2), (4, 6)]), Runs.union([(2, 4), (6, 8)]), Runs.union([(8, 10)])]
    assert [span.counts for span in Gather(group, mixed, full, dtype).spans] == [[2, 2, 0], [2, 2, 2]]


def test_plans_that_cannot_be_are_refused():
    group = Group(Alone(), [0], Counter())
    with pytest.raises(ValueError, match="in one shard"):
        Gather(group, [Runs.union([(0, 3)])], Runs.union([(0, 4)]), np.dtype(np.float64))
    with pytest.raises(ValueError, match="from a place to another"):
        Neighbours(group, [(0, 0)], 3, np.dtype(np.float64))
