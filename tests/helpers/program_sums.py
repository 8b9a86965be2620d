"""Test psmpi's own all-reduce algorithms: error, number of different results on the ranks, and elements sent."""

import json
import sys

import numpy as np

from psmpi.comm.allreduce import ALGORITHMS
from psmpi.comm.group import Counter, Group
from psmpi.comm.watch.flight import bare
from psmpi.comm.world import start


def sums(world, names):
    """For each algorithm and size a row [name, size, largest error, different results, elements sent], on rank 0."""
    rows = []
    for name in names:
        for size in (1, 3, 8, 1000, 1680):
            counter = Counter()
            group = Group(world, range(world.size), counter)
            vector = np.random.default_rng([size, world.rank]).normal(size=size)
            expected = sum(np.random.default_rng([size, rank]).normal(size=size) for rank in range(world.size))
            ALGORITHMS[name](group, vector)
            error = float(abs(vector - expected).max())
            bits = bare(world).gather(vector.tobytes())
            errors, sent = bare(world).gather(error), bare(world).gather(counter.sent // 8)
            if world.rank == 0:
                rows.append([name, size, max(errors), len(set(bits)), sent])
    return rows


if __name__ == "__main__":
    world = start()
    rows_of_sums = sums(world, sys.argv[1:])
    if world.rank == 0:
        print(json.dumps(rows_of_sums))
