"""Minimum memory of each rank of the method `next`, computed without MPI and arrays of weights."""

from __future__ import annotations

import numpy as np

from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.layout import replicate
from psmpi.methods.next.rules import RULES, Choco, sent_components
from psmpi.methods.next.settings import Settings, owners
from psmpi.nn.network import Network
from psmpi.training.need import Need, added, vectors_needed, worker_needed


def next_needed(size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
    """See `Method.needed`. Receive buffers are left out, and so are samples, which are dealt later."""
    s, layout, itemsize = config.of(Settings), network.layout(), np.dtype(config.model.dtype).itemsize
    whole, roles, rule, held = layout.size, replicate(layout, size), RULES[s.rule], owners(s.agents, size)
    needs = []
    for rank, worker in enumerate(roles.workers):
        assert worker is not None
        need, count = worker_needed(config, network, dataset, worker, roles), held.count(rank)
        need.pop("samples", None)
        vectors = vectors_needed(config, layout, (count + 1) * whole, (count + 1) * whole, count * whole)
        sent = 2 * sent_components(whole, s.gossip_density) if rule is Choco else rule.sent * whole
        mixed = 0 if rule is Choco else rule.sent * whole
        extra = {"optimizer": rule.stored_vectors * count * whole, "weights": mixed * count, "buffers": sent * count}
        if s.linearization == "partial":
            # Derivatives of all scores of a step, and the smaller system of a block, in float64.
            steps = 1 if s.tracking == "full" else -(-dataset.train.n // config.data.batch_size)
            rows = network.classes * -(-dataset.train.n // (s.agents * steps))
            extra["buffers"] += 8 // itemsize * (rows * whole + min(rows, -(-whole // s.inner_blocks)) ** 2)
        needs.append(added(added(need, vectors), {name: n * itemsize for name, n in extra.items()}))
    return needs
