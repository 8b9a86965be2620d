"""A training method under test, and readers of the checkpoints and metrics of its runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psmpi.checkpoint import newest
from psmpi.config import Config
from psmpi.data import Dataset, open_dataset
from psmpi.errors import UserError
from psmpi.nn.network import Network
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.testing.program import Ended, train
from psmpi.train import parse
from psmpi.training.method import Method
from psmpi.training.usual import usual

# Numbers of ranks to try. `Case.ranks` leaves out those that the method refuses.
RANKS = (1, 2, 3, 4, 5)
# Largest relative distance in the 2-norm of float64 weights that differ only by rounding, after STEPS steps.
ROUNDING = 1e-8
STEPS = 12


@dataclass
class Case:
    """A method under test.

    name: the registered name of the method. folder: where its runs write. options: options of psmpi.train that are
    added to every run.
    """

    name: str
    folder: Path
    options: tuple[str, ...] = ()
    runs: int = field(default=0, init=False)

    @property
    def method(self) -> type[Method]:
        return find_method(self.name)

    def words(self, *more: str) -> list[str]:
        """The options of a run: small minibatches, float64, the options of the method's `exactness`, then `more`."""
        fixed = ("--method", self.name, "--dtype", "float64", "--batch-size", "30", "--threads", "1", "--epochs", "3")
        return [*fixed, "--lr", "0.001", *self.method.exactness.options, *self.options, *more]

    def config(self, *more: str) -> Config:
        return usual(parse(self.words(*more)))

    def problem(self, *more: str) -> tuple[Network, Dataset, Config]:
        """Network, data set and configuration of a run."""
        config = self.config(*more)
        dataset = open_dataset(*config.data.source).for_training()
        return (
            make_network(
                config.model.model,
                dataset.shape,
                dataset.outputs,
                **config.model.shape,
                by_step=dataset.train.by_step,
                task=dataset.task,
            ),
            dataset,
            config,
        )

    @cached_property
    def ranks(self) -> list[int]:
        """The numbers in RANKS that the method accepts with the options of this case."""
        problem, counts = self.problem(), []
        for ranks in RANKS:
            with suppress(UserError):
                self.method.check(ranks, *problem)
                counts.append(ranks)
        return counts

    def run(self, ranks: int, *more: str, out: Path | None = None) -> Path:
        """Train to the end and return the run directory. AssertionError if the exit status is not 0."""
        self.runs += 1
        out = out or self.folder / f"{self.name}-{self.runs}"
        ended = self.end(ranks, *more, out=out)
        assert ended.status == 0, f"on {ranks} rank(s): {ended.stderr}"
        return out

    def end(self, ranks: int, *more: str, out: Path) -> Ended:
        return train(ranks, ["--out", str(out), *self.words(*more)], cwd=self.folder, timeout=120)


def tensors(path: Path, groups: Sequence[str] = ("weights", "optimizer", "elements", "rank")) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint that belong to `groups`, by their names in the file."""
    tensors: dict[str, np.ndarray] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name.startswith(tuple(f"{group}/" for group in groups)):
            tensors[name] = item[...]

    with h5py.File(path) as file:
        file.visititems(keep)
    return tensors


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a run, in the order in which they were written."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def compare(how: str, tolerance: float, one: Path, other: Path, what: str) -> None:
    """Raise AssertionError unless the newest checkpoints of two runs agree.

    how: "exact" (equal weights), "statistical" (test accuracies that differ by at most `tolerance`), or else rounding
    (weights within ROUNDING of each other). what: the name of the comparison in the message.
    """
    if how == "statistical":
        accuracies = [rows(out)[-1]["test_accuracy"] for out in (one, other)]
        assert abs(accuracies[0] - accuracies[1]) <= tolerance, f"{what}: accuracies {accuracies}"
        return
    first, second = tensors(newest(one), ("weights",)), tensors(newest(other), ("weights",))
    for name, tensor in first.items():
        if how == "exact":
            assert np.array_equal(tensor, second[name]), f"{what}: {name} differs"
        else:
            distance = np.linalg.norm(tensor - second[name]) / max(1e-300, float(np.linalg.norm(tensor)))
            assert distance <= ROUNDING, f"{what}: {name} differs by {distance:.1e}"
