"""MNIST and other data sets in its format: four IDX files, plain or compressed by gzip."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.files import CHUNK_BYTES, check_unpacked, find_set, need_data_dir, not_found, reading
from psmpi.data.labels import check_range
from psmpi.data.rows import FileRows, StreamRows
from psmpi.data.split import Dataset, Split, frozen
from psmpi.errors import UserError

CLASSES = 10
IMAGES, LABELS = 0x803, 0x801
# Types of values by the third byte of an IDX file.
TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}


def open_mnist(data_dir: Path | None) -> Dataset:
    """Open MNIST in data_dir, data_dir/mnist or data_dir/MNIST/raw: uint8 (1, height, width), 10 classes.

    The function reads the labels and checks headers and sizes. UserError for files that are missing, truncated, too
    long, of another format, or that do not belong together.
    """
    data_dir = need_data_dir("mnist", data_dir)
    folders = [data_dir, data_dir / "mnist", data_dir / "MNIST" / "raw"]
    wanted = {
        part + kind: _spellings(part, kind) for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    }
    paths = find_set("mnist", data_dir, folders, wanted)
    if paths is None:
        names = [spellings[0] + "[.gz]" for spellings in wanted.values()]
        raise not_found("mnist", folders, names, "put the four files there, or correct --data-dir")
    train = _open_split(paths["trainimages-idx3"], paths["trainlabels-idx1"])
    test = _open_split(paths["t10kimages-idx3"], paths["t10klabels-idx1"])
    if train.shape != test.shape:
        raise UserError(
            f"{paths['t10kimages-idx3']}: the test images are {test.shape[1]} x {test.shape[2]}, but the "
            f"training images in {paths['trainimages-idx3']} are {train.shape[1]} x {train.shape[2]}; "
            "put files of one and the same data set there"
        )
    return Dataset("mnist", CLASSES, train.shape, train, test)


def _spellings(part: str, kind: str) -> list[str]:
    # Plain files come first, since single rows of them can be read.
    return [f"{part}-{spelt}-ubyte{end}" for end in ("", ".gz") for spelt in (kind, kind.replace("-idx", ".idx"))]


def _open_split(images: Path, labels: Path) -> Split:
    count, height, width = _dimensions(images, IMAGES)
    (label_count,) = _dimensions(labels, LABELS)
    if count != label_count:
        raise UserError(
            f"{images}: {count} images, but {labels} has {label_count} labels; expected as many of the one "
            "as of the other: fetch both files again"
        )
    if min(count, height, width) == 0:
        raise UserError(f"{images}: {count} images of {height} x {width}: the file is empty; fetch it again")
    for path, offset, size in ((images, 16, count * height * width), (labels, 8, count)):
        if path.suffix == ".gz":
            with reading(path):
                check_unpacked(str(path), path.stat().st_size, offset + size, "unpack it with gunzip")
    source = _source(images, 16, count, height * width)
    _check_size(images, 16 + count * height * width)
    _check_size(labels, 8 + count)
    values: npt.NDArray[Any] = np.empty((count, 1), np.uint8)
    rows = np.arange(count, dtype=np.int64)
    _source(labels, 8, count, 1).read_into(rows, rows, values)
    _check_labels(labels, values[:, 0])
    return Split(frozen(values[:, 0]), (1, height, width), 1 / 255, source)


def _check_labels(path: Path, labels: npt.NDArray[np.uint8]) -> None:
    """Raise UserError unless all labels are of the ten classes."""
    low, high = int(labels.min()), int(labels.max())
    wrong = np.count_nonzero(labels >= CLASSES)
    # Many wrong labels that are small mean another data set; a damaged file has few wrong labels, of any value.
    if wrong > len(labels) // 20 and high < 100:
        first = int(np.flatnonzero(labels >= CLASSES)[0])
        numbered = f"y - {low}" if low else "y"
        raise UserError(
            f"{path}: {wrong} labels are out of range, the first being {labels[first]} of sample {first}; expected "
            f"labels 0..{CLASSES - 1}, and these are {low}..{high}, as parts of EMNIST have them: save the four arrays "
            f"as x, y, x_test and y_test with np.savez, with {numbered} for y, and name that file as the data set"
        )
    check_range(str(path), labels, CLASSES)


def _source(path: Path, offset: int, count: int, features: int) -> FileRows | StreamRows:
    if path.suffix == ".gz":
        return StreamRows(path, None, offset, count, features, np.dtype(np.uint8))
    return FileRows(path, offset, count, features, np.dtype(np.uint8))


def _dimensions(path: Path, magic: int) -> tuple[int, ...]:
    """The dimensions in the header of an IDX file; UserError unless its first four bytes are `magic`."""
    size = 4 + 4 * (magic & 0xFF)
    if path.suffix == ".gz":
        with reading(path), path.open("rb") as file:
            start = file.read(2)
        if start and start != b"\x1f\x8b":
            raise UserError(f"{path}: not compressed by gzip, though its name ends in .gz; rename it to {path.stem}")
    with reading(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        header = stream.read(size)
    if len(header) < size:
        raise UserError(f"{path}: truncated: {len(header)} bytes, where the header alone takes {size}; fetch it again")
    number = struct.unpack_from(">I", header)[0]
    if number != magic:
        raise UserError(
            f"{path}: not the IDX file it should be: found the magic number {number:#010x}, "
            f"expected {magic:#010x}; {_mistaken(number, magic)}"
        )
    return struct.unpack_from(f">{magic & 0xFF}I", header, 4)


def _mistaken(number: int, magic: int) -> str:
    """Text about a file with the magic number `number` instead of `magic`: its format, and what to do."""
    if number >> 16 == 0x1F8B:
        return "it is gzip-compressed: add .gz to its name"
    dtype, axes = TYPES.get(number >> 8), number & 0xFF
    if (number, magic) in ((IMAGES, LABELS), (LABELS, IMAGES)):
        return f"it has {'images' if number == IMAGES else 'labels'}: exchange the names of the files"
    if dtype is None or not 0 < axes < 9:
        return "fetch it again"
    return (
        f"it has {dtype} along {axes} {'axis' if axes == 1 else 'axes'}, and psmpi reads uint8 along {magic & 0xFF} "
        "here: save the four arrays as x, y, x_test and y_test with np.savez, and name that file as the data set"
    )


def _check_size(path: Path, expected: int) -> None:
    """Raise UserError unless the content of `path`, unpacked if it is a .gz file, has `expected` bytes."""
    with reading(path):
        actual = path.stat().st_size
        if path.suffix == ".gz":
            with path.open("rb") as packed:
                packed.seek(max(0, actual - 4))
                trailer = int.from_bytes(packed.read(4), "little")
            # The trailer gives the length without decompression, but only that of the last of several members.
            # Decompress to count only if it does not match.
            if trailer == expected & 0xFFFFFFFF:
                return
            actual = 0
            with gzip.open(path) as stream:
                while part := stream.read(CHUNK_BYTES):
                    actual += len(part)
    if actual != expected:
        fault = "truncated" if actual < expected else "too long"
        raise UserError(f"{path}: {fault}: found {actual} bytes, expected {expected} by its header; fetch it again")
