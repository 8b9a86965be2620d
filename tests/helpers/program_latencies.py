"""Measure when each rank ends a collective that all ranks begin at the same time.

Arguments: name:bytes of each collective. Rank 0 prints JSON: for each argument the seconds on each rank.
"""

import json
import sys
import time

import numpy as np

from psmpi.comm.group import in_place
from psmpi.comm.watch.flight import bare
from psmpi.comm.world import start

REPEATS = 4


def ended(comm, name, nbytes):
    """Seconds from the common begin to the end of a collective on each rank, the least of REPEATS."""
    x, every, first = np.zeros(nbytes // 8), np.zeros(nbytes // 8 * comm.size), comm.rank == 0
    calls = {
        "Bcast": lambda: comm.Bcast(x, 0),
        "Reduce": lambda: comm.Reduce(in_place() if first else x, x if first else None, root=0),
        "Allreduce": lambda: comm.Allreduce(in_place(), x),
        "Allgather": lambda: comm.Allgather(x, every),
        "Reduce_scatter": lambda: comm.Reduce_scatter(in_place(), every, [nbytes // 8] * comm.size),
        "Barrier": comm.Barrier,
    }
    seconds = []
    for _ in range(REPEATS):
        # All ranks are on one machine, with one clock.
        begin = comm.bcast(time.time() + 0.2)
        time.sleep(max(0.0, begin - time.time()))
        calls[name]()
        seconds.append(time.time() - begin)
    return comm.allgather(min(seconds))


if __name__ == "__main__":
    comm = bare(start())
    found = {}
    for word in sys.argv[1:]:
        name, nbytes = word.split(":")
        found[word] = ended(comm, name, int(nbytes))
    if comm.rank == 0:
        print(json.dumps(found))
