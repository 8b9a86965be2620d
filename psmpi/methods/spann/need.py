"""Minimum memory of each rank of the method `spann`, computed without arrays of weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.methods.spann.local import largest, local_network
from psmpi.methods.spann.settings import Settings, plan_of
from psmpi.nn.network import Network
from psmpi.training.need import Need, added, derivatives_needed, passes_needed, vectors_needed


def spann_needed(size: int, network: Network, dataset: Dataset, config: Config) -> Sequence[Need]:
    """See `Method.needed`."""
    plan, layout = plan_of(size, network, config), network.layout()
    in_place = config.of(Settings).in_place
    owned = plan.ownership(layout)
    batches = network.evaluation_batches(dataset.test.n)
    most = max([config.data.batch_size, *(at.stop - at.start for at in batches)])
    needs: list[Need] = []
    for rank in range(size):
        own, weights = local_network(plan, rank), owned[rank].size
        exchanged = sum(sum(step.exchanged(rank)) for step in plan.steps if step.moves)
        rooms = np.dtype(config.model.dtype).itemsize * exchanged
        sample = dataset.train.dtype.itemsize * len(plan.inputs[rank])
        # Sparse samples may need almost no memory, so they do not count.
        samples = (sample + 8) * (dataset.train.n + dataset.test.n) if dataset.train.compressed is None else 0
        needs.append(
            added(
                vectors_needed(config, layout, weights, largest(own) if in_place else weights, weights),
                passes_needed(config, own, most),
                derivatives_needed(config, prod(own.layers[-1].out_shape) * most),
                {"samples": samples, "buffers": rooms * most},
            )
        )
    return needs
