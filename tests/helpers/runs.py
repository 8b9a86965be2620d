"""Run psmpi's programs on ranks that are threads, and read the results of trainings."""

import json

import numpy as np
import pytest

from helpers.processes import launch
from psmpi.config import Config, from_table
from psmpi.testing import run_program
from psmpi.testing.conformance import tensors


def run(ranks, option, module, *arguments, timeout=120, cwd=None):
    """Run `mpirun -n ranks python -m module arguments` on threads; return (status, stdout, stderr)."""
    assert option == "-m"
    result = run_program(ranks, module, arguments, timeout=timeout, cwd=cwd)
    return result.status, result.stdout, result.stderr


class Trained:
    """A finished run directory."""

    def __init__(self, out, stdout):
        self.out, self.stdout = out, stdout
        self.checkpoint = max((out / "checkpoints").glob("step-*.h5"))
        self.rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def tensors(self):
        """Weights, optimizer vectors and tables by name."""
        return tensors(self.checkpoint)


# Default options of trainings in tests.
NUMBERS = {"--epochs": "10", "--batch-size": "100", "--lr": "0.001"}


def default_options(options):
    """The options of NUMBERS that are not among `options`; none with --config or --resume."""
    if {"--config", "--resume"} & set(map(str, options)):
        return []
    return [word for name, number in NUMBERS.items() if name not in options for word in (name, number)]


def usual_config():
    """The default configuration with NUMBERS."""
    numbers = {"run": {"epochs": 10}, "data": {"batch_size": 100}, "optimization": {"lr": 0.001}}
    return from_table(numbers, Config(), "tests")


def trainer(folder, launcher=run):
    """Return train(ranks, *options): run psmpi.train by `launcher`, `run` or `launch`, and return a `Trained`."""
    count = iter(range(1000))

    def call(ranks, *options, out=None, timeout=120):
        out = out or folder / f"{launcher.__name__}{next(count)}"
        status, stdout, stderr = launcher(
            ranks, "-m", "psmpi.train", "--out", out, *default_options(options), *options, timeout=timeout, cwd=folder
        )
        assert status == 0, stderr + stdout
        return Trained(out, stdout)

    return call


def once(folder, *fixed):
    """Return serial(*options): train on one rank with `fixed` and `options`, once for each `options`."""
    trainings, train = {}, trainer(folder)

    def call(*options):
        if options not in trainings:
            trainings[options] = train(1, *fixed, *options)
        return trainings[options]

    return call


def distance(first, second):
    """The largest relative distance (2-norm) between tensors of the same name."""
    assert first.keys() == second.keys()
    return max(float(np.linalg.norm(first[k] - second[k])) / max(1e-300, np.linalg.norm(first[k])) for k in first)


__all__ = ["Trained", "distance", "launch", "once", "run", "trainer", "usual_config"]


def save_many(folder):
    """Write a data set of 37 classes; return the options of a training of a head on it, in float64."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(150, 6)), np.arange(150) % 37
    np.savez(folder / "data.npz", x=x, y=y, x_test=x[:60] + 0.1, y_test=y[:60])
    numbers = ("--epochs", "3", "--batch-size", "50", "--lr", "0.01", "--dtype", "float64")
    return ("--dataset", folder / "data.npz", "--model", "head", "--widths", "9", *numbers)


def same_run(first, second):
    """Whether two runs end with the same weights, losses and scores, up to rounding."""
    keys = ("train_loss", "test_loss", "test_accuracy", "test_top5")
    equal = all(second.rows[-1][key] == pytest.approx(first.rows[-1][key], rel=1e-10) for key in keys)
    return equal and distance(first.tensors(), second.tensors()) <= 1e-10
