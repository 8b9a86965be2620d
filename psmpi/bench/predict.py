"""Compare predictions of the cost model with measured steps, on this machine and on hosts with slow links."""

from __future__ import annotations

import json as jsonlib
import shlex
import sys
from pathlib import Path
from typing import Any

from psmpi.bench.hosts import check_hosts, slow_hosts, wrapper
from psmpi.bench.network import VARIANTS, Variant, launcher, run_program
from psmpi.errors import UserError, counted
from psmpi.output import Screen, check_files, tell

# A small burst, so that short messages have the same rate as long ones, as the cost model assumes.
BURST = "8kb"


def predict(
    methods: tuple[Variant, ...] = ("psl", "psl-owner", "data_parallel", "powersgd", "local_sgd", "dfa", "ist", "sil"),
    ranks: int = 2,
    rates: tuple[float, ...] = (0.0, 1000.0, 100.0),
    delay_ms: float = 0.0,
    dataset: str = "digits",
    data_dir: str = "",
    model: str = "psnet",
    options: str = "",
    sleep_ms: float = 0.0,
    limit: int = 600,
    json: str = "",
) -> int:
    """Predict the time of a step of several methods, and measure it, three times in turn.

    A prediction rehearses the computation of each rank without the others, and times messages between two ranks for the
    links. Each rank needs a core, unless --sleep-ms replaces the computation.

    Args:
        methods: Methods, as in psmpi bench network.
        ranks: Ranks of each run.
        rates: Bandwidths of each host's link in Mbit/s, 0 for this machine as it is. Others need root, iproute2 and
            MPICH.
        delay_ms: Additional latency of messages between hosts, in ms.
        dataset: Data set, as in psmpi train.
        data_dir: Folder of the data set's files.
        model: Network, as in psmpi train.
        options: Further options of psmpi train for all methods, in one word: --options="--batch-size 100".
        sleep_ms: Additional sleep of each pass through layers, in ms. It stands for larger layers.
        limit: Seconds after which a run is ended.
        json: File for the figures, in JSON.
    """
    if not 2 <= ranks <= 250:
        raise UserError(f"--ranks {ranks}: expected 2 to 250")
    check_hosts(rates, delay_ms)
    check_files(json=json)
    if not 0 <= sleep_ms < 1e6:
        raise UserError(f"--sleep-ms {sleep_ms:g}: expected a number from 0 to 1e6")
    dataset = str(Path(dataset).absolute()) if Path(dataset).is_file() else dataset
    given = ["--dataset", dataset, "--model", model, "--threads", "1", *shlex.split(options)]
    given += ["--data-dir", str(Path(data_dir).absolute())] if data_dir else []
    rows: list[dict[str, Any]] = []
    for rate in rates:
        with slow_hosts(ranks, rate, BURST, delay_ms) as hosts:
            before = wrapper(hosts) if hosts else []
            for name in methods:
                program = [
                    sys.executable,
                    "-m",
                    "psmpi.bench.rehearsed",
                    *given,
                    *VARIANTS[name],
                    "--sleep-ms",
                    str(sleep_ms),
                ]
                # Ranks that sleep should also sleep while they wait: ranks on simulated hosts do not know that they
                # share cores.
                program = [*(["env", "PSMPI_WAIT=sleep"] if sleep_ms else []), *program]
                out = run_program([launcher(), "-n", str(ranks), *before, *program], bool(hosts), limit)
                figures = jsonlib.loads(out.splitlines()[-1])
                rows.append({"method": name, "megabits": rate, **figures})
                row = rows[-1]
                row["ratio"] = sum(row["predicted_ms"]) / sum(row["measured_ms"])
                tell(_line(row))
    _show(rows, ranks)
    if json:
        Path(json).write_text(jsonlib.dumps({"options": given, "ranks": ranks, "rows": rows}) + "\n")
    return 0


def rate_name(megabits: float) -> str:
    """The rate of a link as text; 0 means no limit."""
    return f"{megabits:g} Mbit/s" if megabits else "unlimited"


def _line(row: dict[str, Any]) -> str:
    predicted, measured = (" ".join(f"{one:.2f}" for one in row[key]) for key in ("predicted_ms", "measured_ms"))
    link = rate_name(row["megabits"])
    return f"{row['method']}, {link}: predicted {predicted}, measured {measured} ms, ratio {row['ratio']:.3f}"


def _show(rows: list[dict[str, Any]], ranks: int) -> None:
    from rich.table import Table

    table = Table(title=f"{counted(ranks, 'rank')}, ms a step, means of 3", title_justify="left")
    table.add_column("method")
    for name in ("link", "computing", "predicted", "measured", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        means = (sum(row[key]) / len(row[key]) for key in ("computing_ms", "predicted_ms", "measured_ms"))
        table.add_row(
            row["method"], rate_name(row["megabits"]), *(f"{mean:.2f}" for mean in means), f"{row['ratio']:.3f}"
        )
    Screen().print(table)
