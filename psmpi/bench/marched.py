"""Time passes through residual layers on several ranks, exact and by multigrid cycles; a program under mpirun.

Its options are those of psmpi.train and of `marched`. Rank 0 prints JSON: for each pass and round the total time, and
the mean times of a forward, an adjoint and a gradient evaluation of a layer, in milliseconds.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from psmpi.config import Config

# Number of measurements of each pass.
ROUNDS = 5
EVALUATIONS = ("forward", "backward", "gradient")


class Watch:
    """A function whose calls are timed and prolonged by a sleep, with the sums of seconds and calls since `take`."""

    def __init__(self, call: Any, sleep: float):
        self.call, self.sleep, self.seconds, self.calls = call, sleep, 0.0, 0

    def __call__(self, *words: Any) -> None:
        begun = time.perf_counter()
        self.call(*words)
        if self.sleep:
            time.sleep(self.sleep)
        self.seconds += time.perf_counter() - begun
        self.calls += 1

    def take(self) -> tuple[float, int]:
        totals = self.seconds, self.calls
        self.seconds, self.calls = 0.0, 0
        return totals


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
        watches = [Watch(getattr(layers, name), 1e-3 * sleep_ms) for name in EVALUATIONS]
        for name, watch in zip(EVALUATIONS, watches, strict=True):
            setattr(layers, name, watch)
        times: dict[str, list[list[float]]] = {}

        def timed(name: str, work: Any) -> None:
            """Time `work` on all ranks together, and record the mean time of each kind of evaluation, in ms."""
            control.wait_for_all()
            for watch in watches:
                watch.take()
            begun = time.perf_counter()
            work()
            control.wait_for_all()
            seconds = time.perf_counter() - begun
            sums = control.total(np.array([watch.take() for watch in watches]).reshape(-1)).reshape(-1, 2)
            times.setdefault(name, []).append([1e3 * one for one in (seconds, *(a / max(b, 1) for a, b in sums))])

        def step(name: str, factors: tuple[int, ...]) -> None:
            solver.begin(len(ids), 1, factors)
            method._open(ids)
            timed(f"{name} forward", lambda: solver.forward(s.forward_cycles, False))
            method._close(ids, len(ids), solver.u[-1], False)
            timed(f"{name} adjoint", lambda: solver.backward(s.adjoint_cycles, False))
            timed(f"{name} gradient", solver.gradients)

        for number in range(rounds + (not sleep_ms)):
            if number == (not sleep_ms):
                # Discard the first round, which fills caches.
                times.clear()
            step("exact", ())
            step("parallel", s.factors)
    if world.rank == 0:
        tell(json.dumps(times))
    return 0


if __name__ == "__main__":
    from psmpi.bench.training import run_ranks

    sys.exit(run_ranks(marched, sys.argv[1:], "bench layers"))
