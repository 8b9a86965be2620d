"""Sums over ranks by psmpi's own algorithms: how far they are from the sum, how many differ, what is sent."""

import json
import sys

import numpy as np

from psmpi.comm.allreduce import ALGORITHMS
from psmpi.comm.group import Counter, Group
from psmpi.comm.watch.flight import bare
from psmpi.comm.world import start


def sums(world, names):
    """A row for each algorithm and size, on rank 0."""
    found = []
    for name in names:
        for size in (1, 3, 8, 1000, 1680):
            counter = Counter()
            group = Group(world, range(world.size), counter)
            mine = np.random.default_rng([size, world.rank]).normal(size=size)
            expected = sum(np.random.default_rng([size, rank]).normal(size=size) for rank in range(world.size))
            ALGORITHMS[name](group, mine)
            apart = float(abs(mine - expected).max())
            bits = bare(world).gather(mine.tobytes())
            far, sent = bare(world).gather(apart), bare(world).gather(counter.sent // 8)
            if world.rank == 0:
                found.append([name, size, max(far), len(set(bits)), sent])
    return found


if __name__ == "__main__":
    world = start()
    found = sums(world, sys.argv[1:])
    if world.rank == 0:
        print(json.dumps(found))
