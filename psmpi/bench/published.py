"""Accuracy under the published training protocol of partially separable losses, beside the published figures.

Protocol and figures: Raynaud, Orban, Bigeon, "Partially-separable loss to parallelize partitioned neural network
training", results of its Adam runs: Adam 1e-3, 50 epochs, samples in the file's order, no clipping, kappa = 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Literal

from rich.table import Table

from psmpi.errors import UserError
from psmpi.nn.losses import LOSSES
from psmpi.output import Screen, tell

EPOCHS = 50
PUBLISHED_RUNS = 10


@dataclass(frozen=True)
class Figure:
    """Test accuracy of the published runs, in %: mean and sample standard deviation over `PUBLISHED_RUNS`."""

    mean: float
    deviation: float

    def floor(self, runs: int) -> float:
        """The lower bound of the median of `runs` runs: three standard errors of the difference of means."""
        return self.mean - 3 * self.deviation * sqrt(1 / PUBLISHED_RUNS + 1 / runs)


@dataclass(frozen=True)
class Setting:
    """One data set, minibatch and loss; `figures` by the label of `read`."""

    dataset: str
    batch_size: int
    loss: str
    figures: dict[str, Figure]

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.batch_size}-{self.loss}"

    def arguments(self) -> list[str]:
        """Options of `psmpi.train` besides data, seed and run directory."""
        return [
            *("--dataset", self.dataset, "--batch-size", str(self.batch_size), "--model", "psnet", "--loss", self.loss),
            *(("--kappa", "2") if "kappa" in LOSSES[self.loss].settings else ()),
            *("--init-gain", "1", "--clip", "0", "--no-shuffle", "--optimizer", "adam", "--lr", "1e-3"),
            *("--epochs", str(EPOCHS)),
        ]


SETTINGS = tuple(
    Setting(dataset, batch_size, loss, {"10": Figure(*ten), "20": Figure(*twenty), "41-50": Figure(*plateau)})
    for dataset, batch_size, loss, ten, twenty, plateau in (
        ("mnist", 100, "psl", (94.90, 0.68), (97.30, 0.22), (98.09, 0.11)),
        ("mnist", 100, "nll", (96.83, 0.31), (97.86, 0.20), (98.31, 0.10)),
        ("mnist", 20, "psl", (95.50, 1.69), (97.64, 0.79), (98.54, 0.07)),
        ("mnist", 20, "nll", (97.95, 0.20), (98.39, 0.15), (98.58, 0.08)),
        ("cifar10", 100, "psl", (44.36, 1.20), (49.84, 0.91), (53.91, 0.49)),
        ("cifar10", 100, "nll", (46.92, 0.95), (52.28, 0.46), (56.64, 0.51)),
        ("cifar10", 20, "psl", (50.36, 0.65), (53.70, 0.43), (55.31, 0.34)),
        ("cifar10", 20, "nll", (52.13, 0.52), (56.08, 0.72), (59.00, 0.58)),
    )
)


def read(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """Test accuracy in % after epochs 10 and 20 and the median of epochs 41 to 50, as far as `rows` go."""
    accuracy = {int(row["epoch"]): 100 * row["test_accuracy"] for row in rows}
    plateau = [accuracy[epoch] for epoch in range(41, EPOCHS + 1) if epoch in accuracy]
    accuracies = {str(epoch): accuracy[epoch] for epoch in (10, 20) if epoch in accuracy}
    return {**accuracies, "41-50": median(plateau)} if len(plateau) == 10 else accuracies


def published(
    settings: tuple[
        Literal[
            "mnist-100-psl", "mnist-100-nll", "mnist-20-psl", "mnist-20-nll",
            "cifar10-100-psl", "cifar10-100-nll", "cifar10-20-psl", "cifar10-20-nll",
        ], ...,
    ] = ("mnist-100-psl", "mnist-100-nll"),
    data_dir: str = "data",
    out: str = "runs/published",
    seeds: int = 5,
    jobs: int = 1,
    report: bool = False,
) -> int:  # fmt: skip
    """Train with the published protocol, and compare the accuracies with the published ones.

    Interrupted runs are resumed. A figure passes if the median over the seeds is at most three standard errors below
    the published mean. The exit status is 1 if one fails.

    Args:
        settings: Data set, minibatch size and loss.
        data_dir: Folder of the data set's files.
        out: Folder of the runs.
        seeds: Runs of each setting, with seeds 0, 1, ...
        jobs: Runs at a time, each with one process and one thread.
        report: Train nothing, and report the existing runs.
    """
    for option, value in (("--seeds", seeds), ("--jobs", jobs)):
        if value < 1:
            raise UserError(f"{option} {value}: expected a whole number from 1 up")
    chosen = [setting for setting in SETTINGS if setting.name in settings]
    folders = {setting.name: [Path(out) / f"{setting.name}-{seed}" for seed in range(seeds)] for setting in chosen}
    if not report:
        # Seed by seed, so that what is done when somebody stops the command is spread over the settings.
        _train(
            [
                [*setting.arguments(), "--data-dir", data_dir, "--seed", str(seed), "--threads", "1",
                 "--checkpoint-keep", "1", "--resume", "auto", "--out", str(folders[setting.name][seed])]
                for seed in range(seeds) for setting in chosen
                if len(_rows(folders[setting.name][seed])) < EPOCHS
            ],
            jobs,
        )  # fmt: skip
    return _show({setting.name: [_rows(folder) for folder in folders[setting.name]] for setting in chosen})


def _rows(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _train(runs: Sequence[list[str]], jobs: int) -> None:
    """Run `psmpi.train` with each list of options, `jobs` at a time; UserError with the output of one that fails."""
    waiting = list(runs)
    running: list[tuple[Path, subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                options = waiting.pop(0)
                folder = Path(options[options.index("--out") + 1])
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / "output.txt").open("w") as output:
                    command = [sys.executable, "-m", "psmpi.train", *options]
                    running.append((folder, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)))
                tell(f"training {folder} ({len(waiting)} more to start)")
            time.sleep(0.2)
            for folder, process in list(running):
                if process.poll() is not None:
                    running.remove((folder, process))
                    if process.returncode:
                        said = (folder / "output.txt").read_text().strip()
                        raise UserError(f"the run in {folder} ended with exit status {process.returncode}:\n{said}")
    finally:
        for _, process in running:
            process.terminate()
            process.wait()


def _show(rows: dict[str, list[list[dict[str, float]]]]) -> int:
    """Print the table; returns 1 if a figure is below its floor, else 0."""
    table = Table(title="test accuracy, %", title_justify="left")
    for name in ("setting", "epoch", "runs", "median", "lowest", "highest", "published", "floor", ""):
        table.add_column(name, justify="left" if name in ("setting", "") else "right")
    failed = 0
    for setting in SETTINGS:
        runs = [read(run) for run in rows.get(setting.name, ())]
        for label, figure in setting.figures.items():
            values = [run[label] for run in runs if label in run]
            if values:
                floor = figure.floor(len(values))
                passed = median(values) >= floor
                failed += not passed
                table.add_row(
                    *(setting.name, label, str(len(values))),
                    *(f"{value:.2f}" for value in (median(values), min(values), max(values))),
                    *(f"{figure.mean:.2f} ± {figure.deviation:.2f}", f"{floor:.2f}", "passes" if passed else "FAILS"),
                )
    Screen().print(table)
    return 1 if failed else 0
