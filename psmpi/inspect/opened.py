"""A checkpoint opened for reading by the tools, checked whole first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from psmpi.checkpoint import Contents, newest, validate
from psmpi.checkpoint.format import HEADER, Tensor, open_file, table_path
from psmpi.checkpoint.reader import find_tensor, read_elements
from psmpi.config import tomllib
from psmpi.errors import DamagedError

# Elements that the tools hold of a tensor at a time.
SLAB = 1 << 20


class Opened:
    """What a checkpoint says of itself, and its tensors one at a time. UserError where it is missing or damaged."""

    def __init__(self, path: Path):
        self.path = newest(path)
        self.contents: Contents = validate(self.path)
        self.tensors = {tensor.name: tensor for tensor in self.contents.tensors()}
        with open_file(self.path) as file:
            self.vectors = ["weights", *file.get("optimizer", ())]
            # What is remembered of elements: shape and dtype by name.
            self.tables = {name: (table.shape, table.dtype) for name, table in file.get("elements", {}).items()}
            self.dtype: np.dtype = file[f"weights/{next(iter(self.tensors))}"].dtype

    @property
    def digest(self) -> str:
        """The SHA-256 in the header, which is that of the content."""
        with self.path.open("rb") as file:
            return file.read(HEADER).split()[-1].rstrip(b"\0").decode()

    def read(self, vector: str, tensor: Tensor) -> np.ndarray:
        """A tensor of `weights` or of a vector of the optimizer."""
        values = np.empty(tensor.size, self.dtype)
        self.fill(vector, tensor.name, 0, values)
        return values.reshape(tensor.shape)

    def fill(self, vector: str, name: str, first: int, into: np.ndarray) -> None:
        """Elements of the flattened tensor `name`, from `first` on."""
        with open_file(self.path) as file:
            dataset = find_tensor(file, vector, self.tensors[name], self.path)
            try:
                read_elements(dataset, first, first + len(into), into)
            except OSError as error:
                raise DamagedError(f"checkpoint {self.path}, {dataset.name}: {error}; the file is damaged") from None

    def slabs(self, vector: str, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The elements of a tensor in order: the first one's number and some, in a buffer that is used again."""
        size = self.tensors[name].size
        buffer = np.empty(min(SLAB, size), self.dtype)
        for first in range(0, size, SLAB):
            slab = buffer[: min(SLAB, size - first)]
            self.fill(vector, name, first, slab)
            yield first, slab

    def rows(self, table: str) -> Iterator[np.ndarray]:
        """A table of elements, a row at a time and flat, in a buffer that is used again."""
        shape, dtype = self.tables[table]
        buffer = np.empty((1, *shape[1:]), dtype)
        with open_file(self.path) as file:
            dataset = file[table_path(table)]
            for row in range(shape[0]):
                try:
                    dataset.read_direct(buffer, np.s_[row : row + 1])
                except OSError as error:
                    raise DamagedError(f"checkpoint {self.path}, {dataset.name}: {error}; it is damaged") from None
                yield buffer.reshape(-1)

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
