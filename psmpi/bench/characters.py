"""Train larger and larger networks of slabs that recognize characters, as Long and Gupta (2008) did."""

from __future__ import annotations

import json as jsonlib
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

from psmpi.bench.network import launcher, run_program
from psmpi.errors import UserError
from psmpi.output import Screen, check_files, tell


def characters(
    sides: tuple[int, ...] = (16, 32, 64, 128),
    variations: int = 0,
    ranks: int = 2,
    domains: int = 16,
    layers: int = 2,
    share: float = 0.5,
    halo: int = -1,
    epochs: int = 4,
    batch_size: int = 48,
    lr: float = 0.05,
    max_steps: int = 0,
    options: str = "",
    limit: int = 3600,
    plot: str = "",
    json: str = "",
) -> int:
    """Train networks of slabs on characters of rising resolution, with the method spann.

    Weights are stepped in place (--in-place). The published network had 2 billion weights on 1,000 processors, and
    identified all 48 characters.

    Args:
        sides: Sides of the images, in pixels.
        variations: Training images of each character; tests have half as many. 0: the number of --dataset characters.
        ranks: Number of ranks.
        domains: Domains of each layer.
        layers: Hidden layers.
        share: Neurons of a hidden layer for each pixel.
        halo: Halo of a domain, as in psmpi train.
        epochs: Passes over the training samples.
        batch_size: Samples of a minibatch.
        lr: Learning rate of sgd.
        max_steps: Largest number of steps. 0: no limit.
        options: Further options of psmpi train, in one word: --options="--activation relu".
        limit: Seconds after which a run is ended.
        plot: File for a plot of time and memory against weights: .png, .pdf or .svg. Needs psmpi[plot].
        json: File for the figures, in JSON.
    """
    for name, value in (("ranks", ranks), ("domains", domains), ("layers", layers), ("epochs", epochs)):
        if value < 1:
            raise UserError(f"--{name} {value}: expected a whole number from 1 up")
    check_files(plot, json=json)
    rows: list[dict[str, Any]] = []
    times = f"x{variations}" if variations else ""
    for side in sides:
        width = max(1, round(share * side * side / domains)) * domains
        words = ["--method", "spann", "--dataset", f"characters:{side}{times}", "--model", "slabs", "--loss", "nll"]
        words += ["--domains", str(domains), "--widths", *[str(width)] * layers, "--halo", str(halo)]
        words += ["--optimizer", "sgd", "--lr", str(lr), "--clip", "0", "--in-place", "--threads", "1"]
        words += ["--epochs", str(epochs), "--batch-size", str(batch_size), "--max-steps", str(max_steps)]
        row = _train(ranks, [*words, *options.split()], limit)
        rows.append({"side": side, "width": width, "seconds_per_step": batch_size / row.pop("rate"), **row})
        tell(
            f"{side} x {side}: {rows[-1]['weights']:,} weights, {rows[-1]['seconds_per_step']:.3g} s a step, "
            f"{100 * rows[-1]['accuracy']:.2f} % right"
        )
    _show(rows, ranks)
    if plot:
        _draw(rows, ranks, plot)
    if json:
        Path(json).write_text(jsonlib.dumps({"ranks": ranks, "domains": domains, "rows": rows}) + "\n")
    return 0


def _train(ranks: int, options: list[str], limit: int) -> dict[str, Any]:
    """Run one training, and return its figures."""
    from psmpi import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        program = [sys.executable, "-m", "psmpi.train", "--out", str(out), "--checkpoint-keep", "1", *options]
        run_program([launcher(), "-n", str(ranks), *program], limit=limit)
        metrics = [jsonlib.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        newest = checkpoint.newest(out)
        contents = checkpoint.read_contents(newest)
        held = contents.placement["ranks"]
        size = newest.stat().st_size
    last = metrics[-1]
    return {
        "weights": sum(prod(one.shape) for one in contents.layout.parameters),
        "rate": last["samples_per_second"],
        "steps": last["step"],
        "accuracy": last["test_accuracy"],
        "loss": last["train_loss"],
        "megabytes_held": max(rank[5] for rank in held) / 1e6,
        "megabytes_sent": max(last["bytes_sent_by_rank"]) / last["step"] / 1e6,
        "megabytes_saved": size / 1e6,
    }


def _show(rows: list[dict[str, Any]], ranks: int) -> None:
    from rich.table import Table

    table = Table(title=f"48 characters, {ranks} ranks", title_justify="left")
    names = ("pixels", "weights", "MB held by a rank", "MB saved", "MB sent a step", "steps", "s a step", "right %")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['side']} x {row['side']}", f"{row['weights']:,}", f"{row['megabytes_held']:,.1f}",
            f"{row['megabytes_saved']:,.1f}", f"{row['megabytes_sent']:.3g}", str(row["steps"]),
            f"{row['seconds_per_step']:.3g}", f"{100 * row['accuracy']:.2f}",
        )  # fmt: skip
    Screen().print(table)


def _draw(rows: list[dict[str, Any]], ranks: int, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    weights = [row["weights"] for row in rows]
    named = (("seconds_per_step", 1.0, "seconds a step"), ("megabytes_held", 1e3, "GB held by a rank"))
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), named, strict=True):
        axes.loglog(weights, [row[key] / unit for row in rows], "o-")
        for row in rows:
            words = f"{row['side']}\u00b2\n{100 * row['accuracy']:.1f} %"
            axes.annotate(words, (row["weights"], row[key] / unit), textcoords="offset points", xytext=(6, -14))
        axes.set_xlabel("weights")
        axes.set_ylabel(label)
        axes.margins(0.15)
    figure.suptitle(f"pixels and characters right, {ranks} ranks")
    figure.savefig(path)
