"""CIFAR-10 from the official binary files or, if these are missing, from the pickled ones."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from psmpi.data.cifar_pickle import PickleRows
from psmpi.data.files import described, find_set, need_data_dir, not_found, reading
from psmpi.data.labels import check_range
from psmpi.data.rows import Concatenated, FileRows, RowSource
from psmpi.data.split import Dataset, Split, frozen
from psmpi.errors import UserError

CLASSES = 10
SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def open_cifar10(data_dir: Path | None) -> Dataset:
    """Open CIFAR-10 in data_dir or data_dir/cifar-10-batches-bin: uint8 images (3, 32, 32), 10 classes.

    The function reads the labels and checks sizes; a file may have any whole number of records. If the binary files
    are missing, it reads the pickled ones in data_dir or data_dir/cifar-10-batches-py with a restricted unpickler and
    warns. UserError for files that are missing, truncated or of another format.
    """
    data_dir = need_data_dir("cifar10", data_dir)
    folders = [data_dir / "cifar-10-batches-bin", data_dir]
    paths = find_set("cifar10", data_dir, folders, {name: [name + ".bin"] for name in BATCHES})
    if paths is not None:
        parts = [_open_binary(paths[name]) for name in BATCHES]
    else:
        pickled = data_dir / "cifar-10-batches-py"
        folders.append(pickled)
        paths = find_set("cifar10", data_dir, [pickled, data_dir], {name: [name] for name in BATCHES})
        if paths is None:
            names = [name + ".bin" for name in BATCHES]
            raise not_found("cifar10", folders, names, "put the six files there, or correct --data-dir")
        warnings.warn(
            f"{paths['test_batch'].parent}: these CIFAR-10 files are Python pickles, read with a restricted "
            "unpickler; the binary version of the data set (cifar-10-batches-bin) is preferable",
            stacklevel=3,
        )
        parts = [_open_pickled(paths[name]) for name in BATCHES]
    sources = [source for source, _ in parts]
    labels = np.concatenate([part for _, part in parts[:-1]])
    train = Split(frozen(labels), SHAPE, 1 / 255, Concatenated(sources[:-1]))
    test = Split(frozen(parts[-1][1]), SHAPE, 1 / 255, sources[-1])
    return Dataset("cifar10", CLASSES, SHAPE, train, test)


def _open_binary(path: Path) -> tuple[RowSource, np.ndarray]:
    with reading(path):
        size = path.stat().st_size
        kind = described(path)
    if size % RECORD and "gzip" in kind:
        raise UserError(f"{path}: {kind}; unpack it with gunzip, to the name it has now")
    if size == 0 or size % RECORD:
        raise UserError(
            f"{path}: found {size} bytes, expected a whole number of records of {RECORD} bytes (a label and "
            f"{PIXELS} pixels); the file is truncated, or of another data set: fetch it again"
        )
    source = FileRows(path, 0, size // RECORD, PIXELS, np.dtype(np.uint8), skip=1)
    labels = source.column(0)
    check_range(str(path), labels, CLASSES)
    return source, labels


def _open_pickled(path: Path) -> tuple[RowSource, np.ndarray]:
    source, labels = PickleRows.open(path, PIXELS)
    check_range(str(path), labels, CLASSES)
    return source, labels
