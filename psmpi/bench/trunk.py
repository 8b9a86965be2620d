"""Compare the time of a step on one process and on several ranks, for several ways to share its work."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from psmpi.bench.network import launcher, run_program
from psmpi.errors import UserError
from psmpi.output import Screen, check_files, tell

ALONE, ASIDE, DDP = "one process", "as many processes, apart", "PyTorch DDP"
OWN = ("--colocate", "--placement", "owner")


def trunk(
    ranks: int = 2,
    dataset: str = "digits",
    data_dir: str = "",
    model: str = "psnet",
    widths: tuple[int, ...] = (),
    loss: str = "psl",
    batch_size: int = 100,
    rounds: int = 5,
    options: str = "",
    pytorch: bool = False,
    json: str = "",
) -> int:
    """Time steps of one training on one process and on several ranks of this machine, in turn.

    The ranks share the classes, with a trunk that each computes whole (replicated) or on a slice of the minibatch
    (split), or they share the samples (replicas, data_parallel). Independent processes of the same number show the
    capacity of the machine. Speed-ups are medians of ratios to the one process of the same round, with quartiles. A way
    that the network or the options do not allow is left out, with the reason.

    Args:
        ranks: Number of ranks, and of independent processes, with one thread each.
        dataset: Data set, as in psmpi train.
        data_dir: Folder of the data set's files.
        model: Network, as in psmpi train.
        widths: Widths of the model, as in psmpi train.
        loss: Loss, as in psmpi train.
        batch_size: Samples of a minibatch, over all ranks.
        rounds: Rounds, in each of which every way is timed once.
        options: Further options of psmpi train for all ways, in one word: --options="--optimizer momentum --dtype
            float64".
        pytorch: Time PyTorch's DistributedDataParallel (gloo) too. Needs psmpi[torch].
        json: File for the figures, in JSON.
    """
    for option, value, least in (("--ranks", ranks, 2), ("--rounds", rounds, 1), ("--batch-size", batch_size, ranks)):
        if value < least:
            raise UserError(f"{option} {value}: expected a whole number from {least} up")
    check_files(json=json)
    if pytorch and find_spec("torch") is None:
        raise UserError("--pytorch needs PyTorch: pip install 'psmpi[torch]'")
    words = ["--dataset", dataset, "--model", model, "--loss", loss, "--batch-size", str(batch_size), "--threads", "1"]
    words += [*(("--data-dir", data_dir) if data_dir else ()), *(["--widths", *map(str, widths)] if widths else [])]
    words += options.split()
    ways: dict[str, tuple[str, ...]] = {
        "replicated": (*OWN, "--trunk", "replicated"),
        "split": (*OWN, "--trunk", "split"),
        "replica rows": (*OWN, "--trunk", "replicated", "--replicas", str(ranks)),
        "data_parallel": ("--method", "data_parallel"),
    }
    all_found: list[dict[str, dict[str, float]]] = []
    for k in range(rounds):
        figures = {ALONE: _steps(1, words), ASIDE: _apart(ranks, words)}
        for name, more in list(ways.items()):
            try:
                figures[name] = _steps(ranks, [*words, *more])
            except UserError as error:
                if k:
                    raise
                tell(f"{name} is left out: {str(error).rpartition('error: ')[2]}")
                del ways[name]
        if pytorch:
            figures[DDP] = _steps(ranks, words, "psmpi.bench.ddp")
        all_found.append(figures)
        times = (f"{name} {one['ms_per_step']:.2f} ms" for name, one in figures.items())
        tell(f"round {k + 1}: {', '.join(times)}")
    rows = [_row(name, all_found, ranks if name == ASIDE else 1) for name in all_found[0]]
    _show(rows, ranks, dataset, model)
    if json:
        Path(json).write_text(jsonlib.dumps({"options": words, "ranks": ranks, "rows": rows}) + "\n")
    return 0


def _steps(ranks: int, words: Sequence[str], module: str = "psmpi.bench.steps") -> dict[str, float]:
    """Run a training; return the milliseconds of a step, and the largest megabytes that a rank holds and sends."""
    start = [launcher(), "-n", str(ranks)] if ranks > 1 else []
    out = run_program([*start, sys.executable, "-m", module, *words])
    figures: dict[str, float] = jsonlib.loads(out.splitlines()[-1])
    return figures


def _apart(ranks: int, words: Sequence[str]) -> dict[str, float]:
    """Run `ranks` trainings of one process each at the same time; return the figures of the slowest."""
    with ThreadPoolExecutor(ranks) as pool:
        figures = list(pool.map(lambda _: _steps(1, words), range(ranks)))
    return max(figures, key=lambda one: one["ms_per_step"])


def _row(name: str, rounds: Sequence[dict[str, dict[str, float]]], trainings: int) -> dict[str, Any]:
    """Medians over rounds, and the speed-up with its quartiles. trainings: the number that ran at the same time."""
    ratios = [trainings * one[ALONE]["ms_per_step"] / one[name]["ms_per_step"] for one in rounds]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    names = ("ms_per_step", "megabytes", "megabytes_sent")
    medians = {key: median(one[name][key] for one in rounds) for key in names if key in rounds[0][name]}
    return {"way": name, **medians, "speedup": middle, "low": low, "high": high}


def _show(rows: Sequence[dict[str, Any]], ranks: int, dataset: str, model: str) -> None:
    from rich.table import Table

    table = Table(title=f"a step of {model} on {dataset}, {ranks} ranks of one thread", title_justify="left")
    table.add_column("way")
    for name in ("ms", "speed-up", "quartiles", "MB a rank", "MB sent a step"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = (f"{row[key]:.3g}" if key in row else "" for key in ("megabytes", "megabytes_sent"))
        span = f"{row['low']:.2f} {row['high']:.2f}"
        table.add_row(row["way"], f"{row['ms_per_step']:.2f}", f"{row['speedup']:.2f}", span, *sizes)
    Screen().print(table)
