"""Measure the time and the memory that psmpi.train needs to start with a network of very many classes."""

from __future__ import annotations

import json as jsonlib
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from psmpi.bench.network import launcher
from psmpi.errors import UserError
from psmpi.output import tell

# Samples of the data set and of a minibatch: few, since outputs have a number for each class and sample.
SAMPLES, BATCH = 100, 2
# The line that psmpi.train prints when all ranks are ready.
READY = re.compile(r"model custom: [\d,]+ parameters")


def start(
    classes: int = 1_000_000,
    features: int = 64,
    ranks: int = 1,
    method: Literal["psl", "data_parallel"] = "psl",
    repeats: int = 3,
    json: bool = False,
) -> int:
    """Measure the time until a training's first step, and the memory of its ranks.

    The network is one dense layer with a unit for each class, stepped by Adam. Times count from the launch of the
    program, imports included.

    Args:
        classes: Classes, and units of the layer.
        features: Features of a sample.
        ranks: Number of ranks. Several are started by mpirun.
        method: Method: psl, each rank owns the rows of its classes, or data_parallel, each rank holds all rows.
        repeats: Starts; the median counts.
        json: Print JSON.
    """
    for option, value, least in (("classes", classes, 2), ("features", features, 1), ("ranks", ranks, 1)):
        if value < least:
            raise UserError(f"--{option} {value}: expected a whole number from {least} up")
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: expected a whole number from 1 up")
    with tempfile.TemporaryDirectory() as folder:
        options = _prepare(Path(folder), classes, features, method)
        runs = [_run(Path(folder) / f"run{k}", ranks, options) for k in range(repeats)]
    figures: dict[str, Any] = {
        "classes": classes, "features": features, "ranks": ranks, "method": method,
        "ready_seconds": median(seconds for seconds, _ in runs), "ready_seconds_of_all": [s for s, _ in runs],
        "weights_megabytes": 4 * classes * (features + 1) / 1e6,
        "rank_megabytes": max(megabytes for _, megabytes in runs),
    }  # fmt: skip
    if json:
        tell(jsonlib.dumps(figures))
        return 0
    seconds = figures["ready_seconds_of_all"]
    tell(
        f"{classes:,} classes of {features} features, {method}, {ranks} rank(s)\n"
        f"ready for the first step after {figures['ready_seconds']:.1f} s ({min(seconds):.1f} to {max(seconds):.1f})\n"
        f"largest process to the end of training {figures['rank_megabytes']:,.0f} MB; the weights are "
        f"{figures['weights_megabytes']:,.0f} MB"
    )
    return 0


def _prepare(folder: Path, classes: int, features: int, method: str) -> list[str]:
    """Write a data set and a file with the layer; return the options of psmpi.train."""
    rng = np.random.default_rng(0)
    x, y = rng.random((SAMPLES, features), np.float32), np.linspace(0, classes - 1, SAMPLES).astype(np.int64)
    np.savez(folder / "samples.npz", x=x, y=y, x_test=x[:BATCH] / 2, y_test=y[:BATCH])
    layer = f'[model]\nmodel = "custom"\n\n[[model.layers]]\ntype = "dense"\nunits = {classes}\n'
    (folder / "layer.toml").write_text(layer)
    given = {"config": folder / "layer.toml", "dataset": folder / "samples.npz", "method": method, "loss": "nll",
             "batch-size": BATCH, "max-steps": 1, "threads": 1}  # fmt: skip
    options = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return [*options, *(["--colocate", "--placement", "owner"] if method == "psl" else [])]


def _run(out: Path, ranks: int, options: list[str]) -> tuple[float, float]:
    """Run a training; return the seconds until it is ready, and the MB of the largest child process so far."""
    program = [sys.executable, "-m", "psmpi.train", "--out", str(out), *options]
    command = program if ranks == 1 else [launcher(), "-n", str(ranks), *program]
    began, ready, said = time.perf_counter(), 0.0, []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            ready = ready or (time.perf_counter() - began if READY.search(line) else 0.0)
    if process.returncode or not ready:
        raise UserError(f"{' '.join(command)} failed: {''.join(said[-5:]).strip()}")
    return ready, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
