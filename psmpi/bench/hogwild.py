"""Count updates of shared weights a second: without locks, with three kinds of locks, and by components (CYCLADES)."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from statistics import median
from typing import Any, Literal

from psmpi.bench.network import launcher, run_program
from psmpi.bench.unlocked import BLOCK, LOCKS, MINIBATCH
from psmpi.errors import UserError, counted
from psmpi.output import Screen, check_files

# Published run times of hogwild and of round-robin with locks, in seconds: Niu et al. (2011), table 2, 10 threads, 20
# epochs.
PUBLISHED = {"RCV1": (9.5, 61.8), "Netflix": (301, 2569), "KDD": (878, 7139), "DBLife": (230, 414)}
NAMES = {
    "raw": "plain stores",
    "atomic": "atomic additions",
    "blocks": f"plain stores of {BLOCK:,} samples' sums",
    "ticket": "ticket lock",
    "mutex": "pthread mutex",
    "mpi": "MPI lock",
    "cyclades": f"components of {MINIBATCH:,} samples",
}


def hogwild(
    ranks: int = 2,
    task: Literal["sparse", "ratings"] = "sparse",
    samples: int = 50_000,
    features: int = 47_236,
    entries: int = 76,
    lr: float = 0.5,
    updates: int = 100_000,
    rounds: int = 7,
    epochs: int = 3,
    limit: int = 600,
    plot: str = "",
    json: str = "",
) -> int:
    """Count updates of shared weights a second in several ways, on one worker and on all, in turn.

    Each rank needs a core that nothing else uses. Figures also depend on which ranks share caches.

    Args:
        ranks: Ranks, on one host.
        task: Task: logistic regression on sparse rows, by default of RCV1's sizes, or completion of a matrix of low
            rank.
        samples: Rows, or entries of the matrix.
        features: Features, or rows and columns of the matrix together.
        entries: Non-zero features of a row, or the rank of the matrix.
        lr: Learning rate.
        updates: Updates of one measurement. With MPI's locks it has a twentieth.
        rounds: Measurements of each way.
        epochs: Passes over all samples before the loss is shown. 0: no loss.
        limit: Seconds after which the measurement is ended.
        plot: File for a plot of updates a second: .png, .pdf or .svg. Needs psmpi[plot].
        json: File for the figures, in JSON.
    """
    numbers = {"--samples": samples, "--features": features, "--entries": entries, "--updates": updates,
               "--rounds": rounds, "--limit": limit, "--ranks": ranks}  # fmt: skip
    for option, value in numbers.items():
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    if epochs < 0 or not lr > 0:
        raise UserError(f"--epochs {epochs}, --lr {lr:g}: expected 0 or more epochs, and a learning rate above 0")
    if entries > features // 2:
        raise UserError(f"--entries {entries} of --features {features}: expected at most half of them")
    check_files(plot, json=json)
    given = {"task": task, "samples": samples, "features": features, "entries": entries, "lr": lr, "updates": updates,
             "rounds": rounds, "epochs": epochs}  # fmt: skip
    program = [sys.executable, "-m", "psmpi.bench.unlocked", jsonlib.dumps(given)]
    out = run_program([launcher(), "-n", str(ranks), *program], limit=limit)
    figures = next(jsonlib.loads(line) for line in out.splitlines() if line.startswith("{"))
    _show(figures, ranks, f"{samples:,} samples, {features:,} features, {entries} each")
    if plot:
        _draw(figures["rates"], plot)
    if json:
        Path(json).write_text(jsonlib.dumps({"options": given, "ranks": ranks, **figures}) + "\n")
    return 0


def _show(figures: dict[str, Any], ranks: int, title: str) -> None:
    from rich.table import Table

    screen, rates = Screen(), figures["rates"]
    table = Table(title=f"million updates a second, median (least to largest): {title}", title_justify="left")
    for name in ("updates by", "workers", "millions", "times one process", "times the best lock", "loss", "score"):
        table.add_column(name, justify="right")
    serial = rates["raw 1"]
    for name, each in rates.items():
        way, workers = name.split()
        locks = [rates[f"{lock} {workers}"] for lock in LOCKS if f"{lock} {workers}" in rates]
        beside = max(locks, key=median) if locks else []
        loss, score = figures["scores"].get(name, ("", ""))
        table.add_row(
            NAMES[way], workers, f"{median(each) / 1e6:.3f} ({min(each) / 1e6:.3f} to {max(each) / 1e6:.3f})",
            _ratio(each, serial), _ratio(each, beside), *(f"{one:.5f}" if one != "" else "" for one in (loss, score)),
        )  # fmt: skip
    screen.print(table)
    screen.tell(f"components of a minibatch: {figures['components']:.1f} on the average")
    for name, share in figures.get("lost", {}).items():
        screen.tell(f"lost by plain stores of {ranks} workers: {100 * share:.3f} % of the increments {name}")
    published = ", ".join(f"{name} {a:g} and {b:g}" for name, (a, b) in PUBLISHED.items())
    screen.tell(f"published run times without locks and in turn with locks, in s (Niu et al., 10 threads): {published}")


def _ratio(each: list[float], other: list[float]) -> str:
    """The median of the ratios each / other, round by round, as text; empty without `other`."""
    return f"{median(a / b for a, b in zip(each, other, strict=True)):.2f}" if other else ""


def _draw(rates: dict[str, list[float]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    ways = list(dict.fromkeys(name.split()[0] for name in rates))
    several = sorted({int(name.split()[1]) for name in rates})
    wide = 0.8 / len(several)
    for k, workers in enumerate(several):
        places = [at + (k - (len(several) - 1) / 2) * wide for at in range(len(ways))]
        each = [rates.get(f"{way} {workers}", [0.0]) for way in ways]
        middle = [median(one) / 1e6 for one in each]
        below = [m - min(one) / 1e6 for m, one in zip(middle, each, strict=True)]
        above = [max(one) / 1e6 - m for m, one in zip(middle, each, strict=True)]
        axes.bar(places, middle, wide, yerr=[below, above], label=counted(workers, "worker"))
    axes.set_xticks(range(len(ways)), [NAMES[way].replace(" ", "\n", 2) for way in ways])
    axes.set_ylabel("million updates a second")
    axes.legend()
    figure.savefig(path)
