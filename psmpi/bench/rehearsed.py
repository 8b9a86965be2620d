"""Compare measured steps of a training with predictions from their rehearsals; a program under mpirun.

Its options are those of psmpi.train and of `rehearsed`. Rank 0 prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from psmpi.config import Config

# Warm-up steps.
WARM = 10
# Steps of a measurement, and with passes that sleep.
STEPS, FEW = 40, 15


def emulate(seconds: float) -> None:
    """Let each forward and backward pass sleep for `seconds`, in one piece, to emulate larger layers.

    Messages do not change, and sleeping ranks need no core.
    """
    from psmpi.nn.model import Model

    def slowed(call: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*words: Any, **options: Any) -> Any:
            result = call(*words, **options)
            time.sleep(seconds)
            return result

        return slow

    Model.forward = slowed(Model.forward)  # type: ignore[method-assign]
    Model.backward = slowed(Model.backward)  # type: ignore[method-assign]


def rehearsed(config: Config, sleep_ms: float = 0.0) -> int:
    """Measure steps beside their prediction.

    Args:
        sleep_ms: Milliseconds that each pass through layers sleeps besides.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.bench.links import find_links
    from psmpi.bench.step import collected
    from psmpi.bench.training import prepare
    from psmpi.comm.control import Control
    from psmpi.comm.patience import settle
    from psmpi.comm.world import cores, host_numbers, start
    from psmpi.cost import Link, Network, Program, make_schedule, rehearse, simulate
    from psmpi.cost.estimate import check_foreseen
    from psmpi.cost.rehearsal import blank
    from psmpi.data import Batch
    from psmpi.output import tell
    from psmpi.training.context import Context

    check_foreseen(config)
    world = start()
    if sleep_ms:
        emulate(1e-3 * sleep_ms)
    steps = FEW if sleep_ms else STEPS
    control = Control(world)
    kind, network, dataset, batches, rate, threads = prepare(config, world)
    of_host = host_numbers(world)
    links = find_links(control)
    programs: list[list[Program]] = []
    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = make_backend(config.parallel.backend, threads)
        method = kind(Context(world, network, dataset, config, ops))
        settle(world, cores(), method.place().computes_with > 0)

        def rehearse_all() -> None:
            """Rehearse on all ranks at once, so that they share caches and memory bandwidth as in training."""
            control.wait_for_all()
            rehearsal = rehearse(kind, world.rank, of_host, network, blank(dataset), config, ops, steps // 2)
            tables = collected(control, json.dumps(rehearsal.program.table()))
            programs.append([Program.of(json.loads(text)) for text in tables])

        def trained(first: int, count: int) -> float:
            """Train `count` steps; return the seconds of a step."""
            control.wait_for_all()
            begun = time.perf_counter()
            for number in range(first, first + count):
                method.step(Batch(batches.ids(*divmod(number, batches.steps_per_epoch))), rate(0))
            control.wait_for_all()
            return (time.perf_counter() - begun) / count

        trained(0, WARM)
        measured = []
        for k in range(3):
            rehearse_all()
            measured.append(trained(WARM + k * steps, steps))
    if world.rank == 0:
        here, there = links.get("within"), links.get("between")
        # A single rank has no link: any will do.
        one = here or there or Link.of(1e-6, 1e10)
        net = Network(tuple(of_host), here or one, there or one)
        predicted = [simulate(make_schedule(some), net).step(method.period) for some in programs]
        computing = [max(program.computing for program in some) for some in programs]
        row: dict[str, Any] = {
            "measured_ms": [1e3 * one for one in measured],
            "predicted_ms": [1e3 * one for one in predicted],
            "computing_ms": [1e3 * one for one in computing],
            "links": {name: one.times for name, one in links.items()},
        }
        tell(json.dumps(row))
    return 0


if __name__ == "__main__":
    from psmpi.bench.training import run_ranks

    sys.exit(run_ranks(rehearsed, sys.argv[1:], "bench predict"))
