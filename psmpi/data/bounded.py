"""Samples of which only some are kept in memory: the others are read from their file for each minibatch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.backend import NumpyOps
from psmpi.data.compressed_rows import CompressedRows
from psmpi.data.rows import ArrayRows, Concatenated, RowSource, StreamRows
from psmpi.data.split import Dataset
from psmpi.errors import UserError

UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)

Read = Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]


def bytes_of(text: str) -> int:
    """A size for people, "500M" or "1.5 GB", as bytes, units being powers of 1024. UserError for none."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * (1 << UNITS[found[2].lower()])) if found else -1
    if size < 0:
        raise UserError(f"--data-memory {text}: expected a size in bytes, as 500M or 2G")
    return size


def with_memory(dataset: Dataset, size: int) -> Dataset:
    """A data set of whose samples a process keeps `size` bytes at most, of each split by the number of its samples.

    UserError for samples that are not read by rows: sequences, and what is held in memory or packed as a stream.
    """
    for split in (dataset.train, dataset.test):
        if split.steps:
            raise UserError("--data-memory is for samples of one shape, and these are sequences: leave it out")
        if not _by_rows(split.source):
            raise UserError(
                f"--data-memory: {dataset.name} is not read by rows: save its samples as .npy or HDF5, or as .npz "
                "without compression (np.savez)"
            )
    shares = np.array([dataset.train.n, dataset.test.n]) / (dataset.train.n + dataset.test.n)
    train, test = (
        replace(split, memory=int(size * share))
        for split, share in zip((dataset.train, dataset.test), shares, strict=True)
    )
    return replace(dataset, train=train, test=test)


def _by_rows(source: RowSource) -> bool:
    if isinstance(source, Concatenated):
        return all(map(_by_rows, source.parts))
    return not isinstance(source, ArrayRows | CompressedRows | StreamRows)


class BoundedSamples:
    """Samples of which minibatches are taken, multiplied by a scale: to the bit as those of `psmpi.backend.Samples`.

    kept: (k, features), the first ones; read(at): those at other positions (m,) int64, ascending, as they are stored,
    (m, features). ops: of the arrays that minibatches go into.
    """

    def __init__(self, kept: npt.NDArray[Any], read: Read, scale: float, ops: NumpyOps):
        self.kept, self.read, self.scale, self.ops = kept, read, scale, ops
        self.scratch = np.empty((0, kept.shape[1]), kept.dtype)

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        return self.kept.nbytes + self.scratch.nbytes

    def fetch(self, at: npt.NDArray[np.int64], out: Any) -> None:
        """out (features, b) = the scaled samples at positions `at` (b,) int64, which are not checked."""
        if len(at) > len(self.scratch):
            self.scratch = np.empty((len(at), self.kept.shape[1]), self.kept.dtype)
        taken, beyond = self.scratch[: len(at)], at >= len(self.kept)
        taken[~beyond] = self.kept[at[~beyond]]
        if beyond.any():
            rows, places = np.unique(at[beyond], return_inverse=True)
            taken[beyond] = self.read(rows)[places]
        host = out if not self.ops.on_device else np.empty(out.shape, out.dtype)
        np.multiply(taken.T, host.dtype.type(self.scale), out=host, dtype=host.dtype, casting="same_kind")
        if self.ops.on_device:
            out[...] = self.ops.put(host)
