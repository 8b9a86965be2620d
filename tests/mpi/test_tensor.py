"""Tensor parallelism: every grid trains as one process does, moves what its formulas say, and keeps what it should."""

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from psmpi.backend import make_backend
from psmpi.data import Batch
from psmpi.methods.tensor.grid import all_grids
from psmpi.registry import find_method
from psmpi.testing import run_ranks
from psmpi.testing.case import Case
from psmpi.training.context import Context
from psmpi.training.loop import plan_steps

MLP = (
    "--model",
    "mlp",
    "--widths",
    "28",
    "24",
    "--activation",
    "tanh",
    "--loss",
    "nll",
    "--optimizer",
    "sgd",
    "--lr",
    "0.1",
)
# Of 1, 2, 4, 6, 8 and 12 ranks.
SIZES = (1, 2, 4, 6, 8, 12)


def problem(*options):
    return Case("tensor", ".", options).problem()


def train(ranks, options, steps=20, method="tensor"):
    """The weights by name after some steps on so many ranks, and of each rank what it sent and received."""
    network, dataset, config = Case(method, ".", options).problem()
    batches, _, _ = plan_steps(dataset, config)
    kind = find_method(method)
    kind.check(ranks, network, dataset, config)

    def work(world):
        made = kind(Context(world, network, dataset, config, make_backend("auto")))
        losses = []
        for step in range(steps):
            epoch, at = divmod(step, batches.steps_per_epoch)
            before = made.loss_sum
            made.step(Batch(batches.ids(epoch, at)), config.optimization.lr)
            losses.append(made.loss_sum - before)
        made.collect()
        shard = made.shards[world.rank]
        return shard, made.state.vectors["weights"].copy(), np.array(losses), made.test()

    layout = network.layout()
    whole = np.full(layout.size, np.nan)
    found = run_ranks(ranks, work, timeout=120)
    for shard, values, *_ in found:
        for (a, b), at in zip(shard.intervals, shard.offsets.tolist(), strict=False):
            known = whole[a:b]
            assert np.isnan(known).all() or np.allclose(
                known[~np.isnan(known)], values[at : at + b - a][~np.isnan(known)]
            )
            whole[a:b] = values[at : at + b - a]
    assert not np.isnan(whole).any()
    losses = sum(one[2] for one in found)
    assert all(one[3] == found[0][3] for one in found)
    return whole, losses, found[0][3]


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory):
    """Random samples of thirteen classes, 122 of them for training."""
    path, rng = tmp_path_factory.mktemp("data") / "thirteen.npz", np.random.default_rng(3)
    np.savez(path, x=rng.normal(size=(152, 21)).astype(np.float32), y=np.arange(152) % 13)
    return str(path)


@pytest.fixture(scope="module")
def serial():
    """What data parallelism trains on one rank, by options."""
    known = {}

    def call(options):
        if options not in known:
            known[options] = train(1, options, method="data_parallel")
        return known[options]

    return call


def same(found, expected, tolerance=1e-10):
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
    assert found[2] == pytest.approx(expected[2])


GRIDS = [",".join(map(str, grid.sizes)) for size in SIZES for grid in all_grids(size)]
KINDS = [(1, "1d"), (2, "1d"), (3, "1d"), (4, "1d"), (4, "1d-sharded"), (1, "2d"), (4, "2d"), (9, "2d"), (8, "3d")]


@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_trains_as_one_process(serial, thirteen, grid):
    """Units, samples and rows that no axis divides; the last minibatch has two samples."""
    ranks = int(np.prod(list(map(int, grid.split(",")))))
    options = (*MLP, "--dataset", thirteen, "--batch-size", "30")
    same(train(ranks, (*options, "--grid", grid)), serial(options))


@pytest.mark.parametrize(("ranks", "grid"), KINDS)
@pytest.mark.parametrize("saved", ["shards", "gathered"])
def test_named_grids_train_as_one_process(serial, ranks, grid, saved):
    options = (*MLP, "--batch-size", "36", "--grid", grid, "--saved", saved)
    same(train(ranks, options), serial((*MLP, "--batch-size", "36")))
