"""Measure the time that the flight recorder adds to a step."""

from __future__ import annotations

import json as jsonlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.errors import UserError
from psmpi.output import tell

if TYPE_CHECKING:
    from psmpi.config import Config

# Seconds of the measurement, steps of a block, warm-up steps, and groups of pairs of blocks, whose spread is shown.
SECONDS, STEPS, WARM, GROUPS = 30.0, 5, 20, 10
# A low quantile of the times is shown, since other processes can only make a block longer.
QUANTILE = 0.05


def recorder(config: Config, json: bool = False) -> int:
    """Time steps with and without the flight recorder, in blocks of 5 that alternate for 30 s.

    Run it on two ranks or more, under mpirun. Both trainings share one job, and so the same machine. A time is the 5th
    percentile of the blocks. `low` and `high` are the least and the largest ratio of ten parts of the measurement.
    `call_us` is the additional time of a recorded call, `wait_us` that of a request and its wait, on a communicator
    that does nothing: the least of many. `watch_ms` is the processor time of the watch in a second, on the rank with
    the most.

    Args:
        json: Print JSON.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.bench.training import prepare
    from psmpi.comm.control import Control
    from psmpi.comm.watch.flight import recorded
    from psmpi.comm.watch.watch import watched
    from psmpi.comm.world import start
    from psmpi.config import check
    from psmpi.data import Batch
    from psmpi.training.context import Context

    check(config)
    world = start()
    if world.size < 2:
        raise UserError("bench recorder: a single rank has no operations to record: run it under mpirun -n 2")
    control = Control(world)
    kind, network, dataset, batches, rate, threads = prepare(config, world)
    kept = recorded(world)
    aside = Control(kept)
    flight = aside.flight
    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = make_backend(config.parallel.backend, threads)
        methods = [kind(Context(one, network, dataset, config, ops)) for one in (world, kept)]

        def block(method: Any, steps: int) -> float:
            control.wait_for_all()
            begun = time.perf_counter()
            for step in range(steps):
                # The training loop sets the step, so do it for both methods.
                flight.step = step
                method.step(Batch(batches.ids(0, step % batches.steps_per_epoch)), rate(0))
            return time.perf_counter() - begun

        for method in methods:
            block(method, WARM)
        times: list[tuple[float, float]] = []
        with watched(aside, 60.0, 0.0) as watch:
            count, begun = flight.count, time.perf_counter()
            while control.share_flag(time.perf_counter() < begun + SECONDS or len(times) < GROUPS):
                order = (0, 1) if len(times) % 2 else (1, 0)
                seconds = {k: block(methods[k], STEPS) for k in order}
                times.append((seconds[0], seconds[1]))
            # Processor time of the watch's thread only.
            thread = None if watch is None else watch.thread.ident
            used = 0.0 if thread is None else time.clock_gettime(time.pthread_getcpuclockid(thread))
            watching = control.rows(np.array([1e3 * used / (time.perf_counter() - begun)]))
    # A block takes as long as on the slowest rank.
    taken = control.rows(np.array(times)).max(axis=0) / STEPS
    operations = control.total(np.array([float(flight.count - count)]))[0] / (len(times) * STEPS * world.size)
    plain, with_recorder = np.quantile(taken, QUANTILE, axis=0)
    parts = [np.quantile(part, QUANTILE, axis=0) for part in np.array_split(taken, GROUPS)]
    ratios = [part[1] / part[0] for part in parts]
    figures = {
        **call_times(), "watch_ms": float(watching.max()),
        "ms": float(1e3 * plain), "ms_recorded": float(1e3 * with_recorder), "ratio": float(with_recorder / plain),
        "low": float(min(ratios)), "high": float(max(ratios)), "operations": float(operations), "pairs": len(times),
    }  # fmt: skip
    if world.rank == 0:
        if json:
            tell(jsonlib.dumps(figures))
        else:
            tell(
                f"{figures['ms']:.4f} ms a step, recorded {figures['ms_recorded']:.4f}, ratio {figures['ratio']:.4f} "
                f"({figures['low']:.4f} to {figures['high']:.4f}), {figures['operations']:.1f} operations a step; "
                f"a recorded call takes {figures['call_us']:.2f} us, a request and its wait {figures['wait_us']:.2f}; "
                f"the watch takes {figures['watch_ms']:.2f} ms a second"
            )
    return 0


class Idle:
    """A communicator and a request whose methods do nothing."""

    rank, size = 0, 2

    def Bcast(self, buffer: np.ndarray, root: int) -> None:
        """Nothing."""

    def Iallreduce(self, sent: Any, into: np.ndarray) -> Idle:
        return self

    def Wait(self) -> None:
        """Nothing."""


def call_times(repeats: int = 200, calls: int = 500) -> dict[str, float]:
    """Microseconds that recording adds to a call ("call_us"), and to a request with its wait ("wait_us")."""
    from psmpi.comm.watch.flight import Flight, Recorded

    buffer, plain = np.zeros(8), Idle()
    kept: Any = Recorded(plain, Flight(), "idle", (0, 1))
    least: dict[tuple[str, bool], float] = {}
    for _ in range(repeats):
        for comm in (plain, kept):
            begun = time.perf_counter()
            for _ in range(calls):
                comm.Bcast(buffer, 0)
            middle = time.perf_counter()
            for _ in range(calls):
                comm.Iallreduce(buffer, buffer).Wait()
            end = time.perf_counter()
            for name, took in (("call_us", middle - begun), ("wait_us", end - middle)):
                key = name, comm is kept
                least[key] = min(least.get(key, took), took)
    return {name: 1e6 * (least[name, True] - least[name, False]) / calls for name in ("call_us", "wait_us")}
