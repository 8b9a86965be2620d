"""Time training steps of the method `tensor` with and without prefetching; a program under mpirun.

Its options are those of psmpi.train and of `tiled`. Rank 0 prints JSON: milliseconds of each step, and the largest
numbers of bytes that a rank receives in a step, keeps, and holds.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from psmpi.config import Config

WARM = 2


def tiled(config: Config, rounds: int = 5) -> int:
    """Time training steps, alternately with and without prefetching.

    Args:
        rounds: Steps of each that are timed.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.bench.training import prepare
    from psmpi.comm.control import Control
    from psmpi.comm.patience import settle
    from psmpi.comm.world import cores, start
    from psmpi.data import Batch
    from psmpi.methods.tensor.settings import Settings
    from psmpi.output import tell
    from psmpi.training.context import Context

    world = start()
    control = Control(world)
    kind, network, dataset, batches, rate, threads = prepare(config, world)
    with threadpool_limits(threads), np.errstate(all="ignore"):
        methods: dict[str, Any] = {}
        for name, prefetch in (("prefetched", True), ("in turn", False)):
            own = config.changed(Settings, prefetch=prefetch)
            methods[name] = kind(Context(world, network, dataset, own, make_backend(own.parallel.backend, threads)))
        settle(world, cores(), True)
        times: dict[str, list[float]] = {name: [] for name in methods}
        received = 0
        for number in range(WARM + rounds):
            for name, method in methods.items():
                before = method.counter.received
                control.wait_for_all()
                begun = time.perf_counter()
                method.step(Batch(batches.ids(*divmod(number, batches.steps_per_epoch))), rate(0))
                control.wait_for_all()
                times[name].append(1e3 * (time.perf_counter() - begun))
                received = method.counter.received - before
        held = methods["prefetched"].memory()
    kept = held["weights"] + held["gradients"] + held["optimizer"] + held["activations"]
    most = control.rows(np.array([received, kept, sum(held.values()) - held["samples"]], float)).max(axis=0)
    if world.rank == 0:
        grid = methods["prefetched"].plan.grid.sizes
        tell(
            json.dumps(
                {
                    "grid": grid,
                    "ms": {name: seconds[WARM:] for name, seconds in times.items()},
                    "received": most[0],
                    "kept": most[1],
                    "held": most[2],
                }
            )
        )
    return 0


if __name__ == "__main__":
    from psmpi.bench.training import run_ranks

    sys.exit(run_ranks(tiled, sys.argv[1:], "bench tensor"))
