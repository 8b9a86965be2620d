"""Kinds of files that a stranger might send: how one is made, and what psmpi does with it."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psmpi import checkpoint
from psmpi.checkpoint.build import write_file
from psmpi.checkpoint.format import as_data, seal
from psmpi.checkpoint.scan import scan
from psmpi.checkpoint.tensors import Tensor
from psmpi.config import Config, check, from_toml, read_file, to_toml
from psmpi.data import find_doubts, identify, open_dataset, open_split
from psmpi.errors import UserError
from psmpi.inspect.look import show, state
from psmpi.layout import Runs
from psmpi.nn.layers.pattern_file import read_pattern
from psmpi.nn.zoo import make_network
from psmpi.testing.fuzz.looking import looking
from psmpi.testing.fuzz.mutations import NUMBERS, VALUES, Rng, mutate, mutate_near, mutate_plain, spelled

X = (np.arange(20 * 6, dtype=np.float32).reshape(20, 6) % 7) / 7
Y = np.arange(20) % 4


@dataclass(frozen=True)
class Kind:
    """make(rng, folder) writes a file, or a folder of them, and returns its path; use(path) opens it as psmpi does."""

    make: Callable[[Rng, Path], Path]
    use: Callable[[Path], None]


def _put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _use_data(path: Path, data_dir: Path | None = None) -> None:
    """Open a data set, look at it, and read samples, as a start of a training does."""
    dataset = open_dataset(str(path), data_dir)
    prints: list[Any] = []
    identify(dataset, prints=prints)
    list(find_doubts(dataset, prints))
    for split in (dataset.train, dataset.test):
        split.read(np.arange(min(split.n, 8)))


def _use_own(path: Path) -> None:
    """As `_use_data`, and as samples to be predicted."""
    refused: UserError | None = None
    for whole in (False, True):
        try:
            if whole:
                open_split(str(path), None, "all", predicted=True).read(np.arange(1))
            else:
                _use_data(path)
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused


# ---- checkpoints


@cache
def good_checkpoint(gzip_level: int) -> bytes:
    """A checkpoint of a small network, with vectors of Adam."""
    import tempfile

    from psmpi.config import NetworkSettings

    config = Config(model=NetworkSettings(model="mlp", widths=(8,)))
    network = make_network("mlp", (6,), 4, **config.model.shape)
    layout = network.layout()
    dataset = open_dataset("digits", None)
    contents = checkpoint.Contents(
        to_toml(config),
        (6,),
        layout,
        checkpoint.Progress(step=3, epoch=1, seconds=1.5, loss_sum=2.5, rows=({"epoch": 1, "test_accuracy": 0.5},)),
        {"t": 3},
        {"seed": 0, "samples": 20},
        {"ranks": [["host", "worker"]]},
        {"versions": {"psmpi": "0"}, "command": ["python", "-m", "psmpi.train"]},
        data=identify(dataset).table(),
    )

    def read(vector: str, tensor: Tensor, first: int, into: np.ndarray) -> None:
        into[...] = np.arange(first, first + len(into)) / 100

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-000000003.h5"
        write_file(path, contents, dict.fromkeys(("weights", "m", "v"), np.dtype("f4")), read, gzip_level)
        return path.read_bytes()


def _damaged_checkpoint(rng: Rng, folder: Path) -> Path:
    return _put(folder, "step-000000003.h5", mutate(rng, good_checkpoint(int(rng.integers(2)))))


def _use_damaged(path: Path) -> None:
    try:
        checkpoint.validate(path)
    finally:
        # In a process of its own, as the other look.
        with looking():
            scan(str(path))


def _resealed_checkpoint(rng: Rng, folder: Path) -> Path:
    data = good_checkpoint(int(rng.integers(2)))
    if rng.random() < 0.5:
        # Tables of contents, and not the numbers, most of the time.
        places = [(512, 4096), (512, len(data)), (len(data) // 2, len(data))]
        path = _put(folder, "step-000000003.h5", mutate_near(rng, data, places))
    else:
        path = _put(folder, "step-000000003.h5", data)
        _edit(rng, path)
    seal(path)
    return path


TEXTS = ("layout", "progress", "scalars", "random", "data", "placement", "provenance", "metrics", "config")


def _edit(rng: Rng, path: Path) -> None:
    """Change a text of a checkpoint, or an object of the file."""
    with h5py.File(path, "r+") as file:
        if rng.random() < 0.75:
            name = TEXTS[rng.integers(len(TEXTS))]
            text = str(file[name].asstr()[0])
            plain = name != "config"
            changed = spelled(rng, mutate_plain(rng, json.loads(text))) if plain else _toml_text(rng, text)
            del file[name]
            file.create_dataset(name, data=as_data(changed), chunks=(1,), fletcher32=bool(rng.random() < 0.9))
            return
        names = ["weights/dense1.weight", "weights/dense1.bias", "optimizer/m/dense1.weight", "provenance", "weights"]
        name = names[rng.integers(len(names))]
        kind = int(rng.integers(5))
        old = file[name].shape if isinstance(file[name], h5py.Dataset) else (4,)
        del file[name]
        _odd_object(rng, file, name, old, kind, path.parent)


def _odd_object(rng: Rng, file: h5py.File, name: str, shape: tuple[int, ...], kind: int, folder: Path) -> None:
    """An object in the place of an array, of an odd kind, type, shape, layout, or a link."""
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


def _use_resealed(path: Path) -> None:
    """What verify, show, a prediction and a resume read of it."""
    contents = checkpoint.validate(path)
    with redirect_stdout(io.StringIO()):
        found, problem = state(path)
        assert found == "whole" or problem
        show(path)
        show(path, json=True)
    model = from_toml(contents.config, str(path), foreign=True).model
    args = (contents.in_shape, contents.layout.classes)
    network = make_network(model.model, *args, **model.shape, by_step=contents.by_step, task=contents.task)
    layout = network.layout()
    w = np.empty(layout.size, np.dtype(model.dtype))
    checkpoint.load(path, layout, Runs.union([(0, layout.size)]), {"weights": w}, contents.part)


# ---- data sets of the user's own


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


def _npz(rng: Rng, folder: Path) -> Path:
    plain = io.BytesIO()
    (np.savez if rng.random() < 0.5 else np.savez_compressed)(plain, x=X, y=Y)
    if rng.random() < 0.5:
        return _put(folder, "own.npz", mutate(rng, plain.getvalue()))
    # Arrays whose headers say odd things, in a sound archive.
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


def _sparse(rng: Rng, folder: Path) -> Path:
    """Arrays of compressed rows."""
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
    return _put(folder, "own.npz", data.getvalue() if rng.random() < 0.7 else mutate(rng, data.getvalue()))


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


def _hdf5(rng: Rng, folder: Path) -> Path:
    data = _good_hdf5(int(rng.integers(6)))
    if rng.random() < 0.6:
        return _put(folder, "own.h5", mutate_near(rng, data, [(0, 2048), (0, len(data))]))
    if rng.random() < 0.3:
        return _put(folder, "own.h5", mutate(rng, data))
    path = _put(folder, "own.h5", data)
    with h5py.File(path, "r+") as file:
        name = ("x", "y")[rng.integers(2)]
        shape = file[name].shape
        del file[name]
        _odd_object(rng, file, name, shape, int(rng.integers(5)), folder)
    return path


def _svmlight(rng: Rng, folder: Path) -> Path:
    text = "".join(
        f"{y} " + " ".join(f"{k + 1}:{v:g}" for k, v in enumerate(x) if v) + "\n" for x, y in zip(X, Y, strict=True)
    )
    return _put(folder, "own.svm", mutate(rng, text.encode()))


# ---- well-known data sets


def _idx(rng: Rng, folder: Path) -> Path:
    place = folder / "mnist"
    place.mkdir()
    packed, odd = rng.random() < 0.5, int(rng.integers(4))
    number = 0
    for part, count in (("train", 20), ("t10k", 10)):
        for kind, head, size in (
            ("images-idx3", struct.pack(">IIII", 0x803, count, 3, 3), 9 * count),
            ("labels-idx1", struct.pack(">II", 0x801, count), count),
        ):
            data = head + bytes(i % 10 for i in range(size))
            if number == odd and rng.random() < 0.7:
                data = mutate_near(rng, data, [(0, len(head))]) if rng.random() < 0.6 else mutate(rng, data)
            end = data if not packed else gzip.compress(data, 1, mtime=0)
            if number == odd and packed and rng.random() < 0.5:
                end = mutate(rng, end)
            _put(place, f"{part}-{kind}-ubyte" + (".gz" if packed else ""), end)
            number += 1
    return place


BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")


def _cifar(rng: Rng, folder: Path) -> Path:
    place = folder / "cifar"
    place.mkdir()
    odd = BATCHES[rng.integers(6)]
    images = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    if rng.random() < 0.3:
        for name in BATCHES:
            record = b"".join(bytes([k]) + images[k].tobytes() for k in range(2))
            _put(place, f"{name}.bin", mutate(rng, record) if name == odd else record)
        return place
    place = place / "cifar-10-batches-py"
    place.mkdir()
    for name in BATCHES:
        data = pickle.dumps(
            {"data": images, "labels": [1, 2], "filenames": ["a", "b"]}, protocol=int(rng.integers(1, 5))
        )
        if name == odd:
            data = _odd_pickle(rng, data)
        _put(place, name, data)
    return place.parent


def _odd_pickle(rng: Rng, data: bytes) -> bytes:
    """A pickle with other bytes, or one that makes much of little."""
    kind = int(rng.integers(8))
    if kind == 0:
        # Objects of one byte.
        return (
            b"\x80\x04" + (b"]", b"}", b"\x8f", b")", b"N")[rng.integers(5)] * int(rng.choice([1000, 3_000_000])) + b"."
        )
    if kind == 1:
        # Each tuple holds the one before twice.
        end = (b".", b"K\x01s.", b"\x85.")[rng.integers(3)]
        return b"\x80\x02}K\x01" + b"2\x86" * int(rng.integers(1, 64)) + end
    if kind == 2:
        made = pickle.dumps({"data": VALUES[rng.integers(len(VALUES))], "labels": VALUES[rng.integers(len(VALUES))]})
        return made if rng.random() < 0.5 else mutate(rng, made)
    if kind == 3:
        head = data.index(b"(") if b"(" in data else 2
        return mutate_near(
            rng, data, [(0, min(200, len(data))), (head, head + 60), (max(0, len(data) - 200), len(data))]
        )
    return mutate_near(rng, data, [(0, 200), (len(data) - 120, len(data))]) if rng.random() < 0.7 else mutate(rng, data)


# ---- configurations, patterns


@cache
def _config_text() -> str:
    return to_toml(Config())


def _toml_text(rng: Rng, text: str) -> str:
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
    found = "\n".join(lines)
    if rng.random() < 0.1:
        return mutate(rng, found.encode()).decode("utf-8", "replace")
    if rng.random() < 0.02:
        return found + "\nlayers = " + "[" * int(rng.choice([90, 2000, 20000]))
    return found


LAYERS = """
[model]
model = "custom"
[[model.layers]]
kind = "convolution"
channels = 4
kernel = 3
[[model.layers]]
kind = "relu"
[[model.layers]]
kind = "dense"
units = 4
"""


def _toml(rng: Rng, folder: Path) -> Path:
    text = _config_text() if rng.random() < 0.7 else LAYERS
    return _put(folder, "own.toml", _toml_text(rng, text).encode("utf-8", "replace"))


def _use_toml(path: Path) -> None:
    config = read_file(str(path))
    check(config, set())
    make_network(config.model.model, (1, 8, 8), 4, **config.model.shape)


def _pattern(rng: Rng, folder: Path) -> Path:
    data = io.BytesIO()
    np.savez(data, format=np.array("csr"), shape=np.array([4, 6]), indptr=np.array([0, 1, 2, 3, 4]),
             indices=np.array([0, 5, 2, 3]), data=np.ones(4))  # fmt: skip
    return _put(folder, "own.npz", mutate(rng, data.getvalue()))


def _use_pattern(path: Path) -> None:
    read_pattern(str(path))


KINDS: dict[str, Kind] = {
    "checkpoint": Kind(_damaged_checkpoint, _use_damaged),
    "resealed": Kind(_resealed_checkpoint, _use_resealed),
    "npz": Kind(_npz, _use_own),
    "sparse": Kind(_sparse, _use_own),
    "hdf5": Kind(_hdf5, _use_own),
    "svmlight": Kind(_svmlight, _use_own),
    "idx": Kind(_idx, lambda path: _use_data(Path("mnist"), path)),
    "cifar": Kind(_cifar, lambda path: _use_data(Path("cifar10"), path)),
    "toml": Kind(_toml, _use_toml),
    "pattern": Kind(_pattern, _use_pattern),
}
