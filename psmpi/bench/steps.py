"""Time the steps of a training; a program under mpirun for `bench trunk`."""

from __future__ import annotations

import json
import sys
import time

from psmpi.bench.ddp import STEPS, WARM


def main(argv: list[str]) -> int:
    """Time steps with the options of psmpi.train; the last line that rank 0 prints is JSON."""
    from psmpi.command import answer

    return answer(lambda: _time(argv))


def _time(argv: list[str]) -> int:
    import numpy as np
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.bench.training import prepare
    from psmpi.comm.control import Control
    from psmpi.comm.world import start
    from psmpi.command import training_options
    from psmpi.config import defaults
    from psmpi.data import Batch
    from psmpi.training.context import Context
    from psmpi.training.usual import usual

    world = start()
    control = Control(world)
    config = usual(training_options(defaults(argv), argv))
    kind, network, dataset, batches, rate, threads = prepare(config, world)
    with threadpool_limits(threads), np.errstate(all="ignore"):
        method = kind(Context(world, network, dataset, config, make_backend(config.parallel.backend, threads)))
        for step in range(WARM + STEPS):
            if step == WARM:
                control.total(np.zeros(1))
                sent, begin = method.counter.sent, time.perf_counter()
            method.step(Batch(batches.ids(*divmod(step, batches.steps_per_epoch))), rate(0))
        control.total(np.zeros(1))
        seconds, sent = time.perf_counter() - begin, method.counter.sent - sent
    held = control.rows(np.array([float(sum(method.memory().values())), sent / STEPS])) / 1e6
    if world.rank == 0:
        memory, bytes_sent = held.max(axis=0).tolist()
        print(json.dumps({"ms_per_step": 1e3 * seconds / STEPS, "megabytes": memory, "megabytes_sent": bytes_sent}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
