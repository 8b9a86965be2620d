"""Writing one file from all ranks at once, with an h5py that is built with parallel HDF5.

The ranks write while training waits, and nothing of the size of a shard is copied: for networks whose weights no single
host can take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psmpi.checkpoint.format import (
    FORMAT,
    HEADER,
    Contents,
    as_data,
    chunk_of,
    filters,
    group_of,
    partial_of,
    table_path,
)
from psmpi.layout import Runs, TableRows

Box = tuple[slice, ...]


def supported() -> bool:
    """Whether this h5py can."""
    return bool(h5py.get_config().mpi)


def boxes(shape: Sequence[int], first: int, last: int) -> list[Box]:
    """Elements [first, last) of a tensor of `shape` in C order, as hyperslabs in that order."""
    if first >= last:
        return []
    if len(shape) == 1:
        return [(slice(first, last),)]
    row, rest = prod(shape[1:]), shape[1:]
    top, bottom = first // row, last // row
    if top == bottom:
        return [(slice(top, top + 1), *box) for box in boxes(rest, first - top * row, last - top * row)]
    found: list[Box] = []
    if first % row:
        found += [(slice(top, top + 1), *box) for box in boxes(rest, first % row, row)]
        top += 1
    if top < bottom:
        found.append((slice(top, bottom), *(slice(0, n) for n in rest)))
    if last % row:
        found += [(slice(bottom, bottom + 1), *box) for box in boxes(rest, 0, last % row)]
    return found


def write_together(
    world: Any,
    target: Path,
    contents: Contents,
    vectors: Mapping[str, np.ndarray],
    writes: Sequence[Runs],
    shard: Runs,
    gzip: int,
    tables: Mapping[str, np.ndarray],
    rows: TableRows,
) -> None:
    """Write the unsealed file beside `target`. All ranks of `world` call it; rank r writes the runs `writes[r]`.

    vectors: (shard.size,) arrays of one dtype. OSError where HDF5 cannot write.
    """
    dtype = next(iter(vectors.values())).dtype
    collective = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    collective.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    with h5py.File(partial_of(target), "w", driver="mpio", comm=world, userblock_size=HEADER) as file:
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
            for tensor in contents.tensors():
                dataset = file.create_dataset(
                    f"{group_of(name)}/{tensor.name}",
                    tensor.shape,
                    dtype,
                    chunks=chunk_of(tensor.shape),
                    **filters(gzip),
                )
                # What each rank has of the tensor: boxes in it, and where they lie in the flat vector.
                pieces: list[list[tuple[Box, int]]] = [[] for _ in writes]
                for rank, runs in enumerate(writes):
                    for first, last, offset in tensor.spans:
                        for a, b in (Runs(((offset, offset + last - first),)) & runs).intervals:
                            at = a
                            for box in boxes(tensor.shape, first + a - offset, first + b - offset):
                                pieces[rank].append((box, at))
                                at += _size(box)
                mine = [(box, vector[shard.local(at, at + _size(box))]) for box, at in pieces[world.rank]]
                _write_in_turns(dataset, mine, max(map(len, pieces)), collective)
        for name, table in tables.items():
            shape = (rows.total, *table.shape[1:])
            dataset = file.create_dataset(table_path(name), shape, table.dtype, chunks=chunk_of(shape), **filters(gzip))
            rest = tuple(slice(0, n) for n in shape[1:])
            held = [rows.runs(rank) for rank in range(world.size)]
            mine = [
                ((slice(first, first + count), *rest), table[local : local + count].reshape(-1))
                for first, local, count in held[world.rank]
            ]
            _write_in_turns(dataset, mine, max(map(len, held)), collective)


def _write_in_turns(dataset: h5py.Dataset, mine: Sequence[tuple[Box, np.ndarray]], turns: int, collective: Any) -> None:
    """Write this rank's boxes. Filtered chunks are written by all ranks in step, with those that have nothing more."""
    for turn in range(turns):
        there = dataset.id.get_space()
        if turn < len(mine):
            box, values = mine[turn]
            there.select_hyperslab(tuple(s.start for s in box), tuple(s.stop - s.start for s in box))
            here = h5py.h5s.create_simple((values.size,))
        else:
            there.select_none()
            here, values = h5py.h5s.create_simple((1,)), np.empty(1, dataset.dtype)
            here.select_none()
        dataset.id.write(here, there, np.ascontiguousarray(values), dxpl=collective)


def _size(box: Box) -> int:
    return prod(s.stop - s.start for s in box)
