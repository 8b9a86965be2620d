"""Minibatches of samples, and copies of runs of vectors, on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from psmpi.backend.gpu.device import Device
from psmpi.backend.gpu.grids import blocks
from psmpi.backend.reference.moves import CompressedSamples, Mirror, RunCopies, Samples

# Largest number of elements of a run that a block copies.
PIECE = 256


class Positions:
    """Buffer on the device for the positions of a minibatch's samples."""

    def __init__(self, ops: Device):
        self.ops = ops
        self.mirror: Mirror | None = None

    def put(self, at: np.ndarray) -> Any:
        """Copy `at` (b,) int64 to the device; return an array that begins with it, valid until the next call."""
        if self.mirror is not None:
            self.mirror.settle()
        if self.mirror is None or self.mirror.host.size < len(at):
            self.mirror = self.ops.mirror(self.ops.empty(len(at), np.dtype(np.int64)))
        self.mirror.host[: len(at)] = at
        self.mirror.push(slice(0, len(at)))
        return self.mirror.array


class DeviceCompressedSamples(CompressedSamples):
    """`CompressedSamples` whose rows stay on the device."""

    def __init__(self, starts: np.ndarray, columns: np.ndarray, values: np.ndarray, features: int, ops: Device):
        super().__init__(upload(ops, starts), upload(ops, columns), upload(ops, values), features)
        self.ops, self.at = ops, Positions(ops)

    def fetch(self, at: np.ndarray, out: Any) -> None:
        if not len(at):
            return
        out.fill(0)
        arrays = (self.at.put(at), self.starts, self.columns, self.values, out)
        self.ops.launch("fill_compressed", out.dtype, (len(at),), (128,), len(at), *arrays)


def upload(ops: Device, values: np.ndarray) -> Any:
    """Copy values from host memory to a new array on the device."""
    copy = ops.cupy.asarray(np.ascontiguousarray(values))
    # CuPy copies through pinned memory, which its pool would keep.
    ops.synchronize()
    ops.cupy.get_default_pinned_memory_pool().free_all_blocks()
    return copy


class DeviceSamples(Samples):
    """`Samples` that stay on the device.

    An array on the device is not copied: its values may change between fetches.
    """

    def __init__(self, values: Any, scale: float, ops: Device):
        self.ops, self.scale = ops, scale
        if isinstance(values, np.ndarray):
            values = self._upload(values)
        self.values = values
        self.kernel = {"uint8": "gather_u8", "float32": "gather_f32", "float64": "gather_f64"}[values.dtype.name]
        self.scales: Any = None
        self.at = Positions(ops)

    def _upload(self, values: np.ndarray) -> Any:
        if values.dtype not in (np.uint8, np.float32, np.float64):
            values = values.astype(np.float64 if values.dtype.itemsize > 2 else np.float32)
        return upload(self.ops, values)

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes)

    def fetch(self, at: np.ndarray, out: Any) -> None:
        features, b = out.shape
        if not b:
            return
        if self.scales is None or self.scales.dtype != out.dtype:
            self.scales = self.ops.empty(features, out.dtype)
            self.scales.fill(self.scale)
        grid = (blocks(b, 32), blocks(features, 32))
        arrays = (self.at.put(at), self.values, self.scales, out)
        self.ops.launch(self.kernel, out.dtype, grid, (32, 8), b, features, *arrays)


class DeviceRunCopies(RunCopies):
    """`RunCopies` by the kernel `transfer` of cuda/elements.cu.

    The target is cut into pieces, each of which receives the same runs of the source in all of its elements.
    """

    def __init__(self, table: np.ndarray, ops: Device):
        self.ops, self.table = ops, np.ascontiguousarray(table, np.int64)
        begin, to, length = self.table.T
        edges = np.unique(np.concatenate([to, to + length]))
        # Cut runs where other runs begin or end, and the segments into pieces of at most PIECE elements for a block.
        first, last = np.searchsorted(edges, to), np.searchsorted(edges, to + length)
        run = np.repeat(np.arange(len(to)), last - first)
        segment = np.arange(len(run)) - np.repeat(np.cumsum(last - first) - last, last - first)
        order = np.argsort(segment, kind="stable")
        run, segment = run[order], segment[order]
        sources = begin[run] + edges[segment] - to[run]
        used, starts = np.unique(segment, return_index=True)
        ends = np.append(starts[1:], len(segment))
        sizes = np.diff(edges)[used] if len(used) else used
        pieces = -(-sizes // PIECE)
        at = np.repeat(np.arange(len(used)), pieces)
        offset = (np.arange(len(at)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * PIECE
        entries = (edges[used][at] + offset, np.minimum(PIECE, sizes[at] - offset), starts[at], ends[at], offset)
        self.entries = len(at)
        self.pieces, self.sources = (ops.put(a.astype(np.int64)) for a in (np.stack(entries, axis=1), sources))

    def copy(self, values: Any, out: Any) -> None:
        self._start(values, out, 0)

    def add(self, values: Any, out: Any) -> None:
        self._start(values, out, 1)

    def _start(self, values: Any, out: Any, add: int) -> None:
        if self.entries:
            arrays = (self.pieces, self.sources, values, out)
            self.ops.launch("transfer", out.dtype, (self.entries,), (256,), *arrays, add)

    @property
    def nbytes(self) -> int:
        return int(self.table.nbytes + self.pieces.nbytes + self.sources.nbytes)
