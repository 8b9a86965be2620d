"""The memory that ranks of the method `wavefront` need at least; made without MPI and arrays of weights."""

from __future__ import annotations

from math import prod

import numpy as np

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.methods.wavefront.settings import Settings, deal
from psmpi.nn.network import Network
from psmpi.nn.sequences import chunks
from psmpi.training.need import Need, added, derivatives_needed, passes_needed, samples_needed, vectors_needed


def wavefront_needed(size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
    """See `Method.needed`."""
    s, layout, itemsize = config.of(Settings), network.layout(), np.dtype(config.model.dtype).itemsize
    dealt = deal(network, size, s.skew, s.chunk_steps)
    count, cut = len(chunks(network.in_shape[1], dealt.steps)), network.with_steps(dealt.steps)
    tests = max(at.stop - at.start for at in network.evaluation_batches(dataset.test.n))
    batch, found = max(config.data.batch_size, tests), []
    for rank, lanes in enumerate(dealt.ranks):
        first, last = rank == 0, rank == size - 1
        shard = network.runs(layout, *dealt.layers(rank)).size
        needs = [
            vectors_needed(config, layout, shard, shard, shard),
            samples_needed(dataset, dataset.train.n * first, dataset.test.n * first, config.data.batch_size),
        ]
        for layers in lanes:
            # Each chunk has its own arrays, all of them one workspace.
            one = passes_needed(config, cut, batch, layers=layers)
            needs += [{"activations": one["activations"] * count, "buffers": one["buffers"]}]
        if last and dealt.head is not None:
            needs.append(passes_needed(config, cut, batch, layers=dealt.head))
            needs.append(derivatives_needed(config, batch * network.classes))
        elif last:
            scores = prod(network.layers[-1].out_shape)
            needs.append(derivatives_needed(config, batch * network.classes * dealt.steps))
            needs.append({"buffers": itemsize * batch * scores})
        found.append(added(*needs))
    return found
