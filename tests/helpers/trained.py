"""Train some steps on ranks that are threads, and compare weights, losses and scores."""

import numpy as np

from psmpi.backend import make_backend
from psmpi.data import Batch
from psmpi.registry import find_method
from psmpi.testing import run_ranks
from psmpi.testing.case import Case
from psmpi.training.context import Context
from psmpi.training.loop import plan_steps


def train_steps(ranks, options, steps=20, method="data_parallel"):
    """Train `steps` steps on `ranks` ranks; return the flat vector, the losses of the steps, and the test scores."""
    network, dataset, config = Case(method, ".", options).problem()
    batches, _, _ = plan_steps(dataset, config)
    method_class = find_method(method)
    method_class.check(ranks, network, dataset, config)

    def work(world):
        trained = method_class(Context(world, network, dataset, config, make_backend("auto")))
        losses = []
        for step in range(steps):
            epoch, at = divmod(step, batches.steps_per_epoch)
            before = trained.loss_sum
            trained.step(Batch(batches.ids(epoch, at)), config.optimization.lr)
            losses.append(trained.loss_sum - before)
        trained.collect()
        shard = trained.shards[world.rank]
        return shard, trained.state.vectors["weights"].copy(), np.array(losses), trained.test()

    layout = network.layout()
    weights = np.full(layout.size, np.nan)
    results = run_ranks(ranks, work, timeout=120)
    for shard, values, *_ in results:
        for (a, b), at in zip(shard.intervals, shard.offsets.tolist(), strict=False):
            values_so_far, values_here = weights[a:b], values[at : at + b - a]
            known = ~np.isnan(values_so_far)
            assert np.allclose(values_so_far[known], values_here[known])
            weights[a:b] = values_here
    assert not np.isnan(weights).any()
    assert all(one[3] == results[0][3] for one in results)
    return weights, sum(one[2] for one in results), results[0][3]


def same(actual, expected, tolerance=1e-10):
    """Raise AssertionError unless two results of `train_steps` are equal up to rounding."""
    for value, reference in zip(actual[:2], expected[:2], strict=True):
        assert np.linalg.norm(value - reference) <= tolerance * np.linalg.norm(reference)
    assert actual[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        assert abs(actual[2][name] - value) <= 1e-6 * max(1.0, abs(value))
