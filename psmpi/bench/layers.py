"""Compare passes through many residual layers by multigrid in layer time with exact passes and the cost model."""

from __future__ import annotations

import json as jsonlib
import sys
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from psmpi.bench.network import launcher, run_program
from psmpi.errors import UserError
from psmpi.methods.layer_parallel.cycle import evaluations
from psmpi.output import Screen, check_files


def layers(
    ranks: tuple[int, ...] = (1, 2),
    coarsening: tuple[int, ...] = (4,),
    depth: int = 64,
    levels: int = 2,
    relaxations: int = 1,
    forward_cycles: int = 2,
    adjoint_cycles: int = 1,
    width: int = 512,
    batch_size: int = 256,
    sleep_ms: float = 0.0,
    rounds: int = 5,
    limit: int = 600,
    plot: str = "",
    json: str = "",
) -> int:
    """Time passes of --method layer_parallel and exact passes, and compare both with the cost model.

    The model counts the evaluations of layers that follow one another, and takes the mean time of one in the same pass.
    Each rank needs a core, unless --sleep-ms replaces the computation.

    Args:
        ranks: Numbers of ranks; a run for each.
        coarsening: Layers of a level for each layer of the next level; a run for each number.
        depth: Residual layers.
        levels: Levels of the multigrid.
        relaxations: C-relaxations of a cycle.
        forward_cycles: Cycles of a forward pass.
        adjoint_cycles: Cycles of an adjoint pass.
        width: Units of a layer.
        batch_size: Samples of a minibatch.
        sleep_ms: Additional sleep of each evaluation of a layer, in ms. It stands for a larger layer.
        rounds: Measurements of each pass; the median counts.
        limit: Seconds after which a run is ended.
        plot: File for a plot of speed-ups: .png, .pdf or .svg. Needs psmpi[plot].
        json: File for the figures, in JSON.
    """
    if not ranks or not all(1 <= n <= 250 for n in ranks):
        raise UserError(f"--ranks {' '.join(map(str, ranks))}: expected numbers from 1 to 250")
    for option, value in (("--rounds", rounds), ("--limit", limit), ("--width", width), ("--batch-size", batch_size)):
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    if not 0 <= sleep_ms < 1e6:
        raise UserError(f"--sleep-ms {sleep_ms:g}: expected a number from 0 to 1e6")
    check_files(plot, json=json)
    rows: list[dict[str, Any]] = []
    for factor, count in product(coarsening, ranks):
        given = ["--method", "layer_parallel", "--model", "deep", "--widths", str(width), "--depth", str(depth)]
        given += ["--batch-size", str(batch_size), "--threads", "1", "--loss", "nll", "--levels", str(levels)]
        given += ["--coarsening", str(factor), "--relaxations", str(relaxations)]
        given += ["--forward-cycles", str(forward_cycles), "--adjoint-cycles", str(adjoint_cycles)]
        program = [sys.executable, "-m", "psmpi.bench.marched", *given, "--rounds", str(rounds)]
        program += ["--sleep-ms", str(sleep_ms)]
        program = [*(["env", "PSMPI_WAIT=sleep"] if sleep_ms else []), *program]
        times = jsonlib.loads(run_program([launcher(), "-n", str(count), *program], limit=limit).splitlines()[-1])
        shape, factors = (depth, count), (factor,) * (levels - 1)
        row: dict[str, Any] = {"ranks": count, "coarsening": factor, "ms": times}
        for place, (name, cycles) in enumerate((("forward", forward_cycles), ("adjoint", adjoint_cycles)), 1):
            steps = evaluations(*shape, factors, relaxations, cycles)
            # The adjoint evaluates the layers at the ends of intervals once more, for their derivatives.
            more = depth // count // factor if name == "adjoint" and factors else 0
            model = [steps * one[place] + more * one[1] for one in times[f"parallel {name}"]]
            measured, exact = ([one[0] for one in times[f"{how} {name}"]] for how in ("parallel", "exact"))
            row[name] = {"evaluations": steps, "model": median(model), "measured": median(measured)}
            row[name]["exact"] = median(exact)
        rows.append(row)
    _show(rows, depth)
    if plot:
        _draw(rows, plot)
    if json:
        Path(json).write_text(jsonlib.dumps({"options": given, "rows": rows}) + "\n")
    return 0


def _show(rows: list[dict[str, Any]], depth: int) -> None:
    from rich.table import Table

    table = Table(title=f"{depth} layers, ms a pass", title_justify="left")
    for name in ("ranks", "coarsening", "pass", "evaluations", "model", "measured", "off by %", "exact", "speed-up"):
        table.add_column(name, justify="right")
    for row in rows:
        for name in ("forward", "adjoint"):
            one = row[name]
            table.add_row(
                str(row["ranks"]), str(row["coarsening"]), name, str(one["evaluations"]), f"{one['model']:.1f}",
                f"{one['measured']:.1f}", f"{100 * (one['measured'] / one['model'] - 1):+.1f}", f"{one['exact']:.1f}",
                f"{one['exact'] / one['measured']:.2f}",
            )  # fmt: skip
    Screen().print(table)


def _draw(rows: list[dict[str, Any]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for factor, name in product(dict.fromkeys(row["coarsening"] for row in rows), ("forward", "adjoint")):
        some = sorted((row for row in rows if row["coarsening"] == factor), key=lambda row: row["ranks"])
        counts = [row["ranks"] for row in some]
        (line,) = axes.loglog(
            counts, [row[name]["exact"] / row[name]["measured"] for row in some], "o-", base=2,
            label=f"{name}, coarsening {factor}",
        )  # fmt: skip
        model = [row[name]["exact"] / row[name]["model"] for row in some]
        axes.loglog(counts, model, ":", base=2, color=line.get_color())
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set_xlabel("ranks")
    axes.set_ylabel("speed-up of a pass (dotted: cost model)")
    axes.legend()
    figure.savefig(path)
