"""Predict steps on more and more ranks with the cost model: from where on more ranks do not help, and why."""

from __future__ import annotations

import json as jsonlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psmpi.errors import UserError
from psmpi.output import Screen, check_files, tell

if TYPE_CHECKING:
    from psmpi.config import Config

# More ranks help if samples a second grow by more than this factor when the ranks double.
WORTH = 1.1


def scale(
    config: Config,
    ranks: tuple[int, ...] = (2, 4, 8, 16, 32, 64),
    weak: bool = False,
    ranks_per_host: int = 1,
    gigabits: float = 10.0,
    latency_us: float = 20.0,
    links: str = "",
    plot: str = "",
    json: str = "",
) -> int:
    """Predict steps on growing numbers of ranks, and the number from which more ranks do not help.

    Nothing is trained, see psmpi plan. A rank is busy with messages while its host's link sends or receives its own.

    Args:
        ranks: Growing numbers of ranks.
        weak: Weak scaling: the minibatch grows with the ranks. Without it, the minibatch is the same on all.
        ranks_per_host: Ranks of a host. 0: all ranks are on one.
        gigabits: Bandwidth of each host's link, in Gbit/s.
        latency_us: Latency of a short message between two hosts, in microseconds.
        links: File of measured links from psmpi bench links --save, in place of these two.
        plot: File for a plot of samples a second: .png, .pdf or .svg. Needs psmpi[plot].
        json: File for the figures, in JSON.
    """
    from psmpi.cost.estimate import estimate, network_of
    from psmpi.cost.rehearsal import blank
    from psmpi.data import open_dataset
    from psmpi.nn.zoo import make_network

    if not ranks or list(ranks) != sorted(set(ranks)) or ranks[0] < 1:
        raise UserError(f"--ranks {' '.join(map(str, ranks))}: expected whole numbers from 1 up, growing")
    check_files(plot, json=json)
    dataset = blank(open_dataset(*config.data.source))
    network = make_network(
        config.model.model,
        dataset.shape,
        dataset.outputs,
        **config.model.shape,
        by_step=dataset.train.by_step,
        task=dataset.task,
    )
    rows: list[dict[str, Any]] = []
    scaling = "weak" if weak else "strong"
    for size in ranks:
        batch = config.data.batch_size * (size // ranks[0] if weak else 1)
        own = replace(config, data=replace(config.data, batch_size=batch))
        hosts = network_of(size, ranks_per_host, gigabits, latency_us, links)
        try:
            predicted = estimate(own, network, dataset, hosts)
        except UserError as error:
            if not rows:
                raise
            tell(f"on {size} ranks: {error}")
            break
        rows.append(
            {"ranks": size, "batch": batch, "ms_per_step": 1e3 * predicted.step,
             "samples_per_second": batch / predicted.step,
             "computing_ms": 1e3 * predicted.computing, "first_busy": predicted.busy(0, hosts),
             "megabytes_held": predicted.memory / 1e6, "megabytes_sent": predicted.sent / 1e6}
        )  # fmt: skip
    _show(rows, scaling)
    tell(_verdict(rows))
    if json:
        Path(json).write_text(jsonlib.dumps({"scaling": scaling, "rows": rows}) + "\n")
    if plot:
        _draw(rows, scaling, plot)
    return 0


def _verdict(rows: list[dict[str, Any]]) -> str:
    """A sentence that says from where on more ranks do not help, and how busy rank 0 is there."""
    for before, after in pairwise(rows):
        doublings = after["ranks"] / before["ranks"] / 2
        if after["samples_per_second"] < WORTH**doublings * before["samples_per_second"]:
            busy, computing = after["first_busy"], after["computing_ms"] / after["ms_per_step"]
            saturated = "; one master is saturated: use more (--masters) or none (--placement owner)"
            return (
                f"more than {before['ranks']} ranks do not help: on {after['ranks']} the slowest rank computes for "
                f"{100 * min(1.0, computing):.0f} % of a step, and rank 0's link is busy for {100 * busy:.0f} %"
                f"{saturated if busy > 0.5 else ''}"
            )
    return f"more ranks help up to {rows[-1]['ranks']}, the most that were asked for"


def _show(rows: list[dict[str, Any]], scaling: str) -> None:
    from rich.table import Table

    table = Table(title=f"{scaling} scaling, predicted", title_justify="left")
    names = ("ranks", "samples", "ms a step", "computing ms", "samples/s", "rank 0 in messages", "MB held", "MB sent")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['ranks']:,}", f"{row['batch']:,}", f"{row['ms_per_step']:.3g}", f"{row['computing_ms']:.3g}",
            f"{row['samples_per_second']:,.0f}", f"{100 * row['first_busy']:.0f} %", f"{row['megabytes_held']:.3g}",
            f"{row['megabytes_sent']:.3g}",
        )  # fmt: skip
    Screen().print(table)


def _draw(rows: list[dict[str, Any]], scaling: str, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ranks, rates = [row["ranks"] for row in rows], [row["samples_per_second"] for row in rows]
    axes.loglog(ranks, rates, "o-", label="predicted")
    axes.loglog(ranks, [rates[0] * size / ranks[0] for size in ranks], "--", color="grey", label="in proportion")
    axes.set_xticks(ranks, [str(size) for size in ranks])
    axes.set_xlabel("ranks")
    axes.set_ylabel("samples a second")
    axes.set_title(f"{scaling} scaling")
    axes.legend()
    figure.savefig(path)
