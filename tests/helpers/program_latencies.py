"""Measure how long each rank takes for a collective that all ranks start at the same time.

Arguments: NAME:BYTES for each collective. Rank 0 prints JSON: for each argument the seconds on each rank.
"""

import json
import sys
import time

import numpy as np

from psmpi.comm.group import in_place
from psmpi.comm.watch.flight import bare
from psmpi.comm.world import start

REPEATS = 4


def collective_seconds(comm, name, nbytes):
    """Seconds on each rank from the common start to the end of a collective, the least of REPEATS."""
    x, gathered, is_root = np.zeros(nbytes // 8), np.zeros(nbytes // 8 * comm.size), comm.rank == 0
    calls = {
        "Bcast": lambda: comm.Bcast(x, 0),
        "Reduce": lambda: comm.Reduce(in_place() if is_root else x, x if is_root else None, root=0),
        "Allreduce": lambda: comm.Allreduce(in_place(), x),
        "Allgather": lambda: comm.Allgather(x, gathered),
        "Reduce_scatter": lambda: comm.Reduce_scatter(in_place(), gathered, [nbytes // 8] * comm.size),
        "Barrier": comm.Barrier,
    }
    seconds = []
    for _ in range(REPEATS):
        # All ranks are on one machine, with one clock.
        start_time = comm.bcast(time.time() + 0.2)
        time.sleep(max(0.0, start_time - time.time()))
        calls[name]()
        seconds.append(time.time() - start_time)
    return comm.allgather(min(seconds))


if __name__ == "__main__":
    comm = bare(start())
    seconds_by_argument = {}
    for word in sys.argv[1:]:
        name, nbytes = word.split(":")
        seconds_by_argument[word] = collective_seconds(comm, name, int(nbytes))
    if comm.rank == 0:
        print(json.dumps(seconds_by_argument))
