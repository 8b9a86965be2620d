"""A checkpoint that the tools read, after a check of the whole file."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from psmpi.checkpoint import Contents, newest, validate
from psmpi.checkpoint.contents import TABLES
from psmpi.checkpoint.format import HEADER, open_file
from psmpi.checkpoint.reader import find_tensor
from psmpi.checkpoint.selection import read_elements
from psmpi.checkpoint.tensors import Tensor
from psmpi.config import parse_toml
from psmpi.errors import DamagedError
from psmpi.nn.layers.pattern_file import brief

Checkpoint = Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
# Elements of a tensor that the tools read at a time.
SLAB = 1 << 20


class Opened:
    """A checked checkpoint: its contents, and access to one tensor at a time.

    path: checkpoint file, or run directory for its newest one. UserError if it is missing, DamagedError if damaged.
    """

    def __init__(self, path: Path):
        self.path = newest(path)
        self.contents: Contents = validate(self.path)
        self.tensors = {tensor.name: tensor for tensor in self.contents.tensors()}
        # Vectors with other tensors than those of the weights.
        self.spaces = {
            space: {tensor.name: tensor for tensor in self.contents.tensors(space)} for space in self.contents.spaces
        }
        with open_file(self.path) as file:
            self.vectors = ["weights", *file.get("optimizer", ())]
            # Shape and dtype of each table of elements and of ranks, and its path in the file. Files of earlier
            # versions have tables of ranks under /elements, without the table that identifies elements or samples.
            self.tables: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
            self.places: dict[str, str] = {}
            former = not {"classes", "remembered"} & set(file.get("elements", ()))
            for group in TABLES:
                for name, table in file.get(group, {}).items():
                    label = f"rank/{name}" if former else f"{group}/{name}"
                    self.tables[label], self.places[label] = (table.shape, table.dtype), table.name
            self.dtype: np.dtype = file[f"weights/{next(iter(self.tensors))}"].dtype
            self.dtypes: dict[str, np.dtype] = {
                f"{space}/{name}": file[f"{space}/{name}"].dtype for space, of in self.spaces.items() for name in of
            }

    @property
    def digest(self) -> str:
        """The SHA-256 of the content, from the header of the file (hex)."""
        with self.path.open("rb") as file:
            return file.read(HEADER).split()[-1].rstrip(b"\0").decode()

    def of(self, vector: str) -> dict[str, Tensor]:
        """Tensors by name of a vector: weights, a vector of the optimizer, or a space."""
        return self.spaces.get(vector, self.tensors)

    def dtype_of(self, vector: str, name: str) -> np.dtype:
        """The dtype of the tensor `name` of a vector."""
        return self.dtypes.get(f"{vector}/{name}", self.dtype)

    def read(self, vector: str, tensor: Tensor) -> np.ndarray:
        """Read a tensor of the weights or of a vector of the optimizer, in its shape."""
        values = np.empty(tensor.size, self.dtype)
        self.fill(vector, tensor.name, 0, values)
        return values.reshape(tensor.shape)

    def fill(self, vector: str, name: str, first: int, into: np.ndarray) -> None:
        """Fill `into` with elements of the flattened tensor `name`, from `first` on."""
        with open_file(self.path) as file:
            dataset = find_tensor(file, self.contents.group(vector), self.of(vector)[name], self.path)
            try:
                read_elements(dataset, first, first + len(into), into)
            except OSError as error:
                raise DamagedError(f"checkpoint {self.path}, {dataset.name}: {error}; the file is damaged") from None

    def slabs(self, vector: str, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first, elements) of a tensor in order; `elements`, a buffer, is valid until the next slab."""
        size = self.of(vector)[name].size
        buffer = np.empty(min(SLAB, size), self.dtype_of(vector, name))
        for first in range(0, size, SLAB):
            slab = buffer[: min(SLAB, size - first)]
            self.fill(vector, name, first, slab)
            yield first, slab

    def rows(self, table: str) -> Iterator[np.ndarray]:
        """Yield the rows of a table in pieces, flattened, in a buffer that is valid until the next piece."""
        shape, dtype = self.tables[table]
        width = prod(shape[1:])
        many = max(1, min(SLAB // max(1, width), shape[0]))
        buffer = np.empty((many, *shape[1:]), dtype)
        with open_file(self.path) as file:
            dataset = file[self.places[table]]
            for row in range(0, shape[0] if width else 0, many):
                some = buffer[: min(many, shape[0] - row)]
                try:
                    dataset.read_direct(some, np.s_[row : row + len(some)])
                except OSError as error:
                    raise DamagedError(f"checkpoint {self.path}, {dataset.name}: {error}; it is damaged") from None
                yield some.reshape(-1)

    def walk(self, vector: str) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Yield all tensors of the weights or a vector of the optimizer, with their values, in the network's order."""
        for tensor in self.tensors.values():
            yield tensor, self.read(vector, tensor)

    def settings(self) -> dict[str, Any]:
        """The configuration: values by section.name, with sparsity patterns abbreviated."""
        settings: dict[str, Any] = {}
        for section, table in parse_toml(self.contents.config).items():
            values = {f"{section}.{name}": value for name, value in table.items()} if isinstance(table, dict) else {}
            settings |= values or {section: table}
        return {name: brief(value) for name, value in settings.items()}

    def describe(self) -> dict[str, Any]:
        """File, step, epoch, accuracy and part, for JSON."""
        progress = self.contents.progress
        return {
            "file": str(self.path),
            "step": progress.step,
            "epoch": progress.epoch,
            "accuracy": progress.accuracy,
            "part": self.contents.part,
        }
