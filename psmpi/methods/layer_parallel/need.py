"""Minimum memory of each rank of the method `layer_parallel`, computed without MPI and arrays of weights."""

from __future__ import annotations

from math import prod

import numpy as np

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.methods.layer_parallel.settings import Settings, plan_of
from psmpi.nn.layers.chain import output_numbers
from psmpi.nn.network import Network
from psmpi.training.need import Need, added, derivatives_needed, passes_needed, samples_needed, vectors_needed


def layer_parallel_needed(size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
    """See `Method.needed`."""
    s, layout, itemsize = config.of(Settings), network.layout(), np.dtype(config.model.dtype).itemsize
    plan = plan_of(size, network, s)
    share = -(-min(config.data.batch_size, dataset.train.n) // plan.rows)
    tests = network.evaluation_batches(dataset.test.n)
    units = prod(network.layers[plan.first].in_shape)
    # Outputs inside the branch of one layer of the march; the layers are much alike.
    inside = output_numbers(network.stages(range(network.classes), layers=(plan.first, plan.first + 1))[0].inner)
    all_needs = []
    for rank in range(size):
        position, row_tests = plan.position(rank), tests[plan.row(rank) :: plan.rows]
        most, tested = max(share, *(at.stop - at.start for at in tests)), sum(at.stop - at.start for at in row_tests)
        stages, shard = plan.stages(position), plan.runs(layout, position).size
        first, last = position == 0, position == plan.ranks - 1
        needs = [
            vectors_needed(config, layout, shard, shard, shard),
            {"activations": itemsize * (2 * (plan.steps + 1) * units * share + inside * most)},
            derivatives_needed(config, share * network.classes * last),
            samples_needed(dataset, dataset.train.n * first, tested * first, share),
        ]
        needs += [
            passes_needed(config, network, most, layers=stage) for name, stage in stages.items() if name != "march"
        ]
        all_needs.append(added(*needs))
    return all_needs
