"""Compare decoupled blocks of layers with a lock-step pipeline of the same blocks on the same ranks."""

from __future__ import annotations

import json as jsonlib
import sys
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from psmpi.bench.hosts import check_hosts, slow_hosts, wrapper
from psmpi.bench.network import launcher, run_program
from psmpi.bench.predict import BURST, rate_name
from psmpi.errors import UserError
from psmpi.methods.dni.settings import MOST_AHEAD
from psmpi.output import Screen, check_files


def decoupled(
    ranks: tuple[int, ...] = (2,),
    ahead: tuple[int, ...] = (1, 2, 4),
    width: int = 256,
    layers: int = 1,
    batch_size: int = 256,
    dataset: str = "digits",
    data_dir: str = "",
    rates: tuple[float, ...] = (0.0,),
    delay_ms: float = 0.0,
    sleep_ms: float = 0.0,
    limit: int = 600,
    plot: str = "",
    json: str = "",
) -> int:
    """Time minibatches of decoupled blocks (--method dni), and of the same blocks as a lock-step pipeline.

    Each rank has a block, and needs a core unless --sleep-ms replaces the computation. The pipeline is
    back-propagation: a minibatch goes up through all blocks, and its gradients come down, before the next one starts.
    Both take turns in one run.

    Args:
        ranks: Numbers of ranks, and of blocks; a run for each.
        ahead: Minibatches that a block may be ahead of the one above.
        width: Units of each hidden layer.
        layers: Layers of a block.
        batch_size: Samples of a minibatch.
        dataset: Data set, as in psmpi train.
        data_dir: Folder of the data set's files.
        rates: Bandwidths of each host's link in Mbit/s, 0 for this machine as it is. Others need root, iproute2 and
            MPICH.
        delay_ms: Additional latency of messages between hosts, in ms.
        sleep_ms: Additional sleep of each forward and backward pass of a block, in ms. It stands for a larger block.
        limit: Seconds after which a run is ended.
        plot: File for a plot of minibatches a second: .png, .pdf or .svg. Needs psmpi[plot].
        json: File for the figures, in JSON.
    """
    if not all(2 <= n <= 250 for n in ranks) or not ranks:
        raise UserError(f"--ranks {' '.join(map(str, ranks))}: expected numbers from 2 to 250")
    if not all(1 <= n <= MOST_AHEAD for n in ahead) or not ahead:
        raise UserError(f"--ahead {' '.join(map(str, ahead))}: expected numbers from 1 to {MOST_AHEAD}")
    for option, value in (("--width", width), ("--layers", layers), ("--batch-size", batch_size), ("--limit", limit)):
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    if not 0 <= sleep_ms < 1e6:
        raise UserError(f"--sleep-ms {sleep_ms:g}: expected a number from 0 to 1e6")
    check_hosts(rates, delay_ms)
    check_files(plot, json=json)
    dataset = str(Path(dataset).absolute()) if Path(dataset).is_file() else dataset
    given = ["--method", "dni", "--dataset", dataset, "--loss", "nll", "--threads", "1", "--batch-size",
             str(batch_size), "--depths", *map(str, ahead), "--sleep-ms", str(sleep_ms)]  # fmt: skip
    given += ["--data-dir", str(Path(data_dir).absolute())] if data_dir else []
    rows: list[dict[str, Any]] = []
    for rate, count in product(rates, ranks):
        model = ["--model", "mlp", "--widths", *[str(width)] * (count * layers - 1)]
        with slow_hosts(count, rate, BURST, delay_ms) as hosts:
            program = [sys.executable, "-m", "psmpi.bench.pipelined", *given, *model]
            program = [*(["env", "PSMPI_WAIT=sleep"] if sleep_ms else []), *program]
            before = wrapper(hosts) if hosts else []
            out = run_program([launcher(), "-n", str(count), *before, *program], bool(hosts), limit)
        rows.append({"ranks": count, "megabits": rate, "ms": jsonlib.loads(out.splitlines()[-1])})
    _show(rows)
    if plot:
        _draw(rows, plot)
    if json:
        Path(json).write_text(jsonlib.dumps({"options": given, "rows": rows}) + "\n")
    return 0


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="ms a minibatch, median of 3 (times as many a second)", title_justify="left")
    for name in ("ranks", "link"):
        table.add_column(name, justify="right")
    for name in rows[0]["ms"]:
        table.add_column(name, justify="right")
    for row in rows:
        least = median(row["ms"]["lock-step"])
        medians = [median(times) for times in row["ms"].values()]
        table.add_row(
            str(row["ranks"]), rate_name(row["megabits"]), *(f"{one:.2f} ({least / one:.2f})" for one in medians)
        )
    Screen().print(table)


def _draw(rows: list[dict[str, Any]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ranks = sorted({row["ranks"] for row in rows})
    for name, rate in product(rows[0]["ms"], dict.fromkeys(row["megabits"] for row in rows)):
        some = [row for row in rows if row["megabits"] == rate]
        label = f"{name}, {rate_name(rate)}" if rate else name
        axes.loglog([row["ranks"] for row in some], [1e3 / median(row["ms"][name]) for row in some], "o-", label=label)
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.minorticks_off()
    axes.set_xlabel("ranks, a block each")
    axes.set_ylabel("minibatches a second")
    axes.legend()
    figure.savefig(path)
