"""A checkpoint opened for reading by the tools, checked whole first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from psmpi.checkpoint import Contents, check, newest, read_contents
from psmpi.checkpoint.format import Tensor, open_file
from psmpi.checkpoint.reader import find_tensor, read_elements
from psmpi.config import tomllib
from psmpi.errors import UserError


class Opened:
    """What a checkpoint says of itself, and its tensors one at a time. UserError where it is missing or damaged."""

    def __init__(self, path: Path):
        self.path = newest(path)
        check(self.path)
        self.contents: Contents = read_contents(self.path)
        self.tensors = {tensor.name: tensor for tensor in self.contents.tensors()}
        with open_file(self.path) as file:
            self.vectors = [name for name in ("weights",) if name in file] + list(file.get("optimizer", ()))
            found = [find_tensor(file, v, t, self.path) for v in self.vectors for t in self.tensors.values()]
            if "weights" not in self.vectors or not found:
                raise UserError(f"checkpoint {self.path} has no weights; use another one")
            self.dtype: np.dtype = found[0].dtype

    def read(self, vector: str, tensor: Tensor) -> np.ndarray:
        """A tensor of `weights` or of a vector of the optimizer."""
        with open_file(self.path) as file:
            return np.asarray(find_tensor(file, vector, tensor, self.path)[...])

    def fill(self, vector: str, name: str, first: int, into: np.ndarray) -> None:
        """Elements of the flattened tensor `name`, from `first` on."""
        with open_file(self.path) as file:
            dataset = find_tensor(file, vector, self.tensors[name], self.path)
            read_elements(dataset, first, first + len(into), into)

    def walk(self, vector: str) -> Iterator[tuple[Tensor, np.ndarray]]:
        """All tensors of a vector, in the network's order."""
        for tensor in self.tensors.values():
            yield tensor, self.read(vector, tensor)

    def settings(self) -> dict[str, Any]:
        """The configuration: `section.name` to value."""
        tables = tomllib.loads(self.contents.config)
        return {f"{section}.{name}": value for section, table in tables.items() for name, value in table.items()}

    def describe(self) -> dict[str, Any]:
        """Step, epoch and score."""
        progress = self.contents.progress
        return {
            "file": str(self.path),
            "step": progress.step,
            "epoch": progress.epoch,
            "accuracy": progress.accuracy,
            "part": self.contents.part,
        }
