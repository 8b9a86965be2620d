"""The time that the flight recorder adds to a step."""

from __future__ import annotations

import json as jsonlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.errors import UserError
from psmpi.output import tell

if TYPE_CHECKING:
    from psmpi.config import Config

# Seconds of the measurement; steps of a block, and before all blocks; groups of pairs of blocks, whose spread is shown.
SECONDS, STEPS, WARM, GROUPS = 30.0, 5, 20, 10
# What others do on the machine only ever makes a block longer.
QUANTILE = 0.05


def recorder(config: Config, json: bool = False) -> int:
    """Time steps with and without the flight recorder, in blocks of 5 that alternate for 30 s.

    Takes the options of psmpi.train; run it on two ranks or more, under mpirun. Both trainings are in one job, so that
    they see the same machine. Times are those that one of 20 blocks stays below, and their ratio; `low` and `high`
    are the least and the largest ratio of ten parts of the measurement.

    Args:
        json: Print JSON.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.comm.control import Control
    from psmpi.comm.flight import recorded
    from psmpi.comm.world import host, start
    from psmpi.config import check
    from psmpi.data import Batch, open_dataset
    from psmpi.nn.zoo import make_network
    from psmpi.registry import find_method
    from psmpi.training.context import Context
    from psmpi.training.loop import plan_steps

    check(config)
    world = start()
    if world.size < 2:
        raise UserError("bench recorder: one rank records nothing: start it by mpirun -n 2")
    control, model = Control(world), config.model
    dataset = open_dataset(config.data.dataset, config.data.data_dir, config.data.split_seed)
    network = make_network(model.model, dataset.shape, dataset.outputs, **model.shape)
    kind: Any = find_method(config.parallel.method)
    kind.check(world.size, network, dataset, config)
    batches, _, rate = plan_steps(dataset, config)
    ranks, cores = host(world)
    threads = config.parallel.threads or max(1, cores // ranks)
    watched = recorded(world)
    flight = Control(watched).flight
    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = make_backend(config.parallel.backend, threads)
        methods = [kind(Context(one, network, dataset, config, ops)) for one in (world, watched)]

        def block(method: Any, steps: int) -> float:
            control.wait_for_all()
            begun = time.perf_counter()
            for step in range(steps):
                # As the loop does, for both.
                flight.step = step
                method.step(Batch(batches.ids(0, step % batches.steps_per_epoch)), rate(0))
            return time.perf_counter() - begun

        for method in methods:
            block(method, WARM)
        times: list[tuple[float, float]] = []
        count, end = flight.count, time.perf_counter() + SECONDS
        while control.share_flag(time.perf_counter() < end or len(times) < GROUPS):
            order = (0, 1) if len(times) % 2 else (1, 0)
            found = {k: block(methods[k], STEPS) for k in order}
            times.append((found[0], found[1]))
    # The slowest rank decides.
    taken = control.rows(np.array(times)).max(axis=0) / STEPS
    operations = control.total(np.array([float(flight.count - count)]))[0] / (len(times) * STEPS * world.size)
    plain, with_recorder = np.quantile(taken, QUANTILE, axis=0)
    parts = [np.quantile(part, QUANTILE, axis=0) for part in np.array_split(taken, GROUPS)]
    ratios = [part[1] / part[0] for part in parts]
    figures = {
        "ms": float(1e3 * plain), "ms_recorded": float(1e3 * with_recorder), "ratio": float(with_recorder / plain),
        "low": float(min(ratios)), "high": float(max(ratios)), "operations": float(operations), "pairs": len(times),
    }  # fmt: skip
    if world.rank == 0:
        if json:
            tell(jsonlib.dumps(figures))
        else:
            tell(
                f"{figures['ms']:.4f} ms a step, recorded {figures['ms_recorded']:.4f}, ratio {figures['ratio']:.4f} "
                f"({figures['low']:.4f} to {figures['high']:.4f}), {figures['operations']:.1f} operations a step"
            )
    return 0
