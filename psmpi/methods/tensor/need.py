"""Minimum memory of each rank of the method `tensor`, computed without arrays of weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.layout import even_edges
from psmpi.methods.tensor.local import local_network
from psmpi.methods.tensor.settings import Settings, plan_of
from psmpi.nn.network import Network
from psmpi.training.need import (
    Need,
    added,
    derivatives_needed,
    passes_needed,
    samples_needed,
    vectors_needed,
)


def tensor_needed(size: int, network: Network, dataset: Dataset, config: Config) -> Sequence[Need]:
    """See `Method.needed`."""
    plan, keeps = plan_of(size, network, config), config.of(Settings).saved == "gathered"
    needs: list[Need] = []
    batches = network.evaluation_batches(dataset.test.n)
    most = max([config.data.batch_size, *(at.stop - at.start for at in batches)])
    for rank in range(size):
        own = local_network(plan, rank, keeps)
        weights = sum(prod(shape) for shape in plan.shapes(rank).values())
        place, along = plan.grid.place(rank)["i"], plan.grid.size("i")
        edges = even_edges(most, along)
        batch = edges[place + 1] - edges[place]
        scores = prod(own.layers[-1].out_shape) * batch
        needs.append(
            added(
                vectors_needed(config, network.layout(), weights, weights, weights),
                passes_needed(config, own, batch),
                derivatives_needed(config, scores),
                samples_needed(dataset, dataset.train.n, dataset.test.n, 0),
            )
        )
    return needs
