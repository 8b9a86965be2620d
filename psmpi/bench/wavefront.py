"""Compare steps of recurrent layers over several ranks with one rank, and with the ideal of the schedule."""

from __future__ import annotations

import json as jsonlib
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from psmpi.bench.network import launcher, run_program
from psmpi.errors import UserError
from psmpi.nn.sequences import chunks
from psmpi.output import Screen, check_files

SAMPLES = 4


def wavefront(
    ranks: tuple[int, ...] = (1, 2),
    kind: Literal["rnn", "gru", "lstm"] = "lstm",
    layers: int = 4,
    steps: int = 128,
    chunk_steps: int = 8,
    units: int = 256,
    batch_size: int = 64,
    skew: int = 1,
    sleep_ms: float = 0.0,
    rounds: int = 5,
    repeats: int = 3,
    limit: int = 600,
    plot: str = "",
    json: str = "",
) -> int:
    """Time training steps of --method wavefront on several numbers of ranks, in turn.

    A pass of M chunks over R ranks takes at least M + R - 1 times the time of a chunk on one rank. With --sleep-ms that
    time is known, and shown. Each rank needs a core, unless --sleep-ms replaces the computation.

    Args:
        ranks: Numbers of ranks; a run for each.
        kind: Kind of the recurrent layers.
        layers: Number of layers, shared by the ranks.
        steps: Steps of a sequence.
        chunk_steps: Steps of a chunk.
        units: Units of a layer, and features of the samples.
        batch_size: Samples of a minibatch.
        skew: Threads of a rank, each with some of its layers.
        sleep_ms: Additional sleep of a chunk in each rank's layers, each way, in ms. It stands for larger layers.
        rounds: Steps to time in a run.
        repeats: Runs of each number of ranks; the median of all their steps counts.
        limit: Seconds after which a run is ended.
        plot: File for a plot of speed-ups: .png, .pdf or .svg. Needs psmpi[plot].
        json: File for the figures, in JSON.
    """
    if not ranks or not all(1 <= n <= 250 for n in ranks):
        raise UserError(f"--ranks {' '.join(map(str, ranks))}: expected numbers from 1 to 250")
    for option, value in (("--layers", layers), ("--steps", steps), ("--chunk-steps", chunk_steps), ("--units", units),
                          ("--batch-size", batch_size), ("--skew", skew), ("--rounds", rounds), ("--repeats", repeats),
                          ("--limit", limit)):  # fmt: skip
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    if not 0 <= sleep_ms < 1e6:
        raise UserError(f"--sleep-ms {sleep_ms:g}: expected a number from 0 to 1e6")
    if sleep_ms and skew > 1:
        raise UserError(f"--skew {skew}: with --sleep-ms the times of a rank's one thread are known; leave it out")
    check_files(plot, json=json)
    times: dict[int, list[float]] = {count: [] for count in ranks}
    with tempfile.TemporaryDirectory() as folder:
        path, n = Path(folder) / "sequences.npz", SAMPLES * batch_size
        rng = np.random.default_rng(0)
        x = rng.standard_normal((n, steps, units), np.float32)
        y, lengths = np.arange(n) % 10, np.full(n, steps)
        np.savez(path, x=x, y=y, lengths=lengths, x_test=x[:10], y_test=y[:10], lengths_test=lengths[:10])
        given = ["--method", "wavefront", "--dataset", str(path), "--model", kind, "--widths", *[str(units)] * layers]
        given += ["--loss", "nll", "--threads", "1", "--batch-size", str(batch_size), "--chunk-steps", str(chunk_steps)]
        given += ["--skew", str(skew), "--clip", "0", "--rounds", str(rounds), "--sleep-ms", str(sleep_ms)]
        program = [*(["env", "PSMPI_WAIT=sleep"] if sleep_ms else []), sys.executable, "-m", "psmpi.bench.chunked"]
        for _ in range(repeats):
            for count in ranks:
                out = run_program([launcher(), "-n", str(count), *program, *given], limit=limit)
                times[count] += jsonlib.loads(out.splitlines()[-1])
    count = len(chunks(steps, chunk_steps))
    rows = [{"ranks": n, "chunks": count, "ms": seconds, "least ms": 2 * sleep_ms * (count + n - 1)}
            for n, seconds in times.items()]  # fmt: skip
    _show(rows, f"{layers} x {units} {kind}, {steps} steps in chunks of {chunk_steps}, {batch_size} samples")
    if plot:
        _draw(rows, plot)
    if json:
        Path(json).write_text(jsonlib.dumps(rows) + "\n")
    return 0


def ideal(ranks: int, count: int) -> float:
    """The ideal speed-up of `ranks` ranks with `count` chunks: they wait only at the first and the last chunk."""
    return ranks * count / (count + ranks - 1)


def _show(rows: list[dict[str, Any]], title: str) -> None:
    from rich.table import Table

    table = Table(title=f"ms a step, median (least to largest): {title}", title_justify="left")
    for name in ("ranks", "ms", "speed-up", "ideal", "chunk times", "off by %"):
        table.add_column(name, justify="right")
    first = rows[0]
    for row in rows:
        ms, least = median(row["ms"]), row["least ms"]
        speed = "" if least else f"{median(first['ms']) / ms:.2f}"
        of = "" if least else f"{ideal(row['ranks'], row['chunks']) / ideal(first['ranks'], first['chunks']):.2f}"
        table.add_row(
            str(row["ranks"]), f"{ms:.1f} ({min(row['ms']):.1f} to {max(row['ms']):.1f})", speed, of,
            f"{least:.0f}" if least else "", f"{100 * (ms / least - 1):+.1f}" if least else "",
        )  # fmt: skip
    Screen().print(table)


def _draw(rows: list[dict[str, Any]], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    counts = [row["ranks"] for row in rows]
    # With --sleep-ms each rank's work is the same on any number of ranks, so the total work grows with the ranks.
    scale = [row["ranks"] if row["least ms"] else 1 for row in rows]
    one = median(rows[0]["ms"]) * ideal(counts[0], rows[0]["chunks"]) / scale[0]
    axes.plot(counts, [one * s / median(row["ms"]) for row, s in zip(rows, scale, strict=True)], "o-", label="measured")
    axes.plot(counts, [ideal(row["ranks"], row["chunks"]) for row in rows], ":", label="M R / (M + R - 1)")
    axes.set_xlabel("ranks")
    axes.set_ylabel("speed-up")
    axes.legend()
    figure.savefig(path)
