"""Writing of a checkpoint file, and the process that writes it during a training.

HDF5 can crash its process when the disk is full, so a training does not write HDF5 itself: it passes whole vectors to
this process in a spool file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np

from psmpi.checkpoint.contents import Contents
from psmpi.checkpoint.format import (
    CHUNK,
    FORMAT,
    HEADER,
    as_data,
    available,
    chunk_of,
    filters,
    seal,
)
from psmpi.checkpoint.tensors import Tensor
from psmpi.files.fletcher import fletcher32
from psmpi.files.whole import partial_of, sync
from psmpi.layout import Stretch, copy_runs

# Runs of elements closer than GAP bytes in the spool are read together; READ bytes are read at a time.
GAP, READ = 1 << 14, 1 << 22
# Up to so many runs of elements are read one by one; more of them by array operations.
FEW = 64

# read(vector, tensor, first, into) fills `into` with elements [first, first + len(into)) of a tensor of a vector.
Source = Callable[[str, Tensor, int, np.ndarray], None]
# A table is (path in the file, shape, dtype, read); read(first, into) fills `into` with rows from `first` on.
Tables = Sequence[tuple[str, tuple[int, ...], np.dtype, Callable[[int, np.ndarray], None]]]


def write_file(
    target: Path,
    contents: Contents,
    vectors: dict[str, np.dtype],
    read: Source,
    gzip: int = 0,
    tables: Tables = (),
    done: Callable[[str], None] | None = None,
) -> None:
    """Write a checkpoint; the file appears under its name complete or not at all.

    vectors: dtypes of the vectors ("weights", those of the optimizer, spaces) by name; tables are written first, then
    vectors in reverse order. read: fills slabs of elements. done: called with each vector's name after its last read.
    gzip: 0 (none) to 9. OSError if the file cannot be written; a full disk may end the process instead.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(target)
    # The file would be written to wherever the link points.
    if target.parent.is_symlink():
        raise OSError(f"{target.parent} is a symbolic link, and checkpoints are written through none")
    tensors = {vector: contents.tensors(vector) for vector in vectors}
    texts = contents.texts()
    if not gzip:
        numbers = sum(tensor.size * vectors[vector].itemsize for vector, of in tensors.items() for tensor in of)
        numbers += sum(prod(shape) * of.itemsize for _, shape, of, _ in tables)
        _need(target.parent, numbers + sum(map(len, texts.values())))
    try:
        with (
            h5py.File(partial, "x", userblock_size=HEADER, locking="best-effort") as file,
            # Its thread starts with the first tensor of several chunks.
            ThreadPoolExecutor(1) as beside,
        ):
            file.attrs["format"] = FORMAT
            # Data sets, since HDF5 attributes have at most 64 kB.
            for name, text in texts.items():
                file.create_dataset(name, data=as_data(text), chunks=(1,), fletcher32=True)
            for path, shape, of, get in tables:
                _write_table(file, path, shape, of, get, gzip)
            for vector, dtype in reversed(vectors.items()):
                for tensor in tensors[vector]:
                    path = f"{contents.group(vector)}/{tensor.name}"
                    _write_tensor(file, path, vector, tensor, dtype, read, gzip, beside)
                if done is not None:
                    done(vector)
        _finish(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _finish(partial: Path, target: Path) -> None:
    """Seal a file and rename it to its final name."""
    seal(partial)
    os.replace(partial, target)
    sync(target.parent)


def _need(place: Path, nbytes: int) -> None:
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise OSError(f"No space left on the disk of {place}: {nbytes:,} bytes are needed, {free:,} are free")


def _write_tensor(
    file: h5py.File,
    path: str,
    vector: str,
    tensor: Tensor,
    dtype: np.dtype,
    read: Source,
    gzip: int,
    beside: ThreadPoolExecutor,
) -> None:
    chunks = chunk_of(tensor.shape)
    dataset = file.create_dataset(path, tensor.shape, dtype, chunks=chunks, **filters(gzip))
    if not gzip and dtype.itemsize % 4 == 0 and chunks[1:] == tensor.shape[1:]:
        _write_chunks(dataset, vector, tensor, read, beside)
        return
    # Slabs of whole chunks; HDF5 itself cuts a row longer than a chunk along the next axis.
    row = tensor.size // tensor.shape[0]
    rows = max(chunks[0], CHUNK // row // chunks[0] * chunks[0])
    buffer = np.empty(min(rows, tensor.shape[0]) * row, dtype)
    for top in range(0, tensor.shape[0], rows):
        last = min(top + rows, tensor.shape[0])
        slab = buffer[: (last - top) * row]
        read(vector, tensor, top * row, slab)
        dataset[top:last] = slab.reshape(last - top, *tensor.shape[1:])


def _write_chunks(dataset: h5py.Dataset, vector: str, tensor: Tensor, read: Source, beside: ThreadPoolExecutor) -> None:
    """Write chunks of whole rows; the thread of `beside` reads the next chunk and computes its checksum meanwhile."""
    rows, row = dataset.chunks[0], tensor.size // tensor.shape[0]
    size = rows * row

    def chunk(top: int, room: np.ndarray) -> np.ndarray:
        values, last = room[:-4].view(dataset.dtype), min((top + rows) * row, tensor.size)
        count = last - top * row
        read(vector, tensor, top * row, values[:count])
        values[count:] = 0
        room[-4:].view("<u4")[0] = fletcher32(room[:-4].view("<u4"))
        return room

    tops = range(0, tensor.shape[0], rows)
    rooms = [np.empty(size * dataset.dtype.itemsize + 4, np.uint8) for _ in tops[:2]]
    zeros = (0,) * (len(tensor.shape) - 1)
    data = chunk(0, rooms[0])
    for number, top in enumerate(tops, 1):
        following = beside.submit(chunk, top + rows, rooms[number % 2]) if number < len(tops) else None
        dataset.id.write_direct_chunk((top, *zeros), data)
        if following is not None:
            data = following.result()


def _write_table(
    file: h5py.File,
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    get: Callable[[int, np.ndarray], None],
    gzip: int,
) -> None:
    dataset = file.create_dataset(path, shape, dtype, chunks=chunk_of(shape), **filters(gzip))
    rows = max(1, CHUNK // max(1, prod(shape[1:])))
    buffer = np.empty((min(rows, shape[0]), *shape[1:]), dtype)
    for top in range(0, shape[0], rows):
        slab = buffer[: min(rows, shape[0] - top)]
        get(top, slab)
        dataset[top : top + len(slab)] = slab


class SpoolSource:
    """Elements of tensors from the spool file, in which a vector's elements are ordered by the ranks that wrote them.

    spool: file descriptor. vectors: (name, dtype, first byte) of each vector. maps: for the weights and each space,
    (first byte, number of runs) of a table (3, runs) int64: start and stop of each run in the flat vector, and its
    place among the vector's elements in the spool.
    """

    def __init__(
        self,
        spool: int,
        contents: Contents,
        vectors: Sequence[tuple[str, str, int]],
        maps: Mapping[str, tuple[int, int]],
    ):
        self.spool, self.spaces = spool, contents.spaces.keys()
        self.vectors = {name: (np.dtype(text), at) for name, text, at in vectors}
        self.maps = {}
        for name, (at, count) in maps.items():
            table = np.empty(3 * count, np.int64)
            _fetch(spool, at, table)
            self.maps[name] = table.reshape(3, count)
        self.room = np.empty(READ, np.uint8)

    def read(self, vector: str, tensor: Tensor, first: int, into: np.ndarray) -> None:
        """Fill `into` with elements [first, first + len(into)) of a tensor of a vector."""
        (dtype, base), runs = self.vectors[vector], self.maps[vector if vector in self.spaces else "weights"]
        starts, stops, places = runs
        parts = tensor.elements(first, first + len(into))
        met = [range(stops.searchsorted(p.offset, side="right"), starts.searchsorted(p.stop)) for p in parts]
        if sum(map(len, met)) > FEW:
            self._gather(dtype, base, runs, tensor, first, into)
            return
        for part, numbers in zip(parts, met, strict=True):
            for k in numbers:
                for stretch in part.within(int(starts[k]), int(stops[k])):
                    moved = replace(stretch, offset=stretch.offset + int(places[k] - starts[k]))
                    self._copy(moved, base, into[stretch.first - first : stretch.last - first])

    def forget(self, vector: str) -> None:
        """Cut the spool file off where a vector begins, which frees the memory of the vector and all after it."""
        os.truncate(self.spool, self.vectors[vector][1])

    def _copy(self, part: Stretch, base: int, into: np.ndarray) -> None:
        """Fill `into` with a stretch of a vector; the vector begins at byte `base` of the spool."""
        size = into.itemsize
        # Runs close to each other are read together with the gaps between them.
        close = (part.step - part.length) * size <= GAP
        some = max(1, READ // size // part.step) * part.length if close and part.count > 1 else part.length
        for begin in range(part.first, part.last, some):
            at = begin - part.first
            (tile,) = part.elements(begin, begin + some)
            if tile.count == 1:
                _fetch(self.spool, base + tile.offset * size, into[at : at + tile.length])
                continue
            values = self.room[: (tile.stop - tile.offset) * size].view(into.dtype)
            _fetch(self.spool, base + tile.offset * size, values)
            into[at : at + some].reshape(tile.count, -1)[...] = tile.view(values, -tile.offset)

    def _gather(
        self, dtype: np.dtype, base: int, runs: np.ndarray, tensor: Tensor, first: int, into: np.ndarray
    ) -> None:
        """As `read`, for elements in many runs, by array operations."""
        starts, stops, places = runs
        at, last, run, start = tensor.meet(starts, stops, first, first + len(into))
        at, sizes, places = at - first, last - at, places[run] + start - starts[run]
        order = np.argsort(places, kind="stable")
        at, sizes, places = at[order], sizes[order], places[order]
        # Runs close to each other in the spool are read together with the gaps between them.
        ends = places + sizes
        apart = places[1:] - ends[:-1] > GAP // dtype.itemsize
        far = np.diff((places - places[:1]) // (READ // dtype.itemsize)) > 0
        edges = np.append(np.flatnonzero(apart | far & (places[1:] != ends[:-1])) + 1, len(places))
        begin = 0
        for end in edges.tolist():
            byte, some = base + int(places[begin]) * dtype.itemsize, slice(begin, end)
            if end == begin + 1:
                _fetch(self.spool, byte, into[at[begin] : at[begin] + sizes[begin]])
            else:
                values = np.empty(int(ends[end - 1] - places[begin]), dtype)
                _fetch(self.spool, byte, values)
                copy_runs(values, places[some] - places[begin], into, at[some], sizes[some])
            begin = end


def spool_tables(spool: int, start: int, shapes: Mapping[str, tuple[Sequence[int], str]]) -> Tables:
    """Tables that follow each other in `spool` from byte `start` on. shapes: path in the file -> (shape, dtype)."""
    tables = []
    for name, (shape, text) in shapes.items():
        dtype, base = np.dtype(text), start
        row = prod(shape[1:]) * dtype.itemsize

        def get(first: int, into: np.ndarray, base: int = base, row: int = row) -> None:
            _fetch(spool, base + first * row, into.reshape(-1))

        tables.append((name, tuple(shape), dtype, get))
        start += shape[0] * row
    return tables


def _fetch(spool: int, at: int, into: np.ndarray) -> None:
    """Fill `into` with bytes of the spool from byte `at` on."""
    view = memoryview(into.data).cast("B")
    while view:
        got = os.preadv(spool, [view], at)
        if got <= 0:
            raise OSError("the spool file of the checkpoint is shorter than it should be")
        view, at = view[got:], at + got


def prune(target: Path, keep: int) -> None:
    """Remove the oldest checkpoints of a run so that `keep` are left with `target`, the newest; 0 keeps all."""
    older = [path for path in available(target.parent.parent) if path.name < target.name]
    for old in older[: len(older) + 1 - keep] if keep > 0 else ():
        # A failure to remove an old checkpoint must not stop the run.
        with contextlib.suppress(OSError):
            old.unlink(missing_ok=True)


def keep_as(target: Path, best: Path) -> None:
    """Make `best` a hard link to `target`, or a copy on a file system without hard links, in place of an older file."""
    partial = partial_of(best)
    try:
        try:
            os.link(target, partial)
        except OSError:
            _need(best.parent, target.stat().st_size)
            shutil.copyfile(target, partial)
        os.replace(partial, best)
        sync(best.parent)
    finally:
        partial.unlink(missing_ok=True)


def build(job: Mapping[str, Any], spool: int) -> None:
    """Write the checkpoint that a job of `Writer` describes, from the spool, and remove older ones beyond `keep`."""
    target = Path(job["target"])
    if "texts" in job:
        contents = Contents.of(job["texts"])
        source = SpoolSource(spool, contents, job["vectors"], job["maps"])
        tables = spool_tables(spool, job["tables_at"], job["tables"])
        vectors = {name: np.dtype(text) for name, text, _ in job["vectors"]}
        # Vectors are written from the end of the spool, which is cut off meanwhile to free memory for the file.
        write_file(target, contents, vectors, source.read, job["gzip"], tables, source.forget)
    else:
        # The ranks have written the file together.
        partial = Path(job["partial"])
        try:
            _finish(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    if "best" in job:
        keep_as(target, Path(job["best"]))
    prune(target, job["keep"])


def serve(spool: int, jobs: Iterable[str], answers: IO[str]) -> None:
    """Do the jobs in `jobs`, lines of JSON; answer each with a line, a JSON string: the error, "" for success."""
    for line in jobs:
        try:
            build(json.loads(line), spool)
            answer = ""
        except Exception as error:
            answer = str(error) or repr(error)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.stdin, sys.stdout)
