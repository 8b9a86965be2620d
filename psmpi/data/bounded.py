"""Samples under a memory limit: some are kept in memory, the others are read from their file for each minibatch."""

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
    """Parse a size such as "500M" or "1.5 GB", with units of powers of 1024, into bytes. UserError for other text."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * (1 << UNITS[match[2].lower()])) if match else -1
    if size < 0:
        raise UserError(f"--data-memory {text}: expected a size in bytes, as 500M or 2G")
    return size


def with_memory(dataset: Dataset, size: int) -> Dataset:
    """The data set with a limit of `size` bytes on the samples that a process keeps in memory.

    The splits share the limit by their numbers of samples. UserError for samples that are not read by rows: sequences,
    samples in memory, and compressed streams.
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
    """Samples of which a limited number is in memory. Minibatches equal those of `psmpi.backend.Samples` bit for bit.

    kept: the first samples, (k, features). read(at): reads the samples at other positions `at` (m,) int64, ascending,
    and returns (m, features) as stored. scale: factor on stored values. ops: backend of the minibatches.
    """

    def __init__(self, kept: npt.NDArray[Any], read: Read, scale: float, ops: NumpyOps):
        self.kept, self.read, self.scale, self.ops = kept, read, scale, ops
        self.scratch = np.empty((0, kept.shape[1]), kept.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.kept.nbytes + self.scratch.nbytes

    def fetch(self, at: npt.NDArray[np.int64], out: Any) -> None:
        """Fill `out` (features, b) with the scaled samples at positions `at` (b,) int64, which are not checked."""
        if len(at) > len(self.scratch):
            self.scratch = np.empty((len(at), self.kept.shape[1]), self.kept.dtype)
        samples, beyond = self.scratch[: len(at)], at >= len(self.kept)
        samples[~beyond] = self.kept[at[~beyond]]
        if beyond.any():
            rows, places = np.unique(at[beyond], return_inverse=True)
            samples[beyond] = self.read(rows)[places]
        host = out if not self.ops.on_device else np.empty(out.shape, out.dtype)
        np.multiply(samples.T, host.dtype.type(self.scale), out=host, dtype=host.dtype, casting="same_kind")
        if self.ops.on_device:
            out[...] = self.ops.put(host)
