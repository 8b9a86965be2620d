"""What a training would be on so many ranks, before it is started: `python -m psmpi.plan`, on one process."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from psmpi.errors import UserError, counted
from psmpi.output import Screen, check_files, tell

if TYPE_CHECKING:
    from psmpi.config import Config
    from psmpi.cost import Network, Rehearsal, Schedule
    from psmpi.data import Dataset
    from psmpi.nn.network import Network as Layers

# Ranks up to which other arrangements are tried, and up to which every rank has a line.
TRIED, SHOWN = 32, 16
# Steps that are rehearsed, on few and on many ranks.
STEPS, FEW = 10, 4
# Seconds of a short message and bytes a second between ranks of a host, where they were not measured.
WITHIN = 2e-6, 8e9
# What one arrangement has to be faster by than the given one to be told of.
WORTH = 0.95


@dataclass(frozen=True)
class Found:
    """The plan of a configuration: its options, each rank's rehearsal, the schedule, and seconds of a step."""

    options: str
    ranks: list[Rehearsal]
    schedule: Schedule
    step: float

    @property
    def computing(self) -> float:
        """Seconds that the rank computes that computes longest."""
        return max(one.program.computing for one in self.ranks)

    @property
    def held(self) -> int:
        """Bytes that the rank holds that holds most."""
        return max(sum(one.memory.values()) for one in self.ranks)

    @property
    def sent(self) -> float:
        """Bytes a step that the rank sends that sends most."""
        return max(one.sent for one in self.ranks)

    def table(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        ranks = [
            {"role": one.place.role, "classes": one.place.classes, "computes_with": one.place.held,
             "optimizes": one.place.owned, "bytes": sum(one.memory.values()), "bytes_sent": one.sent,
             "computing_ms": 1e3 * one.program.computing}
            for one in self.ranks
        ]  # fmt: skip
        return {"options": self.options, "ms_per_step": 1e3 * self.step, "ranks": ranks}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, 0 done, 1 error."""
    from psmpi.command import answer, parsed, with_training_options
    from psmpi.config import defaults

    words = sys.argv[1:] if argv is None else argv
    return answer(lambda: int(parsed(with_training_options(plan, defaults(words), words), words, "plan")))


def plan(
    config: Config,
    ranks: int = 2,
    ranks_per_host: int = 0,
    gigabits: float = 10.0,
    latency_us: float = 20.0,
    links: str = "",
    others: bool = True,
    goal: str = "",
    json: bool = False,
) -> int:
    """Say what a training would be on so many ranks: memory, bytes and time of a step.

    Takes the options of psmpi.train. Nothing is trained, and no samples are read. What each rank does in a step is
    rehearsed here, one after the other, on samples that are zeros; messages are simulated on the network that is told.
    Times are those of this machine's processor, each rank with cores of its own.

    Args:
        ranks: Processes of the training.
        ranks_per_host: Ranks of a host; 0: all are on one.
        gigabits: Gbit/s of each host's link.
        latency_us: Microseconds of a short message between two hosts.
        links: File of measured links, which `psmpi bench links --save` writes, in place of these two.
        others: Also try other arrangements, on up to 32 ranks, and say which one would be fastest.
        goal: Also write what ranks compute and send in some steps into this file, in the GOAL format, which
            simulators of networks read.
        json: Print JSON.
    """
    from psmpi.cost import Link
    from psmpi.cost import Network as Hosts
    from psmpi.cost.link import load
    from psmpi.cost.rehearsal import blank
    from psmpi.data import open_dataset
    from psmpi.nn.zoo import make_network

    for option, value, least in (("--ranks", ranks, 1), ("--ranks-per-host", ranks_per_host, 0)):
        if value < least:
            raise UserError(f"{option} {value}: expected a whole number from {least} up")
    for option, number in (("--gigabits", gigabits), ("--latency-us", latency_us)):
        if not 0 < number < 1e9:
            raise UserError(f"{option} {number:g}: expected a number above 0")
    check_files(goal=goal)
    known, each = load(Path(links)) if links else {}, ranks_per_host or ranks
    hosts = Hosts(
        tuple(rank // each for rank in range(ranks)),
        known.get("within") or Link.of(*WITHIN),
        known.get("between") or Link.of(1e-6 * latency_us, gigabits / 8 * 1e9),
    )
    dataset = blank(open_dataset(config.data.dataset, config.data.data_dir, config.data.split_seed))
    network = make_network(config.model.model, dataset.shape, dataset.outputs, **config.model.shape)
    found = [_found("as given", config, network, dataset, hosts)]
    for options, other in _others(config) if others and ranks <= TRIED else ():
        try:
            found.append(_found(options, other, network, dataset, hosts))
        except UserError:
            # Not of this network, loss or number of ranks.
            continue
    if goal:
        Path(goal).write_text("".join(f"{line}\n" for line in found[0].schedule.goal()))
    if json:
        tell(jsonlib.dumps({"parameters": network.layout().size, "plans": [one.table() for one in found]}))
    else:
        _show(found, network, hosts)
    return 0


def _others(config: Config) -> Iterator[tuple[str, Config]]:
    """Other arrangements of the same training: their options, and configurations."""
    from psmpi.methods.psl.plan import Settings
    from psmpi.training.masters import Masters

    seen = [config]
    whole = replace(config, parallel=replace(config.parallel, method="data_parallel"))
    psl = replace(config, parallel=replace(config.parallel, method="psl"))
    owners = Masters(colocate=True, placement="owner")
    for options, other in (
        ("--method psl", psl.having([Masters(), Settings()])),
        ("--method psl --colocate", psl.having([Masters(colocate=True), Settings()])),
        ("--method psl --colocate --masters 2", psl.having([Masters(colocate=True, masters=2), Settings()])),
        ("--method psl --colocate --trunk split", psl.having([Masters(colocate=True), Settings(trunk="split")])),
        (
            "--method psl --colocate --placement owner",
            psl.having([owners, Settings()]),
        ),
        (
            "--method psl --colocate --placement owner --trunk split",
            psl.having([owners, Settings(trunk="split")]),
        ),
        ("--method data_parallel", whole),
    ):
        if other not in seen:
            seen.append(other)
            yield options, other


def _found(options: str, config: Config, network: Layers, dataset: Dataset, hosts: Network) -> Found:
    from threadpoolctl import threadpool_limits

    from psmpi.backend import make_backend
    from psmpi.cost import make_schedule, rehearse, simulate
    from psmpi.optim import find_optimizer
    from psmpi.registry import find_method

    if find_optimizer(config.optimization.optimizer).needs_closure:
        raise UserError(
            f"--optimizer {config.optimization.optimizer}: the messages of a step depend on what its line search "
            "finds, and no time can be said before; plan with another one, such as adam"
        )
    size = len(hosts.of_host)
    kind = find_method(config.parallel.method)
    kind.check(size, network, dataset, config)
    threads, steps = config.parallel.threads or 1, STEPS if size <= TRIED else FEW
    with threadpool_limits(threads), np.errstate(all="ignore"):
        ops = make_backend(config.parallel.backend, threads)
        ranks = [rehearse(kind, rank, hosts.of_host, network, dataset, config, ops, steps) for rank in range(size)]
    ranks = [replace(one, program=one.program.typical()) for one in ranks]
    schedule = make_schedule([one.program for one in ranks])
    return Found(options, ranks, schedule, simulate(schedule, hosts).step)


def _show(found: list[Found], network: Layers, hosts: Network) -> None:
    from rich.table import Table

    from psmpi.training.loop import show_places

    console, given = Screen(), found[0]
    console.tell(f"model {network.name}: {network.layout().size:,} parameters")
    shown = [(one.rank, f"host {hosts.of_host[one.rank]}", one.place) for one in given.ranks[:SHOWN]]
    show_places(console, shown)
    if len(given.ranks) > SHOWN:
        console.tell(f"and {len(given.ranks) - SHOWN} more; none has more than {given.held / 1e6:.1f} MB")
    fastest = min(found, key=lambda one: one.step)
    table = Table(title=f"a step on {counted(len(given.ranks), 'rank')}", title_justify="left")
    table.add_column("options")
    for name in ("ms", "computing ms", "MB sent", "MB held"):
        table.add_column(name, justify="right")
    for one in found:
        figures = (1e3 * one.step, 1e3 * one.computing, one.sent / 1e6, one.held / 1e6)
        table.add_row(one.options, *(f"{figure:.3g}" for figure in figures))
    console.print(table)
    console.tell("computing, sent and held: of the rank that has most")
    if len(found) > 1:
        console.tell(_advice(given, fastest))


def _advice(given: Found, fastest: Found) -> str:
    """What to choose, and why."""
    if fastest.step > WORTH * given.step:
        return "no other arrangement would be faster by more than a twentieth"
    computing = given.computing - fastest.computing
    if 2 * computing > given.step - fastest.step:
        why = f"its slowest rank computes {1e3 * fastest.computing:.3g} ms and not {1e3 * given.computing:.3g}"
    else:
        apart = (1e3 * max(0.0, one.step - one.computing) for one in (fastest, given))
        why = "messages and waiting take {:.3g} ms of a step and not {:.3g}".format(*apart)
    return f"{fastest.options}: a step would take {fastest.step / given.step:.2f} of the time, for {why}"


if __name__ == "__main__":
    sys.exit(main())
