"""Parts that several kinds of hostile files share: samples, odd HDF5 objects, and the use of data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psmpi.data import Split, find_doubts, identify, open_dataset, open_split
from psmpi.errors import UserError
from psmpi.testing.fuzz.mutations import VALUES, Rng, mutate

X = (np.arange(20 * 6, dtype=np.float32).reshape(20, 6) % 7) / 7
Y = np.arange(20) % 4


@dataclass(frozen=True)
class Kind:
    """A kind of hostile files.

    make(rng, folder) writes a file or a folder of files and returns its path. use(path) opens it as psmpi does.
    """

    make: Callable[[Rng, Path], Path]
    use: Callable[[Path], None]


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def use_data(path: Path, data_dir: Path | None = None) -> None:
    """Open a data set, identify it, and read samples, as psmpi.train does at its start."""
    dataset = open_dataset(str(path), data_dir, 0)
    prints: list[Any] = []
    identify(dataset, prints=prints)
    list(find_doubts(dataset, prints))
    for split in (dataset.train, dataset.test):
        read_some(split, 8)


def read_some(split: Split, count: int) -> None:
    """Read the first `count` samples as training does: sparse samples stay sparse."""
    rows = np.arange(min(split.n, count))
    if split.compressed is None:
        split.read(rows)
    else:
        split.source.taken(rows)


def use_own(path: Path) -> None:
    """Open a file both as `use_data` does and as samples to predict; raise the last UserError after both."""
    refused: UserError | None = None
    for whole in (False, True):
        try:
            if whole:
                read_some(open_split(str(path), None, "all", 0, predicted=True), 1)
            else:
                use_data(path)
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused


def odd_object(rng: Rng, file: h5py.File, name: str, shape: tuple[int, ...], kind: int, folder: Path) -> None:
    """Write an odd object instead of an array.

    kind: 0 a link, 1 external storage, 2 a virtual data set, 3 an unexpected dtype, else unexpected sizes and chunks.
    """
    private = folder.parent / "private.bin"
    if kind == 0:
        link = (h5py.ExternalLink(str(private), "/x"), h5py.SoftLink(f"/{name}"), h5py.SoftLink("/config"))
        file[name] = link[rng.integers(3)]
    elif kind == 1:
        file.create_dataset(name, shape, "f4", external=[(str(private), 0, h5py.h5f.UNLIMITED)])
    elif kind == 2:
        layout = h5py.VirtualLayout(shape, "f4")
        layout[...] = h5py.VirtualSource(str(private), "x", shape)
        file.create_virtual_dataset(name, layout)
    elif kind == 3:
        dtypes = ("f8", "i8", "u1", "S5", "c8", "?", [("a", "f4"), ("b", "i8")], h5py.string_dtype(), h5py.ref_dtype)
        file.create_dataset(name, shape, dtypes[rng.integers(len(dtypes))])
    else:
        sizes = tuple(int(n) for n in rng.choice([1, 3, 1000, 10**6, 10**9], len(shape)))
        chunks = tuple(max(1, min(n, int(rng.choice([1, 64, 4096])))) for n in sizes)
        file.create_dataset(name, sizes, "f4", chunks=chunks, compression="gzip" if rng.random() < 0.5 else None)


def toml_text(rng: Rng, text: str) -> str:
    lines = text.splitlines()
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(lines)))
        if " = " in lines[at] and rng.random() < 0.7:
            key = lines[at].partition(" = ")[0]
            value = VALUES[rng.integers(len(VALUES))]
            shown = "nan" if value is None or value != value else "inf" if value == float("inf") else json.dumps(value)
            lines[at] = f"{key} = {shown.replace('-Infinity', '-inf').replace('Infinity', 'inf')}"
        elif rng.random() < 0.5:
            lines.insert(at, lines[rng.integers(len(lines))])
        else:
            del lines[at]
        if not lines:
            return ""
    joined = "\n".join(lines)
    if rng.random() < 0.1:
        return mutate(rng, joined.encode()).decode("utf-8", "replace")
    if rng.random() < 0.02:
        return joined + "\nlayers = " + "[" * int(rng.choice([90, 2000, 20000]))
    return joined
