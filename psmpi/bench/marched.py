"""Passes through residual layers on these ranks, exact and by cycles, in turn; a program under mpirun.

Takes the options of psmpi.train, and the milliseconds that each evaluation of a layer sleeps besides. Rank 0 prints
JSON.
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

# Evaluations of a layer that are timed, and steps in a row: each several times, of which the median counts.
TRIED, ROUNDS = 20, 5


def marched(config: Config, rounds: int = ROUNDS, sleep_ms: float = 0.0) -> int:
    """Time forward and adjoint passes and gradients, exact ones and as the settings say.

    Args:
        rounds: Times that each is timed.
        sleep_ms: Milliseconds that each evaluation of a layer sleeps besides.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.bench.training import prepare
    from psmpi.comm.control import Control
    from psmpi.comm.patience import settle
    from psmpi.comm.world import cores, start
    from psmpi.methods.layer_parallel.settings import Settings
    from psmpi.output import tell
    from psmpi.training.context import Context

    world = start()
    control = Control(world)
    kind, network, dataset, batches, _, threads = prepare(config, world)
    s = config.of(Settings)
    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = make_backend(config.parallel.backend, threads)
        method: Any = kind(Context(world, network, dataset, config, ops))
        settle(world, cores(), True)
        layers, solver, ids = method.layers, method.solver, np.sort(batches.ids(0, 0))
        if sleep_ms:
            for name in ("forward", "backward", "gradient"):
                setattr(layers, name, slowed(getattr(layers, name), 1e-3 * sleep_ms))
        found: dict[str, list[float]] = {}

        def timed(name: str, work: Any) -> None:
            """All ranks do it together."""
            control.wait_for_all()
            begun = time.perf_counter()
            work()
            control.wait_for_all()
            found.setdefault(name, []).append(time.perf_counter() - begun)

        def step(name: str, factors: tuple[int, ...]) -> None:
            solver.begin(len(ids), 1, factors)
            method._open(ids)
            timed(f"{name} forward", lambda: solver.forward(s.forward_cycles, False))
            method._close(ids, len(ids), solver.u[-1], False)
            timed(f"{name} adjoint", lambda: solver.backward(s.adjoint_cycles, False))
            timed(f"{name} gradient", solver.gradients)

        # All layers of a rank once, so that the caches are as in a step.
        x, y = (np.zeros(layers.units * len(ids), config.model.dtype) for _ in range(2))
        numbers = range(len(layers.parts))[: TRIED if sleep_ms else None]
        for number in range(rounds + (not sleep_ms)):
            if number == (not sleep_ms):
                found.clear()
            step("exact", ())
            step("parallel", s.factors)
            timed("layer forward", lambda: [layers.forward(k, 1.0, x, y) for k in numbers])
            timed("layer adjoint", lambda: [layers.backward(k, 1.0, x, y) for k in numbers])
            timed("layer gradient", lambda: [layers.gradient(k, 1.0, x) for k in numbers])
    for name in [name for name in found if name.startswith("layer ")]:
        found[name] = [seconds / len(numbers) for seconds in found[name]]
    if world.rank == 0:
        tell(json.dumps({name: [1e3 * one for one in times] for name, times in found.items()}))
    return 0


if __name__ == "__main__":
    from psmpi.bench.training import run_ranks

    sys.exit(run_ranks(marched, sys.argv[1:], "bench layers"))
