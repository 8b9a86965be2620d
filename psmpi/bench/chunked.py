"""Time training steps of recurrent layers, chunk by chunk; a program under mpirun.

Its options are those of psmpi.train and of `chunked`. Rank 0 prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.bench.pipelined import slowed

if TYPE_CHECKING:
    from psmpi.config import Config

WARM = 2


def chunked(config: Config, rounds: int = 5, sleep_ms: float = 0.0) -> int:
    """Time training steps.

    Args:
        rounds: Steps that are timed.
        sleep_ms: Milliseconds that each chunk sleeps besides, each way.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.bench.training import prepare
    from psmpi.comm.control import Control
    from psmpi.comm.patience import settle
    from psmpi.comm.world import cores, start
    from psmpi.data import Batch
    from psmpi.output import tell
    from psmpi.training.context import Context

    world = start()
    control = Control(world)
    kind, network, dataset, batches, rate, threads = prepare(config, world)
    with threadpool_limits(threads), np.errstate(all="ignore"):
        method: Any = kind(Context(world, network, dataset, config, make_backend(config.parallel.backend, threads)))
        settle(world, cores(), True)
        for lane in method.pipeline.lanes if sleep_ms else ():
            lane.forward, lane.backward = (slowed(one, 1e-3 * sleep_ms) for one in (lane.forward, lane.backward))
        times = []
        for number in range(WARM + rounds):
            control.wait_for_all()
            begun = time.perf_counter()
            method.step(Batch(batches.ids(*divmod(number, batches.steps_per_epoch))), rate(0))
            control.wait_for_all()
            times.append(1e3 * (time.perf_counter() - begun))
    if world.rank == 0:
        tell(json.dumps(times[WARM:]))
    return 0


if __name__ == "__main__":
    from psmpi.bench.training import run_ranks

    sys.exit(run_ranks(chunked, sys.argv[1:], "bench wavefront"))
