"""Time steps of blocks of layers, decoupled and as a lock-step pipeline, in turn; a program under mpirun.

Its options are those of psmpi.train and of `pipelined`. Rank 0 prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from psmpi.config import Config

# Warm-up steps, steps of a measurement, steps of one with passes that sleep, and number of measurements.
WARM, STEPS, FEW, ROUNDS = 12, 60, 20, 3


def slowed(call: Any, seconds: float) -> Any:
    """Wrap a function so that each call sleeps for `seconds` afterwards."""

    def slow(*words: Any) -> Any:
        result = call(*words)
        time.sleep(seconds)
        return result

    return slow


def pipelined(config: Config, depths: tuple[int, ...] = (1, 2, 4), sleep_ms: float = 0.0) -> int:
    """Time steps by the method `dni`, by several of its settings.

    Args:
        depths: Minibatches that blocks may be ahead.
        sleep_ms: Milliseconds that each pass of a block sleeps besides.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.bench.training import prepare
    from psmpi.comm.control import Control
    from psmpi.comm.patience import settle
    from psmpi.comm.world import cores, start
    from psmpi.data import Batch
    from psmpi.methods.dni.settings import Settings
    from psmpi.output import tell
    from psmpi.training.context import Context

    world = start()
    control = Control(world)
    own = replace(config.of(Settings), layer_blocks=world.size)
    variants = {"lock-step": replace(own, ahead=1, bp_lambda=1.0)}
    variants |= {f"ahead {n}": replace(own, ahead=n) for n in depths}
    steps = FEW if sleep_ms else STEPS
    _, network, dataset, batches, rate, threads = prepare(config, world)
    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = make_backend(config.parallel.backend, threads)
        methods: dict[str, Any] = {}
        for name, settings in variants.items():
            chosen = config.having([settings])
            methods[name] = made = _method(chosen, Context(world, network, dataset, chosen, ops))
            for block in made.blocks if sleep_ms else ():
                block.forward_pass = slowed(block.forward_pass, 1e-3 * sleep_ms)
                block.backward_pass = slowed(block.backward_pass, 1e-3 * sleep_ms)
                if block.derive_pass is not None:
                    block.derive_pass = slowed(block.derive_pass, 1e-3 * sleep_ms)
            settle(world, cores(), True)

        def trained(method: Any, first: int, count: int) -> float:
            """Train `count` steps; return the seconds of a step."""
            control.wait_for_all()
            begun = time.perf_counter()
            for number in range(first, first + count):
                method.step(Batch(batches.ids(*divmod(number, batches.steps_per_epoch))), rate(0))
            method.drain()
            control.wait_for_all()
            return (time.perf_counter() - begun) / count

        times: dict[str, list[float]] = {name: [] for name in methods}
        for method in methods.values():
            trained(method, 0, WARM)
        for turn in range(ROUNDS):
            for name, method in methods.items():
                times[name].append(trained(method, WARM + turn * steps, steps))
    if world.rank == 0:
        tell(json.dumps({name: [1e3 * one for one in seconds] for name, seconds in times.items()}))
    return 0


def _method(config: Config, context: Any) -> Any:
    from psmpi.registry import find_method

    kind: Any = find_method("dni")
    kind.check(context.size, context.network, context.dataset, config)
    return kind(context)


if __name__ == "__main__":
    from psmpi.bench.training import run_ranks

    sys.exit(run_ranks(pipelined, sys.argv[1:], "bench decoupled"))
