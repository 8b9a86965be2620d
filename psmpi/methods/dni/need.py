"""Minimum memory of each rank of the method `dni`, computed without MPI and arrays of weights."""

from __future__ import annotations

from math import prod

import numpy as np

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.methods.dni.settings import Settings, count_blocks, find_cuts, owner_of
from psmpi.nn.cut import split_layers
from psmpi.nn.network import Network
from psmpi.training.need import Need, added, derivatives_needed, passes_needed, samples_needed, vectors_needed


def dni_needed(size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
    """See `Method.needed`."""
    s, layout, dtype, batch = (
        config.of(Settings),
        network.layout(),
        np.dtype(config.model.dtype),
        config.data.batch_size,
    )
    blocks = count_blocks(size, network, s.layer_blocks)
    stages = split_layers(network, blocks)
    cuts = find_cuts(network, stages, dataset.outputs, s)
    tests = max(at.stop - at.start for at in network.evaluation_batches(dataset.test.n))
    all_needs = []
    for rank in range(size):
        held = [k for k in range(blocks) if owner_of(k, blocks, size) == rank]
        first, last = held[0] == 0, held[-1] == blocks - 1
        shard = sum(network.runs(layout, *stages[k]).size for k in held)
        auxiliary = sum(
            one.layout().size for cut in cuts for name, one in cut.networks.items() if cut.side(name) in held
        )
        # Buffers of the outputs that go up, and of the gradients that go down.
        lines = sum(cut.units for cut in cuts if cut.number in held) * (2 if s.returns else 1)
        needs = [
            vectors_needed(config, layout, shard + auxiliary, shard + auxiliary, shard + auxiliary),
            {"buffers": dtype.itemsize * lines * s.ahead * batch},
            derivatives_needed(config, batch * prod(network.layers[-1].out_shape) * last),
            samples_needed(dataset, dataset.train.n * (first or s.synthetic_inputs), dataset.test.n * first, batch),
        ]
        needs += [passes_needed(config, network, max(batch, tests), layers=stages[k]) for k in held]
        all_needs.append(added(*needs))
    return all_needs
