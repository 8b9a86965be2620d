"""A training method under test, and what its runs leave."""

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

# Numbers of ranks that are tried; those that a method refuses are left out.
RANKS = (1, 2, 3, 4, 5)
# The largest relative distance of weights that differ by rounding alone, in float64 after some steps.
ROUNDING = 1e-8
STEPS = 12


@dataclass
class Case:
    """A method under test: its name, and a folder for runs. options: of psmpi.train, for all of them."""

    name: str
    folder: Path
    options: tuple[str, ...] = ()
    runs: int = field(default=0, init=False)

    @property
    def method(self) -> type[Method]:
        return find_method(self.name)

    def words(self, *more: str) -> list[str]:
        """The options of a run: small minibatches in float64, and what the method declares."""
        fixed = ("--method", self.name, "--dtype", "float64", "--batch-size", "30", "--threads", "1", "--epochs", "3")
        return [*fixed, "--lr", "0.001", *self.method.exactness.options, *self.options, *more]

    def config(self, *more: str) -> Config:
        return usual(parse(self.words(*more)))

    def problem(self, *more: str) -> tuple[Network, Dataset, Config]:
        """Network, data and configuration of a run."""
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
        """Those of RANKS on which the method trains these options."""
        problem, counts = self.problem(), []
        for ranks in RANKS:
            with suppress(UserError):
                self.method.check(ranks, *problem)
                counts.append(ranks)
        return counts

    def run(self, ranks: int, *more: str, out: Path | None = None) -> Path:
        """The run directory of a training to its end."""
        self.runs += 1
        out = out or self.folder / f"{self.name}-{self.runs}"
        ended = self.end(ranks, *more, out=out)
        assert ended.status == 0, f"on {ranks} rank(s): {ended.stderr}"
        return out

    def end(self, ranks: int, *more: str, out: Path) -> Ended:
        return train(ranks, ["--out", str(out), *self.words(*more)], cwd=self.folder, timeout=120)


def tensors(path: Path, groups: Sequence[str] = ("weights", "optimizer", "elements", "rank")) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name, those of some groups."""
    tensors: dict[str, np.ndarray] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name.startswith(tuple(f"{group}/" for group in groups)):
            tensors[name] = item[...]

    with h5py.File(path) as file:
        file.visititems(keep)
    return tensors


def rows(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def compare(how: str, tolerance: float, one: Path, other: Path, what: str) -> None:
    """AssertionError unless the weights of two runs are as equal as `how` says, or their accuracies are."""
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
