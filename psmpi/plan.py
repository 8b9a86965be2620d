"""Estimate of a training before it starts: memory, bytes and time of a step. `python -m psmpi.plan`, on one process."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from psmpi.errors import UserError, counted
from psmpi.output import Screen, check_files, tell

if TYPE_CHECKING:
    from psmpi.config import Config
    from psmpi.cost import Network
    from psmpi.cost.estimate import Estimate
    from psmpi.nn.network import Network as Layers

# Label of the arrangement that the options give, among other ones; most ranks that have a line each.
GIVEN, SHOWN = "as given", 16
# Another arrangement is recommended if it takes less than this part of the given one's time: rehearsals repeat within
# a tenth.
WORTH = 0.9


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status, 0 done, 1 error."""
    from psmpi.command import answer, parsed, with_training_options
    from psmpi.config import defaults, with_usual

    words = sys.argv[1:] if argv is None else argv

    def go() -> int:
        start = defaults(words)
        return int(parsed(with_training_options(plan, start, words), with_usual(words, start), "plan"))

    return answer(go)


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
    """Predict memory, bytes and time of a training step on a number of ranks.

    Nothing is trained, and no samples are read. The command rehearses the step of each rank here, one after the other,
    on samples of zeros, and simulates the messages on the given network. Times are those of this machine's processor,
    with cores of its own for each rank.

    Args:
        ranks: Number of ranks.
        ranks_per_host: Ranks of a host. 0: all ranks are on one.
        gigabits: Bandwidth of each host's link, in Gbit/s.
        latency_us: Latency of a short message between two hosts, in microseconds.
        links: File of measured links from psmpi bench links --save, in place of these two.
        others: Try other arrangements too, on up to 32 ranks, and name the fastest.
        goal: File for the computations and messages of some steps, in the GOAL format of network simulators.
        json: Print JSON.
    """
    from psmpi.cost.estimate import SMALL, estimate, network_of
    from psmpi.cost.rehearsal import blank
    from psmpi.data import open_dataset
    from psmpi.nn.zoo import make_network

    if ranks < 1:
        raise UserError(f"--ranks {ranks}: expected a whole number from 1 up")
    check_files(goal=goal)
    hosts = network_of(ranks, ranks_per_host, gigabits, latency_us, links)
    dataset = blank(open_dataset(*config.data.source).for_training())
    network = make_network(
        config.model.model,
        dataset.shape,
        dataset.outputs,
        **config.model.shape,
        by_step=dataset.train.by_step,
        task=dataset.task,
    )
    estimates = {GIVEN: estimate(config, network, dataset, hosts)}
    for options, other in _others(config) if others and 1 < ranks <= SMALL else ():
        try:
            estimates[options] = estimate(other, network, dataset, hosts)
        except UserError:
            # The arrangement does not fit this network, loss or number of ranks.
            continue
    if goal:
        Path(goal).write_text("".join(f"{line}\n" for line in estimates[GIVEN].schedule.goal()))
    if json:
        tell(
            jsonlib.dumps(
                {
                    "parameters": network.layout().size,
                    "plans": [{"options": options, **each.table()} for options, each in estimates.items()],
                }
            )
        )
    else:
        _show(estimates, network, hosts)
        if goal:
            given = estimates[GIVEN]
            tell(f"{goal} has {counted(given.schedule.steps, 'step')}, of {1e3 * given.run:.4g} ms in all")
    return 0


def _others(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield other arrangements of the same training that the methods propose, as (options, configuration)."""
    from psmpi.registry import find_method, method_names

    for name in method_names():
        for options, other in find_method(name).arrangements(config):
            if other != config:
                yield options, other


def _show(estimates: dict[str, Estimate], network: Layers, hosts: Network) -> None:
    from rich.table import Table

    from psmpi.training.report import show_places

    console, given = Screen(), estimates[GIVEN]
    console.tell(f"model {network.name}: {network.layout().size:,} parameters")
    shown = [(each.rank, f"host {hosts.of_host[each.rank]}", each.place) for each in given.ranks[:SHOWN]]
    show_places(console, shown)
    if len(given.ranks) > SHOWN:
        console.tell(f"and {len(given.ranks) - SHOWN} more; none has more than {given.memory / 1e6:.1f} MB")
    table = Table(title=f"a step on {counted(len(given.ranks), 'rank')}", title_justify="left")
    table.add_column("options")
    for name in ("ms", "computing ms", "MB sent", "MB held"):
        table.add_column(name, justify="right")
    for options, each in estimates.items():
        figures = (1e3 * each.step, 1e3 * each.computing, each.sent / 1e6, each.memory / 1e6)
        table.add_row(options, *(f"{figure:.3g}" for figure in figures))
    console.print(table)
    console.tell("computing, sent and held: of the rank that has most")
    if len(estimates) > 1:
        console.tell(_advice(estimates))


def _advice(estimates: dict[str, Estimate]) -> str:
    """Return a sentence that names the fastest arrangement and the reason for its speed."""
    given = estimates[GIVEN]
    options, fastest = min(estimates.items(), key=lambda each: each[1].step)
    if fastest.step > WORTH * given.step:
        return "no other arrangement would be faster by more than a tenth"
    computing = given.computing - fastest.computing
    if 2 * computing > given.step - fastest.step:
        why = f"its slowest rank computes {1e3 * fastest.computing:.3g} ms and not {1e3 * given.computing:.3g}"
    else:
        apart = (1e3 * max(0.0, each.step - each.computing) for each in (fastest, given))
        why = "messages and waiting take {:.3g} ms of a step and not {:.3g}".format(*apart)
    return f"{options}: a step would take {fastest.step / given.step:.2f} of the time, for {why}"


if __name__ == "__main__":
    sys.exit(main())
