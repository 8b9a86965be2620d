"""Hostile files of users' data sets: npz, compressed sparse rows, HDF5, svmlight."""

from __future__ import annotations

import io
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psmpi.testing.fuzz.base import X, Y, odd_object, put
from psmpi.testing.fuzz.mutations import NUMBERS, Rng, mutate, mutate_near


def _npy(descr: str, order: str, shape: str, body: bytes, version: bytes = b"\1\0") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text.encode() + body


DESCRS = (
    "'<f4'", "'>f8'", "'|u1'", "'<i8'", "'|b1'", "'|S3'", "'<U2'", "'|O'", "'<c8'", "'|V0'", "'|S0'", "'|V99999999'",
    "[('a', '<f4')]", "'<M8[s]'", "'f'", "''", "'\\x1b[2J'", "['<f4']", "None", "'<f3'",
)  # fmt: skip
SHAPES = (
    "(20, 6)", "(20,)", "()", "(0, 6)", "(20, 0)", "(-1, 6)", "(1000000000000, 1000)", "(20, 2, 3)", "(20.0, 6)",
    "(True, 6)", "20", "('a',)", "(20, 1, 2, 3)", "(1, 1, 1, 1, 1)", "(4, 30)", "(6, 20)", "(99999999999999999999999,)",
)  # fmt: skip


def npz(rng: Rng, folder: Path) -> Path:
    plain = io.BytesIO()
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(plain, x=X, y=Y)
    if rng.random() < 0.5:
        return put(folder, "own.npz", mutate(rng, plain.getvalue()))
    # A valid archive of arrays with invalid headers.
    members = {}
    for key, values in (("x", X), ("y", Y)):
        parts = [repr(values.dtype.str), "False", str(values.shape)]
        if rng.random() < 0.7:
            parts[0] = DESCRS[rng.integers(len(DESCRS))]
        if rng.random() < 0.3:
            parts[1] = ("True", "False", "0", "None", "'x'")[rng.integers(5)]
        if rng.random() < 0.5:
            parts[2] = SHAPES[rng.integers(len(SHAPES))]
        body = values.tobytes()[: int(rng.choice([480, 160, 0, 80]))]
        data = _npy(
            parts[0], parts[1], parts[2], body, (b"\1\0", b"\2\0", b"\3\0", b"\7\0")[min(3, int(rng.exponential(0.4)))]
        )
        members[key] = mutate(rng, data) if rng.random() < 0.3 else data
    names = ("lengths", "x_test", "y_test", "x_data", "x_indices", "x_indptr", "x_shape", "arr_0", "x\x1b[2J", "X")
    with zipfile.ZipFile(folder / "own.npz", "w", 8 if rng.random() < 0.5 else 0) as archive:
        for key, data in members.items():
            for name in (key, names[rng.integers(len(names))] if rng.random() < 0.3 else ""):
                if name:
                    archive.writestr(f"{name}.npy", data)
    return folder / "own.npz"


def sparse(rng: Rng, folder: Path) -> Path:
    """An npz file of compressed sparse rows, with one array of a wrong type, value, length or shape."""
    dense = X * (X > 0.5)
    rows, columns = np.nonzero(dense)
    arrays: dict[str, Any] = {
        "x_data": dense[rows, columns], "x_indices": columns.astype(np.int32),
        "x_indptr": np.concatenate([[0], np.cumsum((dense != 0).sum(1))]).astype(np.int64),
        "x_shape": np.array(dense.shape), "y": Y,
    }  # fmt: skip
    name = list(arrays)[rng.integers(5)]
    array = arrays[name]
    kind = int(rng.integers(5))
    if kind == 0:
        array = array.astype(("f8", "i2", "u8", "S4", "c8")[rng.integers(5)])
    elif kind == 1 and array.dtype.kind in "iu":
        array = array.copy()
        array[rng.integers(len(array))] = np.array([NUMBERS[rng.integers(len(NUMBERS))] % 2**63], np.uint64).astype(
            array.dtype, casting="unsafe"
        )[0]
    elif kind == 2:
        array = array[: int(rng.integers(len(array) + 1))]
    elif kind == 3:
        array = array.reshape(-1, 1)
    arrays[name] = array
    data = io.BytesIO()
    np.savez(data, **arrays)
    return put(folder, "own.npz", data.getvalue() if rng.random() < 0.7 else mutate(rng, data.getvalue()))


@cache
def _good_hdf5(kind: int) -> bytes:
    data = io.BytesIO()
    options: list[dict[str, Any]] = [
        {}, {"chunks": True}, {"compression": "gzip", "shuffle": True, "fletcher32": True}, {"compression": "lzf"},
        {"scaleoffset": 3, "chunks": (4, 3)}, {"fletcher32": True},
    ]  # fmt: skip
    with h5py.File(data, "w", libver="latest" if kind % 2 else "earliest") as file:
        file.create_dataset("x", data=X, **options[kind])
        file.create_dataset("y", data=Y)
        file.create_dataset("lengths" if kind == 5 else "z", data=Y)
    return data.getvalue()


def hdf5(rng: Rng, folder: Path) -> Path:
    data = _good_hdf5(int(rng.integers(6)))
    if rng.random() < 0.6:
        return put(folder, "own.h5", mutate_near(rng, data, [(0, 2048), (0, len(data))]))
    if rng.random() < 0.3:
        return put(folder, "own.h5", mutate(rng, data))
    path = put(folder, "own.h5", data)
    with h5py.File(path, "r+") as file:
        name = ("x", "y")[rng.integers(2)]
        shape = file[name].shape
        del file[name]
        odd_object(rng, file, name, shape, int(rng.integers(5)), folder)
    return path


def svmlight(rng: Rng, folder: Path) -> Path:
    text = "".join(
        f"{y} " + " ".join(f"{k + 1}:{v:g}" for k, v in enumerate(x) if v) + "\n" for x, y in zip(X, Y, strict=True)
    )
    return put(folder, "own.svm", mutate(rng, text.encode()))
