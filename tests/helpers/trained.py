"""Some steps of a method in a world of threads: the weights of all ranks together, and their losses."""

import numpy as np

from psmpi.backend import make_backend
from psmpi.data import Batch
from psmpi.registry import find_method
from psmpi.testing import run_ranks
from psmpi.testing.case import Case
from psmpi.training.context import Context
from psmpi.training.loop import plan_steps


def train_steps(ranks, options, steps=20, method="data_parallel"):
    """The flat vector after some steps on so many ranks, the losses of the steps, and the scores of the test."""
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
            known, values_here = whole[a:b], values[at : at + b - a]
            there = ~np.isnan(known)
            assert np.allclose(known[there], values_here[there])
            whole[a:b] = values_here
    assert not np.isnan(whole).any()
    assert all(one[3] == found[0][3] for one in found)
    return whole, sum(one[2] for one in found), found[0][3]


def same(found, expected, tolerance=1e-10):
    """AssertionError unless two of what `train_steps` returns are the same but for rounding."""
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
    assert found[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        assert abs(found[2][name] - value) <= 1e-6 * max(1.0, abs(value))
