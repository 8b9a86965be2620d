"""Measure time, bytes and memory of training steps on grids of ranks, on this machine and on hosts with slow links."""

from __future__ import annotations

import json as jsonlib
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from psmpi.bench.hosts import check_hosts, slow_hosts, wrapper
from psmpi.bench.network import launcher, run_program
from psmpi.errors import UserError
from psmpi.output import Screen, check_files

# Number of minibatches in the data set of a run.
MINIBATCHES = 4


def tensor(
    ranks: int = 4,
    grids: tuple[str, ...] = ("1d", "1d-sharded", "2d", "auto"),
    rates: tuple[float, ...] = (0.0,),
    model: Literal["mlp", "transformer"] = "mlp",
    width: int = 512,
    layers: int = 4,
    steps: int = 64,
    batch_size: int = 256,
    saved: Literal["shards", "gathered"] = "shards",
    rounds: int = 5,
    limit: int = 900,
    plot: str = "",
    json: str = "",
) -> int:
    """Time training steps of --method tensor on several grids, with and without prefetching in turn.

    Args:
        ranks: Number of ranks, each a host of its own where the rate is limited.
        grids: Grids, as --grid of psmpi train; a run for each.
        rates: Bandwidths of each host's link in Mbit/s, 0 for this machine as it is. Others need root, iproute2 and
            MPICH.
        model: Dense layers of one width, or a transformer on sequences of random tokens.
        width: Units of a layer; the transformer's hidden layers have four times as many.
        layers: Dense layers before the scores, or blocks of the transformer.
        steps: Steps of a sequence.
        batch_size: Samples, or sequences, of a minibatch.
        saved: Tensors that passes keep, as in psmpi train.
        rounds: Steps to time; the median counts.
        limit: Seconds after which a run is ended.
        plot: File for a plot of bytes and times: .png, .pdf or .svg. Needs psmpi[plot].
        json: File for the figures, in JSON.
    """
    for option, value in (("--ranks", ranks), ("--width", width), ("--layers", layers), ("--steps", steps),
                          ("--batch-size", batch_size), ("--rounds", rounds), ("--limit", limit)):  # fmt: skip
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    if not grids:
        raise UserError("--grids: expected one or more of 1d, 1d-sharded, 2d, 3d, auto, or I,J,L")
    check_hosts(rates, 0.0)
    check_files(plot, json=json)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        given = _problem(Path(folder), model, width, layers, steps, batch_size)
        given += ["--loss", "nll", "--threads", "1", "--batch-size", str(batch_size), "--saved", saved, "--clip", "0"]
        for rate in rates:
            with slow_hosts(ranks, rate) as hosts:
                for grid in grids:
                    program = [*(wrapper(hosts) if hosts else []), sys.executable, "-m", "psmpi.bench.tiled"]
                    program += ["--method", "tensor", "--grid", grid, *given, "--rounds", str(rounds)]
                    out = run_program([launcher(), "-n", str(ranks), *program], bool(hosts), limit)
                    rows.append({"name": grid, "megabits": rate, **jsonlib.loads(out.splitlines()[-1])})
    _show(rows, f"{ranks} ranks, {model} of {layers} x {width}, {batch_size} samples")
    if plot:
        _draw(rows, plot)
    if json:
        Path(json).write_text(jsonlib.dumps({"options": given, "ranks": ranks, "rows": rows}) + "\n")
    return 0


def _problem(folder: Path, model: str, width: int, layers: int, steps: int, batch: int) -> list[str]:
    """Write random data; return the options of psmpi.train for the data and the network."""
    rng, n = np.random.default_rng(0), MINIBATCHES * batch
    if model == "mlp":
        x, y = rng.standard_normal((n, width), np.float32), np.arange(n) % min(width, n // 2)
        np.savez(folder / "samples.npz", x=x, y=y, x_test=x[: n // 4], y_test=y[: n // 4])
        return ["--dataset", str(folder / "samples.npz"), "--model", "mlp", "--widths", *[str(width)] * layers]
    # Random text of 64 characters. psmpi takes a tenth of it for tests.
    count = steps * n * 10 // 9 + 20 * steps
    text = rng.integers(0, 64, count).astype(np.uint8) + np.uint8(48)
    text[:64] = np.arange(48, 112)
    (folder / "text.txt").write_bytes(text.tobytes())
    heads = next(heads for heads in (16, 8, 4, 2, 1) if width % heads == 0)
    sizes = ["--widths", str(width), str(4 * width), "--blocks", str(layers), "--heads", str(heads)]
    return ["--dataset", str(folder / "text.txt"), "--model", "transformer", *sizes, "--context", str(steps)]


def _show(rows: list[dict[str, Any]], title: str) -> None:
    from rich.table import Table

    table = Table(title=f"a step, medians: {title}", title_justify="left")
    for name in (
        "--grid",
        "ranks",
        "Mbit/s",
        "ms",
        "ms in turn",
        "ratio",
        "MB received by a rank",
        "MB kept",
        "MB held",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        ms = {name: median(times) for name, times in row["ms"].items()}
        ratios = [a / b for a, b in zip(row["ms"]["prefetched"], row["ms"]["in turn"], strict=True)]
        table.add_row(
            row["name"], " x ".join(map(str, row["grid"])), f"{row['megabits']:g}" if row["megabits"] else "unlimited",
            f"{ms['prefetched']:.1f}", f"{ms['in turn']:.1f}",
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", f"{row['received'] / 1e6:.2f}",
            f"{row['kept'] / 1e6:.2f}", f"{row['held'] / 1e6:.2f}",
        )  # fmt: skip
    Screen().print(table)


def _draw(rows: list[dict[str, Any]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = list(dict.fromkeys(row["megabits"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    first = [next(row for row in rows if row["name"] == name) for name in names]
    left.bar(names, [row["received"] / 1e6 for row in first])
    left.set_ylabel("MB that a rank receives in a step")
    wide = 0.8 / len(rates)
    for k, rate in enumerate(rates):
        some = [row for row in rows if row["megabits"] == rate]
        places = np.arange(len(some)) + k * wide
        right.bar(places, [median(row["ms"]["prefetched"]) for row in some], wide,
                  label=f"{rate:g} Mbit/s" if rate else "one host")  # fmt: skip
    right.set_xticks(np.arange(len(names)) + wide * (len(rates) - 1) / 2, names)
    right.set_yscale("log")
    right.set_ylabel("ms a step")
    right.legend()
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=30)
    figure.savefig(path)
