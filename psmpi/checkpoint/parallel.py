"""Writing of one checkpoint by all ranks together, with an h5py that is built with parallel HDF5.

Training waits while the ranks write. No copy of the size of a shard is made, so that networks fit whose weights exceed
the memory of a single host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psmpi.checkpoint.contents import Contents
from psmpi.checkpoint.format import FORMAT, HEADER, as_data, chunk_of, filters
from psmpi.checkpoint.selection import Ranges, Slab, find_parts
from psmpi.checkpoint.tensors import Tensor
from psmpi.comm.protocol import Communicator
from psmpi.comm.watch.flight import bare
from psmpi.layout import Ownership, TableRows, copy_runs


def supported() -> bool:
    """Whether the installed h5py is built with parallel HDF5."""
    return bool(h5py.get_config().mpi)


def parts_of(tensor: Tensor, ownership: Ownership) -> list[list[Slab]]:
    """For each rank, the parts of a tensor that it writes, with their places in the rank's local vector."""
    parts = []
    for runs, record in zip(ownership, ownership.record, strict=True):
        first, last, _, start = tensor.meet(record.starts, record.stops)
        places = runs.places(start, start + last - first)
        parts.append(list(find_parts(tensor.shape, chunk_of(tensor.shape), first, last, places)))
    return parts


def values_of(part: Slab, vector: np.ndarray) -> np.ndarray:
    """Elements of a part in C order: a view of the local vector if they are a slice of it, else a copy."""
    if part.run is not None:
        return vector[part.run]
    values = np.empty(prod(part.shape), vector.dtype)
    copy_runs(vector, part.places, values, part.at, part.sizes)
    return values


def write_together(
    world: Communicator,
    partial: Path,
    contents: Contents,
    vectors: Mapping[str, np.ndarray],
    owned: Mapping[str, Ownership],
    gzip: int,
    tables: Mapping[str, np.ndarray],
    rows: TableRows,
) -> None:
    """Write the unsealed file `partial`, which must not exist yet. All ranks of `world` call it.

    vectors: this rank's local vectors by name. owned: their ownerships; each rank writes the boxes that it owns on
    record. tables: this rank's rows of each table; rows: which rank has which rows. OSError if HDF5 cannot write.
    """
    collective = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    collective.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    with h5py.File(partial, "x", driver="mpio", comm=bare(world), userblock_size=HEADER) as file:
        file.attrs["format"] = FORMAT
        for name, text in contents.texts().items():
            data = as_data(text)
            dataset = file.create_dataset(name, (1,), data.dtype, chunks=(1,), fletcher32=True)
            memory, disk = dataset.id.get_space(), dataset.id.get_space()
            if world.rank != 0:
                memory.select_none()
                disk.select_none()
            dataset.id.write(memory, disk, data, dxpl=collective)
        for name, vector in vectors.items():
            for tensor in contents.tensors(name):
                path = f"{contents.group(name)}/{tensor.name}"
                chunks = chunk_of(tensor.shape)
                dataset = file.create_dataset(path, tensor.shape, vector.dtype, chunks=chunks, **filters(gzip))
                parts = parts_of(tensor, owned[name])
                boxes = ((part.ranges, values_of(part, vector)) for part in parts[world.rank])
                _write_in_turns(dataset, boxes, max(map(len, parts)), collective)
        for name, table in tables.items():
            shape = (rows.total, *table.shape[1:])
            path = f"{rows.group}/{name}"
            dataset = file.create_dataset(path, shape, table.dtype, chunks=chunk_of(shape), **filters(gzip))
            columns = tuple((0, n) for n in shape[1:])
            runs = [rows.runs(rank) for rank in range(world.size)]
            boxes = (
                (((first, first + count), *columns), table[local : local + count].reshape(-1))
                for first, local, count in runs[world.rank]
            )
            _write_in_turns(dataset, boxes, max(map(len, runs)), collective)


def _write_in_turns(
    dataset: h5py.Dataset, boxes: Iterator[tuple[Ranges, np.ndarray]], turns: int, collective: Any
) -> None:
    """Write this rank's boxes in `turns` collective writes.

    HDF5 writes filtered chunks collectively, so a rank without more boxes takes part with an empty selection.
    """
    for _ in range(turns):
        disk = dataset.id.get_space()
        turn = next(boxes, None)
        if turn is not None:
            ranges, values = turn
            disk.select_hyperslab(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))
            memory = h5py.h5s.create_simple((values.size,))
        else:
            disk.select_none()
            memory, values = h5py.h5s.create_simple((1,)), np.empty(1, dataset.dtype)
            memory.select_none()
        dataset.id.write(memory, disk, np.ascontiguousarray(values), dxpl=collective)
