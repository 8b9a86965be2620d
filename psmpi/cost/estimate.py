"""The estimate of a training: memory, bytes and time of a step on so many ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.cost.link import Link, Network, load
from psmpi.cost.rehearsal import Rehearsal, rehearse
from psmpi.cost.schedule import SEND, Schedule, make_schedule
from psmpi.cost.simulate import simulate
from psmpi.errors import UserError

if TYPE_CHECKING:
    from psmpi.config import Config
    from psmpi.data import Dataset
    from psmpi.nn.network import Network as Layers

# Number of ranks that count as few, and numbers of rehearsed steps on few and on many ranks.
SMALL, STEPS, FEW = 32, 10, 4
# Latency in seconds and bytes a second between ranks of a host, if they were not measured.
WITHIN = 2e-6, 8e9


def network_of(ranks: int, ranks_per_host: int, gigabits: float, latency_us: float, links: str = "") -> Network:
    """The network by the options of `psmpi plan`; links: a file of `save`. UserError for wrong options."""
    if ranks_per_host < 0:
        raise UserError(f"--ranks-per-host {ranks_per_host}: expected a whole number from 0 up")
    for option, number in (("--gigabits", gigabits), ("--latency-us", latency_us)):
        if not 0 < number < 1e9:
            raise UserError(f"{option} {number:g}: expected a number above 0")
    known, each = load(Path(links)) if links else {}, ranks_per_host or ranks
    if known and ranks > each and "between" not in known:
        raise UserError(
            f"--links {links}: has no link between hosts, and ranks are on several: measure it on two, or leave it out"
        )
    return Network(
        tuple(rank // each for rank in range(ranks)),
        known.get("within") or Link.of(*WITHIN),
        known.get("between") or Link.of(1e-6 * latency_us, gigabits / 8 * 1e9),
    )


def check_foreseen(config: Config) -> None:
    """UserError for settings whose time cannot be predicted."""
    from psmpi.optim import find_optimizer

    if find_optimizer(config.optimization.optimizer).needs_closure:
        raise UserError(
            f"--optimizer {config.optimization.optimizer}: how often a step computes and sends depends on the losses "
            "that it finds, and no time can be said before; take another one, such as adam"
        )
    if config.run.resume:
        raise UserError("--resume: a run that goes on is not foreseen; give its settings instead")
    if config.parallel.nccl or config.parallel.gpu_aware:
        raise UserError("--nccl and --gpu-aware: messages between devices are not foreseen; leave them out")


@dataclass(frozen=True)
class Estimate:
    """The prediction of a training: rehearsals of all ranks, their schedule, and seconds of a step and of the run."""

    ranks: list[Rehearsal]
    schedule: Schedule
    step: float
    run: float

    @property
    def computing(self) -> float:
        """The longest computing of a rank, seconds a step."""
        return max(one.program.computing for one in self.ranks)

    @property
    def memory(self) -> int:
        """The most bytes that a rank holds."""
        return max(sum(one.memory.values()) for one in self.ranks)

    @property
    def sent(self) -> float:
        """The most bytes that a rank sends a step."""
        return max(one.sent for one in self.ranks)

    def busy(self, rank: int, network: Network) -> float:
        """Share of a step in which the link of a rank sends or receives, both added; 1 at most."""
        busy = 0.0
        for number, tasks in enumerate(self.schedule.ranks):
            for task in tasks:
                if task.kind == SEND and rank in (number, task.peer):
                    busy += network.link(number, task.peer).parts(task.nbytes)[1]
        return min(1.0, busy / self.schedule.steps / self.step)

    def table(self) -> dict[str, Any]:
        """The estimate as JSON has it."""
        ranks = [
            {"role": one.place.role, "classes": one.place.classes, "computes_with": one.place.computes_with,
             "optimizes": one.place.owned, "bytes": sum(one.memory.values()), "bytes_sent": one.sent,
             "computing_ms": 1e3 * one.program.computing}
            for one in self.ranks
        ]  # fmt: skip
        return {"ms_per_step": 1e3 * self.step, "ranks": ranks}


def estimate(config: Config, network: Layers, dataset: Dataset, hosts: Network) -> Estimate:
    """Rehearse a training's step on each of its ranks, and simulate all of them together.

    dataset: best a `blank` one. UserError for a training that these ranks do not allow, and for an optimizer whose
    messages depend on the values, as with a line search.
    """
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.registry import find_method
    from psmpi.training.checks import check_margin, check_sequences
    from psmpi.training.class_weights import check_class_weights
    from psmpi.training.loop import plan_steps

    check_foreseen(config)
    size = len(hosts.of_host)
    kind = find_method(config.parallel.method)
    check_margin(network, dataset, config)
    check_sequences(kind, network, dataset)
    check_class_weights(kind, dataset, config)
    kind.check(size, network, dataset, config)
    plan_steps(dataset, config)
    threads, steps = config.parallel.threads or 1, STEPS if size <= SMALL else FEW
    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = make_backend(config.parallel.backend, threads)
        ranks = [rehearse(kind, rank, hosts.of_host, network, dataset, config, ops, steps) for rank in range(size)]
    ranks = [replace(one, program=one.program.typical()) for one in ranks]
    schedule = make_schedule([one.program for one in ranks])
    times = simulate(schedule, hosts)
    return Estimate(ranks, schedule, times.step(ranks[0].period), max(ends[-1] for ends in times.ends))
