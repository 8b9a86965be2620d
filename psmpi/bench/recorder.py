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

# Pairs of blocks, one recorded and one not, and the seconds that a block takes about.
PAIRS, BLOCK = 300, 0.02
WARM = 20


def recorder(config: Config, json: bool = False) -> int:
    """Time steps with and without the flight recorder, in blocks that alternate: median ratio of 300 pairs.

    Takes the options of psmpi.train; run it on two ranks or more, under mpirun. Both trainings are in one job, so that
    they see the same machine; `low` and `high` bound the median ratio (95 %, by order statistics).

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
        first = np.array([block(methods[0], WARM) / WARM])
        steps = max(1, int(BLOCK / (control.total(first)[0] / world.size)))
        before, times = flight.count, np.empty((PAIRS, 2))
        for pair in range(PAIRS):
            for k in (0, 1) if pair % 2 else (1, 0):
                times[pair, k] = block(methods[k], steps)
    # Of all ranks together: the slowest decides.
    everyone = control.rows(times).max(axis=0)
    operations = control.total(np.array([flight.count - before])) / (PAIRS * steps * world.size)
    ratios = np.sort(everyone[:, 1] / everyone[:, 0])
    spread = round(0.98 * PAIRS**0.5)
    found = {
        "ms": float(1e3 * np.median(everyone[:, 0]) / steps),
        "ms_recorded": float(1e3 * np.median(everyone[:, 1]) / steps),
        "ratio": float(np.median(ratios)),
        "low": float(ratios[PAIRS // 2 - spread]),
        "high": float(ratios[PAIRS // 2 + spread]),
        "operations": float(operations[0]),
    }
    if world.rank == 0:
        if json:
            tell(jsonlib.dumps(found))
        else:
            tell(
                f"{found['ms']:.3f} ms a step, recorded {found['ms_recorded']:.3f}, ratio {found['ratio']:.4f} "
                f"({found['low']:.4f} to {found['high']:.4f}), {found['operations']:.1f} operations a step and rank"
            )
    return 0
