"""Writing one file from all ranks at once, with an h5py that is built with parallel HDF5.

The ranks write while training waits, and nothing of the size of a shard is copied: for networks whose weights no single
host can take.
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
    """Whether this h5py can."""
    return bool(h5py.get_config().mpi)


def parts_of(tensor: Tensor, ownership: Ownership) -> list[list[Slab]]:
    """The parts of a tensor that each rank writes, and their places in that rank's local vector."""
    found = []
    for runs, record in zip(ownership, ownership.record, strict=True):
        first, last, _, start = tensor.meet(record.starts, record.stops)
        places = runs.places(start, start + last - first)
        found.append(list(find_parts(tensor.shape, chunk_of(tensor.shape), first, last, places)))
    return found


def values_of(part: Slab, vector: np.ndarray) -> np.ndarray:
    """The elements of a part in its C order, a view of the local vector where they are a slice of it."""
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
    """Write the unsealed file `partial`, which is not there yet. All ranks of `world` call it.

    vectors: this rank's local vector of each; `owned` says of each which rank has what, and each rank writes what it is
    the owner of record of. OSError where HDF5 cannot write.
    """
    collective = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    collective.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    with h5py.File(partial, "x", driver="mpio", comm=bare(world), userblock_size=HEADER) as file:
        file.attrs["format"] = FORMAT
        for name, text in contents.texts().items():
            data = as_data(text)
            dataset = file.create_dataset(name, (1,), data.dtype, chunks=(1,), fletcher32=True)
            here, there = dataset.id.get_space(), dataset.id.get_space()
            if world.rank != 0:
                here.select_none()
                there.select_none()
            dataset.id.write(here, there, data, dxpl=collective)
        for name, vector in vectors.items():
            for tensor in contents.tensors(name):
                path = f"{contents.group(name)}/{tensor.name}"
                chunks = chunk_of(tensor.shape)
                dataset = file.create_dataset(path, tensor.shape, vector.dtype, chunks=chunks, **filters(gzip))
                parts = parts_of(tensor, owned[name])
                mine = ((part.ranges, values_of(part, vector)) for part in parts[world.rank])
                _write_in_turns(dataset, mine, max(map(len, parts)), collective)
        for name, table in tables.items():
            shape = (rows.total, *table.shape[1:])
            path = f"{rows.group}/{name}"
            dataset = file.create_dataset(path, shape, table.dtype, chunks=chunk_of(shape), **filters(gzip))
            rest = tuple((0, n) for n in shape[1:])
            held = [rows.runs(rank) for rank in range(world.size)]
            mine = (
                (((first, first + count), *rest), table[local : local + count].reshape(-1))
                for first, local, count in held[world.rank]
            )
            _write_in_turns(dataset, mine, max(map(len, held)), collective)


def _write_in_turns(
    dataset: h5py.Dataset, mine: Iterator[tuple[Ranges, np.ndarray]], turns: int, collective: Any
) -> None:
    """Write this rank's boxes. Filtered chunks are written by all ranks in step, with those that have nothing more."""
    for _ in range(turns):
        there = dataset.id.get_space()
        turn = next(mine, None)
        if turn is not None:
            ranges, values = turn
            there.select_hyperslab(tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))
            here = h5py.h5s.create_simple((values.size,))
        else:
            there.select_none()
            here, values = h5py.h5s.create_simple((1,)), np.empty(1, dataset.dtype)
            here.select_none()
        dataset.id.write(here, there, np.ascontiguousarray(values), dxpl=collective)
