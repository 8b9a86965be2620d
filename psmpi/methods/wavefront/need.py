"""Minimum memory of each rank of the method `wavefront`, computed without MPI and arrays of weights."""

from __future__ import annotations

from math import prod

import numpy as np

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.methods.wavefront.schedule import RING
from psmpi.methods.wavefront.settings import Settings, deal
from psmpi.nn.layers.chain import plan_buffers
from psmpi.nn.network import Network
from psmpi.nn.sequences import chunks, count_states
from psmpi.training.need import Need, added, derivatives_needed, passes_needed, samples_needed, vectors_needed


def _kept(network: Network, cut: Network, layers: tuple[int, int], batch: int) -> int:
    """Return the numbers besides outputs that layers keep for all steps, less those for one chunk."""
    numbers = []
    for one in (network, cut):
        stages = one.stages(range(one.classes), layers=layers)
        spots = plan_buffers(stages)[0]
        numbers.append(
            sum(s.layer.buffer_numbers(s, batch, spot.writable, False) for s, spot in zip(stages, spots, strict=True))
        )
    return numbers[0] - numbers[1]


def wavefront_needed(size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
    """See `Method.needed`."""
    s, layout, itemsize = config.of(Settings), network.layout(), np.dtype(config.model.dtype).itemsize
    dealt = deal(network, size, s.skew, s.chunk_steps)
    count, cut = len(chunks(network.in_shape[1], dealt.steps)), network.with_steps(dealt.steps)
    tests = max(at.stop - at.start for at in network.evaluation_batches(dataset.test.n))
    batch, all_needs = max(config.data.batch_size, tests), []
    for rank, lanes in enumerate(dealt.ranks):
        first, last = rank == 0, rank == size - 1
        shard = network.runs(layout, *dealt.layers(rank)).size
        needs = [
            vectors_needed(config, layout, shard, shard, shard),
            samples_needed(dataset, dataset.train.n * first, dataset.test.n * first, config.data.batch_size),
        ]
        for lane, layers in enumerate(lanes):
            # Each chunk has its own arrays; all chunks share one workspace.
            one = passes_needed(config, cut, batch, layers=layers)
            begun = (count - 1) * count_states(network.layers[slice(*layers)]) * batch
            kept = itemsize * (_kept(network, cut, layers, batch) + begun)
            # A lane's inputs are the outputs of the lane below, which are counted there.
            given = itemsize * batch * prod(cut.layers[layers[0]].in_shape) * (lane > 0)
            needs += [{"activations": (one["activations"] - given) * count, "buffers": one["buffers"] + kept}]
        # Gradients of chunks in flight, also between lanes, and one chunk's weight gradient before it is added.
        steps, ring = dealt.steps, min(RING, count)
        between = [network.layers[a].in_shape[0] for a, _ in lanes]
        passed = RING * between[0] * (not first) + 2 * sum(between[1:])
        passed += ring * network.layers[lanes[-1][1] - 1].out_shape[0] * (not last)
        extra = shard if count > 1 else 0
        needs.append({"buffers": itemsize * (passed * steps * batch + extra)})
        if first:
            needs.append({"activations": itemsize * batch * prod(network.in_shape)})
        if last and dealt.head is not None:
            needs.append(passes_needed(config, cut, batch, layers=dealt.head))
            needs.append(derivatives_needed(config, batch * network.classes))
        elif last:
            scores = prod(network.layers[-1].out_shape)
            needs.append(derivatives_needed(config, batch * network.classes * dealt.steps))
            needs.append({"buffers": itemsize * batch * scores})
        all_needs.append(added(*needs))
    return all_needs
