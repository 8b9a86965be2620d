"""Files of strangers lead to no read of other files, and to no crash, time or memory beyond their size."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import stat
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.paths import ROOT

from psmpi import checkpoint
from psmpi.checkpoint.format import as_data, seal
from psmpi.config import from_toml
from psmpi.data import open_dataset, open_split
from psmpi.errors import DamagedError, UserError
from psmpi.files import examiner
from psmpi.files.examining import size_of
from psmpi.files.hdf5 import chunks_of, filters_of
from psmpi.files.packed import Unpacker, is_packed
from psmpi.files.whole import partial_of, written
from psmpi.inspect.compare import diff
from psmpi.inspect.figures import stats
from psmpi.inspect.flight import read_flights
from psmpi.inspect.look import show, state, verify
from psmpi.inspect.opened import Opened
from psmpi.nn.layers import LAYERS
from psmpi.nn.layers.gelu import Gelu
from psmpi.nn.layers.pattern_file import read_pattern
from psmpi.output import Screen, complain, printable, tell
from psmpi.plot import plot
from psmpi.testing.fuzz.checkpoints import good_checkpoint

X, Y = np.random.default_rng(0).random((20, 6)).astype(np.float32), np.arange(20) % 4
GROWN = 400 << 20


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """An HDF5 file, also used as raw bytes, that the files of strangers may not read."""
    path = tmp_path / "private.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = X + 41, Y
    return path


def put(file: h5py.File, name: str, text: str) -> None:
    del file[name]
    file.create_dataset(name, data=as_data(text), chunks=(1,), fletcher32=True)


def edited(path: Path, name: str, **changes: Any) -> None:
    with h5py.File(path, "r+") as file:
        put(file, name, json.dumps({**json.loads(file[name].asstr()[0]), **changes}))
    seal(path)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A sound checkpoint."""
    path = tmp_path / "run" / "checkpoints" / "step-000000003.h5"
    path.parent.mkdir(parents=True)
    path.write_bytes(good_checkpoint(0))
    assert state(path) == ("whole", "")
    return path


def external_link(file: h5py.File, private: Path) -> None:
    with h5py.File(private, "a") as private_file:
        private_file.create_dataset("right", data=file["weights/dense1.bias"][...] + 42, chunks=True)
    del file["weights/dense1.bias"]
    file["weights/dense1.bias"] = h5py.ExternalLink(str(private), "/right")


def soft_link(file: h5py.File, private: Path) -> None:
    del file["weights/dense1.bias"]
    file["weights/dense1.bias"] = h5py.SoftLink("/weights/dense2.bias")


def hard_link(file: h5py.File, private: Path) -> None:
    del file["optimizer/m"]
    file["optimizer/m"] = file["weights"]


def circle(file: h5py.File, private: Path) -> None:
    file["weights/again"] = file["weights"]


def external_storage(file: h5py.File, private: Path) -> None:
    shape = file["weights/dense1.bias"].shape
    del file["weights/dense1.bias"]
    file["weights"].create_dataset("dense1.bias", shape, "f4", external=[(str(private), 0, h5py.h5f.UNLIMITED)])


def virtual(file: h5py.File, private: Path) -> None:
    shape = file["weights/dense1.bias"].shape
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource(str(private), "x", shape)
    del file["weights/dense1.bias"]
    file["weights"].create_virtual_dataset("dense1.bias", layout)


def never_written(file: h5py.File, private: Path) -> None:
    shape = file["weights/dense1.bias"].shape
    del file["weights/dense1.bias"]
    file["weights"].create_dataset("dense1.bias", shape, "f4", chunks=True)


def other_data(file: h5py.File, private: Path) -> None:
    file["weights/more"] = np.zeros(3, "f4")


def pickled(file: h5py.File, private: Path) -> None:
    file.create_dataset("more", data=np.void(b"cos\nsystem\n"))


def lossy(file: h5py.File, private: Path) -> None:
    values = file["weights/dense1.bias"][...]
    del file["weights/dense1.bias"]
    file["weights"].create_dataset("dense1.bias", data=values, chunks=True, scaleoffset=2)


INSIDE = (
    external_link, soft_link, hard_link, circle, external_storage, virtual, never_written, other_data, pickled, lossy,
)  # fmt: skip


@pytest.mark.parametrize("change", INSIDE, ids=lambda change: change.__name__)
def test_checkpoints_have_all_their_values_themselves(good: Path, private: Path, change: Any) -> None:
    """A correct digest does not help."""
    with h5py.File(good, "r+") as file:
        change(file, private)
    seal(good)
    with pytest.raises(DamagedError, match=good.name):
        checkpoint.validate(good)
    with pytest.raises(DamagedError):
        show(good)
    assert state(good)[0] == "damaged"


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("progress", {"step": True}), ("progress", {"step": 1440.5}), ("progress", {"step": -1}),
        ("progress", {"step": "3"}), ("progress", {"epoch": 1e308}), ("progress", {"cursor": None}),
        ("progress", {"seconds": float("nan")}), ("progress", {"loss_sum": float("inf")}), ("progress", {"more": 1}),
        ("progress", {"bytes_sent": 2**64}), ("progress", {"cursor": 10**9}),
        ("scalars", {"t": float("nan")}), ("scalars", {"t": -5}),
        ("scalars", {"t": "3"}), ("scalars", {"t": True}), ("scalars", {"t": [1]}), ("random", {"samples": 2.5}),
        ("layout", {"classes": 10**8}), ("layout", {"classes": 0}), ("layout", {"in_shape": [True]}),
        ("layout", {"in_shape": "6"}), ("layout", {"task": "other"}), ("layout", {"by_step": 1}),
        ("layout", {"parameters": []}), ("data", {"outputs": "4"}), ("data", {"shape": [1.5]}),
    ],
)  # fmt: skip
def test_numbers_of_checkpoints_are_of_their_type_and_range(good: Path, text: str, changes: dict[str, Any]) -> None:
    edited(good, text, **changes)
    with pytest.raises(DamagedError, match=good.name):
        checkpoint.validate(good)


def test_metrics_may_have_losses_that_are_no_numbers_and_nothing_else(good: Path) -> None:
    for row, fine in (
        ({"epoch": 1, "test_loss": float("inf")}, True), ({"epoch": 1, "test_loss": float("nan")}, True),
        ({"epoch": 1.5}, False), ({"test_accuracy": 2.0}, False), ({"test_accuracy": float("nan")}, False),
        ({"test_loss": "1"}, False), (["epoch"], False),
    ):  # fmt: skip
        with h5py.File(good, "r+") as file:
            put(file, "metrics", json.dumps(row) + "\n")
        seal(good)
        assert state(good)[0] == ("whole" if fine else "damaged"), row


def test_a_configuration_of_another_network_is_refused_before_it_is_built(good: Path) -> None:
    for widths in ([100_000, 100_000], [9], [8, 8]):
        with h5py.File(good, "r+") as file:
            put(file, "config", f'[model]\nmodel = "mlp"\nwidths = {widths}\n')
        seal(good)
        with pytest.raises(DamagedError, match="describes a network of"):
            checkpoint.validate(good)


def test_a_network_with_a_layer_of_the_program_is_compared_with_the_layout_too(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that examines files knows psmpi's layers alone."""
    tables = '{type = "mine"}, {type = "dense", units = 7}, {type = "dense", units = 4}'
    with h5py.File(good, "r+") as file:
        put(file, "config", f'[model]\nmodel = "custom"\nlayers = [{tables}]\n')
    seal(good)
    # Without the layer the network cannot be built, and is not compared.
    checkpoint.validate(good)
    monkeypatch.setattr(LAYERS, "registered", {"mine": type("Mine", (Gelu,), {})})
    good.touch()
    with pytest.raises(DamagedError, match="describes a network of"):
        checkpoint.validate(good)


def bomb(dataset: h5py.Dataset, nbytes: int) -> None:
    """Write a first chunk that unpacks to `nbytes` zeros."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(nbytes >> 20))
    dataset.id.write_direct_chunk((0,) * dataset.ndim, packed + packer.flush())


def test_chunks_unpack_to_their_size_and_no_more(tmp_path: Path, good: Path) -> None:
    """A chunk has a thousandth of its unpacked size, and HDF5 itself would unpack all of it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "own.h5"
    for key, shape in (("x", (20, 6)), ("y", (20,))):
        with h5py.File(path, "w") as file:
            file["x"], file["y"] = X, Y
            del file[key]
            bomb(
                file.create_dataset(key, shape, "f4" if key == "x" else "i8", chunks=shape, compression="gzip"), 1 << 29
            )
        with pytest.raises(UserError, match=r"own.h5.*unpacks to more than its \d+ bytes"):
            open_dataset(str(path), None).train.read(np.arange(3))
    with h5py.File(good, "r+") as file:
        shape = file["weights/dense1.bias"].shape
        del file["weights/dense1.bias"]
        dataset = file["weights"].create_dataset(
            "dense1.bias", shape, "f4", chunks=shape, compression="gzip", shuffle=True
        )
        bomb(dataset, 1 << 29)
    seal(good)
    with pytest.raises(DamagedError, match="unpacks to more than"):
        checkpoint.validate(good)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWN


@pytest.mark.slow
def test_a_text_that_unpacks_to_two_gigabytes_is_not_unpacked(good: Path) -> None:
    size = 2_000_000_000
    with h5py.File(good, "r+") as file:
        del file["provenance"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1,))
        properties.set_deflate(9)
        kind = h5py.h5t.py_create(h5py.string_dtype("utf-8", size), logical=True)
        h5py.h5d.create(file.id, b"provenance", kind, h5py.h5s.create_simple((1,)), properties)
        bomb(file["provenance"], size)
    seal(good)
    with pytest.raises(DamagedError, match="wrong length"):
        checkpoint.validate(good)


PACKED: list[dict[str, Any]] = [
    {"compression": "gzip"}, {"compression": "gzip", "shuffle": True}, {"compression": 9, "fletcher32": True},
    {"compression": "gzip", "shuffle": True, "fletcher32": True},
]  # fmt: skip


@pytest.mark.parametrize("options", PACKED)
@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((20, 6), (7, 4)), ((5,), (2,)), ((9, 3, 4, 5), (2, 3, 3, 2)), ((6, 3), (1, 3)), ((4, 5), (4, 1))],
)
@pytest.mark.parametrize("dtype", ["f4", ">f8", "u1", "<i2", "?"])
def test_packed_arrays_are_those_that_hdf5_reads(
    tmp_path: Path, options: dict[str, Any], shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str
) -> None:
    values = (np.random.default_rng(1).random(shape) * 99).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=values, chunks=chunks, **options)
    with h5py.File(tmp_path / "a.h5") as file:
        assert is_packed(file["x"])
        unpacker = Unpacker(file["x"])
        assert np.array_equal(unpacker.read(), values)
        rows = np.array([0, 0, *range(1, shape[0], 2)])
        parts = [part for _, part in unpacker.pieces(rows)]
        assert np.array_equal(np.concatenate(parts), values[rows])


def test_chunks_that_were_written_without_a_filter_and_damaged_ones(tmp_path: Path) -> None:
    values = np.arange(24, dtype="f4")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", (24,), "f4", chunks=(12,), compression="gzip", fletcher32=True)
        names = filters_of(dataset)
        dataset[:12] = values[:12]
        # The mask has a bit for each filter that was left out.
        dataset.id.write_direct_chunk((12,), values[12:].tobytes(), filter_mask=2 ** len(names) - 1)
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(Unpacker(file["x"]).read(), values) and np.array_equal(file["x"][...], values)
        assert [chunk.size for chunk in chunks_of(file["x"])][1] == 48
    sound = zlib.compress(bytes(48))
    for checked, damage, says in (
        (True, sound, "checksum"), (False, b"\x78\x9c\x00", "cannot be unpacked"), (False, sound[:-3], "ends early"),
        (False, zlib.compress(bytes(40)), "has 40 bytes, and should have 48"),
    ):  # fmt: skip
        with h5py.File(tmp_path / "a.h5", "w") as file:
            dataset = file.create_dataset("x", (12,), "f4", chunks=(12,), compression="gzip", fletcher32=checked)
            dataset.id.write_direct_chunk((0,), damage)
        with h5py.File(tmp_path / "a.h5") as file, pytest.raises(OSError, match=says):
            Unpacker(file["x"]).read()


@pytest.mark.parametrize("key", ["x", "y"])
@pytest.mark.parametrize("way", ["link", "group", "virtual", "storage", "soft"])
def test_data_read_no_other_file_unless_that_is_allowed(tmp_path: Path, private: Path, key: str, way: str) -> None:
    path = tmp_path / "own.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = X, Y
        del file[key]
        if way == "link":
            file[key] = h5py.ExternalLink(str(private), key)
        elif way == "group":
            file["far"] = h5py.ExternalLink(str(private), "/")
            file[key] = h5py.SoftLink(f"/far/{key}")
        elif way == "soft":
            file["near/far"] = h5py.ExternalLink(str(private), key)
            file["again"] = h5py.SoftLink("near/far")
            file[key] = h5py.SoftLink("again")
        elif way == "virtual":
            shape = {"x": (20, 6), "y": (20,)}[key]
            layout = h5py.VirtualLayout(shape, "f4" if key == "x" else "i8")
            layout[...] = h5py.VirtualSource(str(private), key, shape)
            file.create_virtual_dataset(key, layout)
        else:
            external = [(str(private), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset(key, (20, 6) if key == "x" else (20,), "f4" if key == "x" else "i8", external=external)
    for opening in (open_dataset, lambda *names: open_split(*names, "all")):
        with pytest.raises(UserError, match=r"another file|other files"):
            opening(str(path), None)
    if way != "storage":
        train = open_dataset(str(path), None, external=True).train
        assert np.allclose(train.read(np.arange(1)), X[:1] + 41) or key == "y"
    # Links inside the file are followed.
    with h5py.File(path, "w") as file:
        file["g/x"], file["y"], file["x"] = X, Y, h5py.SoftLink("g/x")
    assert open_dataset(str(path), None).train.n == 16


def test_a_checkpoint_does_not_say_that_other_files_may_be_read(train: Any, tmp_path: Path, private: Path) -> None:
    """A resumed run reads other files only if its own command allows that."""
    path = tmp_path / "own.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = h5py.ExternalLink(str(private), "x"), Y
    options = ("--dataset", path, "--model", "linear", "--batch-size", "4", "--epochs", "1")
    with pytest.raises(AssertionError, match="--allow-external"):
        train(1, *options)
    assert not from_toml("[data]\nallow_external = true\n", "a file", foreign=True).data.allow_external
    training = train(1, *options, "--allow-external")
    text = checkpoint.read_contents(training.checkpoint).config
    assert "allow_external = false" in text
    with h5py.File(training.checkpoint, "r+") as file:
        put(file, "config", text.replace("allow_external = false", "allow_external = true"))
    seal(training.checkpoint)
    with pytest.raises(AssertionError, match="--allow-external"):
        train(1, "--resume", training.checkpoint, "--epochs", "2")
    train(1, "--resume", training.checkpoint, "--epochs", "2", "--allow-external")


@pytest.mark.parametrize(
    ("optimizer", "scalar", "value", "range_"),
    [
        ("lbfgs", "count", 10**9, "a whole number from 0 to 10"), ("lbfgs", "head", 10, "a whole number from 0 to 9"),
        ("lbfgs-tr", "radius", 0.0, "a number from"), ("lbfgs", "count", 1.0, "a whole number from 0 to 10"),
    ],
)  # fmt: skip
def test_scalars_are_what_an_optimizer_can_have(
    train: Any, optimizer: str, scalar: str, value: Any, range_: str
) -> None:
    options = ("--model", "linear", "--optimizer", optimizer, "--max-steps")
    path = train(1, *options, "2").checkpoint
    edited(path, "scalars", **{scalar: value})
    with pytest.raises(AssertionError, match=rf"scalars: {scalar} is .*should be {range_}"):
        train(1, *options, "4", "--resume", path)


def images() -> dict[str, Any]:
    return {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}


PICKLES = {
    "sets of one byte": (b"\x80\x04" + b"\x8f" * 5_000_000 + b".", "operations"),
    "a key whose hash takes 2^60 steps": (b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.", "more time"),
    "a shape that is 2^60 numbers": (
        pickle.dumps(images(), 2).replace(b"K\x02M\x00\x0c\x86", b"K\x01" + b"2\x86" * 60, 1), "fetch|time"),
    "keys of other types": (pickle.dumps({10**5000: 1, ("a",): 2}, 4), "the keys"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_take_no_more_than_their_size_explains(tmp_path: Path, name: str) -> None:
    content, says = PICKLES[name]
    for batch in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        (tmp_path / batch).write_bytes(pickle.dumps(images(), 2))
    (tmp_path / "data_batch_1").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.warns(UserWarning, match="pickles"), pytest.raises(UserError, match=f"data_batch_1.*({says})"):
        open_dataset("cifar10", tmp_path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWN


def test_a_file_that_ends_the_process_that_looks_at_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process then examines the next file."""
    # The limits of the process itself end it.
    monkeypatch.setattr(examiner, "PATIENCE", 1000)
    path = tmp_path / "own.h5"
    path.write_bytes(b"x" * 100)
    with pytest.raises(DamagedError, match=r"own.h5 is damaged.*SIGSEGV"):
        examiner.examine("psmpi.testing.fuzz.greedy:crash", path)
    with pytest.raises(DamagedError, match=r"own.h5 is damaged.*more memory to open than its 100 bytes"):
        examiner.examine("psmpi.testing.fuzz.greedy:fill", path)
    with pytest.raises(DamagedError, match=r"own.h5 is damaged.*more time to open than its 100 bytes"):
        examiner.examine("psmpi.testing.fuzz.greedy:spin", path)
    good = tmp_path / "good.h5"
    with h5py.File(good, "w") as file:
        file["x"], file["y"] = X, Y
    assert open_dataset(str(good), None).train.n == 16


def test_a_file_with_holes_explains_no_more_than_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "own.h5"
    with path.open("wb") as file:
        file.write(b"x" * 100)
        file.truncate(1 << 40)
    assert size_of(path) < 1 << 20 and size_of(tmp_path / "none") == 0
    with pytest.raises(DamagedError, match="more memory to open"):
        examiner.examine("psmpi.testing.fuzz.greedy:fill", path)


def test_what_waits_for_another_program_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examiner, "PATIENCE", 0.5)
    path = tmp_path / "own.h5"
    path.write_bytes(b"x")
    with pytest.raises(DamagedError, match=r"own.h5 is damaged.*more time"):
        examiner.examine("psmpi.testing.fuzz.greedy:wait", path)


CODES = "a\x1b[31m\x1b]0;title\x07\x9b2J\u202eb\x08\x00"


def test_no_codes_for_terminals_come_from_files(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(good, "r+") as file:
        text = str(file["config"].asstr()[0])
        put(file, "provenance", json.dumps({"host": CODES, CODES: [CODES, 3], "versions": {CODES: CODES}}))
        put(file, "placement", json.dumps({CODES: CODES}))
        put(file, "config", text.replace('dataset = "digits"', f"dataset = {json.dumps(CODES)}"))
    seal(good)
    show(good)
    verify((good,))
    tell(CODES)
    complain(CODES)
    Screen().tell(CODES)
    Screen().print(CODES, markup=False)
    printed = "".join(capsys.readouterr())
    assert "title" in printed and not set(printed) & set("\x1b\x07\x9b\u202e\x08\x00")
    assert printable("tab\tline\nnext é 漢") == "tab\tline\nnext é 漢"


def test_errors_say_names_of_arrays_without_codes_for_terminals(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", **{f"x{CODES.strip(chr(0))}": X})
    process = subprocess.run(
        [sys.executable, "-m", "psmpi.train", "--dataset", tmp_path / "own.npz"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert process.returncode == 1 and "\\x1b[31m" in process.stderr and "\x1b" not in process.stderr + process.stdout


def test_files_are_written_whole_under_names_that_nobody_guesses(tmp_path: Path) -> None:
    target, secret = tmp_path / "a.txt", tmp_path / "secret"
    secret.write_text("kept")
    assert partial_of(target) != partial_of(target) and len(partial_of(target).name) > 20
    target.symlink_to(secret)
    old = os.umask(0o027)
    try:
        with written(target) as file:
            file.write(b"new")
    finally:
        os.umask(old)
    assert secret.read_text() == "kept" and target.read_bytes() == b"new" and not target.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    with pytest.raises(ValueError), written(target) as file:
        file.write(b"half")
        raise ValueError
    assert target.read_bytes() == b"new" and sorted(tmp_path.iterdir()) == [target, secret]


def test_a_run_writes_through_no_link_and_as_the_umask_says(train: Any, tmp_path: Path) -> None:
    """Links under the names of a run's files are not followed, and the modes of files follow the umask."""
    secret, out = tmp_path / "secret", tmp_path / "run"
    secret.write_text("kept")
    (out / "checkpoints").mkdir(parents=True)
    for name in (".config.toml.part", ".metrics.jsonl.part", "checkpoints/.step-000000002.h5.part", "flight.jsonl"):
        (out / name).symlink_to(secret)
    old = os.umask(0o077)
    try:
        train(1, "--model", "linear", "--max-steps", "2", out=out)
    finally:
        os.umask(old)
    assert secret.read_text() == "kept"
    files = [path for path in out.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {path.name for path in files} >= {"config.toml", "metrics.jsonl", "step-000000002.h5"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_names_in_checkpoints_are_no_markup(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network with unknown layers is not built, so names in the layout are not compared with its names."""
    with h5py.File(good, "r+") as file:
        layout = json.loads(file["layout"].asstr()[0])
        for number, parameter in enumerate(layout["parameters"]):
            name, mark = parameter["name"], ("[/b]", "[link=http:x]", ":boom:", "[red]")[number % 4]
            parameter["name"] = f"{mark}{name}"
            for group in ("weights", "optimizer/m", "optimizer/v"):
                file.move(f"{group}/{name}", f"{group}/{parameter['name']}")
        text = str(file["config"].asstr()[0])
        layers = 'model = "custom"\nlayers = [{type = "unheard"}]'
        put(file, "config", text.replace('model = "mlp"', layers).replace("layers = []\n", ""))
        put(file, "layout", json.dumps(layout))
    seal(good)
    for command in (show, stats, lambda path: diff(path, path)):
        command(good)
        printed = capsys.readouterr().out
        for mark in ("[link=http:x]dense1.bias", ":boom:dense2.weight"):
            assert mark in printed.replace(" ", "") or command is stats


def test_a_checkpoint_names_no_file_of_a_pattern(good: Path, tmp_path: Path) -> None:
    """A pipe in the place of the pattern would block its reader."""
    os.mkfifo(tmp_path / "pattern.npz")
    table = f'{{type = "sparse", units = 4, pattern = "{tmp_path / "pattern.npz"}"}}'
    inner = f'{{type = "residual", layers = [{table}]}}'
    with h5py.File(good, "r+") as file:
        text = str(file["config"].asstr()[0]).replace('model = "mlp"', 'model = "custom"')
        put(file, "config", text.replace("layers = []", f"layers = [{inner}]"))
    seal(good)
    with pytest.raises(DamagedError, match="config, pattern"):
        checkpoint.validate(good)


@pytest.mark.parametrize("name", ["elements", "elements/a/b", "rank/a/b", "elements2", "ranks/a"])
def test_tables_of_checkpoints_are_tables(good: Path, name: str) -> None:
    with h5py.File(good, "r+") as file:
        file[name] = np.zeros((3, 2), "f4")
    seal(good)
    with pytest.raises(DamagedError, match=r"is no table|is not part of"):
        checkpoint.validate(good)


@pytest.mark.parametrize("shape", [(10**12, 0), (0, 3), (0,), (7, 3), (3_000_000, 1)])
def test_tables_of_many_rows_are_compared_some_at_a_time(
    good: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...]
) -> None:
    with h5py.File(good, "r+") as file:
        file.create_dataset("elements/a", shape, "u1", chunks=None)
        if 0 not in shape:
            file["elements/a"][...] = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    seal(good)
    diff(good, good)
    assert "bit-identical" in capsys.readouterr().out
    if 0 not in shape:
        opened = Opened(good)
        rows = np.concatenate([piece.copy() for piece in opened.rows(next(iter(opened.tables)))])
        assert rows.tobytes() == np.arange(np.prod(shape), dtype=np.uint8).tobytes()


ROWS = {
    "a pipe": (None, "it is no regular file"),
    "a line of a gigabyte": (b"", "line 1 has 16,777,216 bytes or more"),
    "lists in lists": (b'{"epoch":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "values in values"),
    "no row": (b"[1]\n", "line 1 is no row"),
    "a text": (b'{"epoch": 1, "test_accuracy": "x"}\n', "test_accuracy is 'x', and no number"),
    "a number beyond all": (b'{"epoch": 1' + b"0" * 400 + b', "test_accuracy": 1}\n', "epoch is '10000"),
    "no text": (b"\xff\xfe", "decode"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_runs_are_rows_of_numbers(tmp_path: Path, kind: str) -> None:
    content, message = ROWS[kind]
    path = tmp_path / "metrics.jsonl"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
        if not content:
            os.truncate(path, 1 << 30)
    with pytest.raises(UserError, match=message):
        plot((str(tmp_path),), out=tmp_path / "a.png")
    with pytest.raises(DamagedError, match=r"holds no operations"):
        read_flights(path)


def test_labels_of_curves_have_no_codes_for_terminals(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Matplotlib warns of characters that it cannot draw."""
    run = tmp_path / "a\x1b[31m"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"epoch": 1, "test_accuracy": 0.5}\n')
    plot((str(run),), out=tmp_path / "a.png")
    assert "\x1b" not in "".join([*capsys.readouterr(), *(str(warning.message) for warning in recwarn)])


@pytest.mark.parametrize("read", [checkpoint.validate, lambda path: read_pattern(str(path))])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(UserError, match=r"is not? (a )?regular file"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("wrong", [10**15, -1, -5])
def test_minibatches_in_flight_are_of_training_samples(train: Any, tmp_path: Path, wrong: int) -> None:
    training = train(1, "--method", "dni", "--max-steps", "4", "--epochs", "1", out=tmp_path / "run")
    with h5py.File(training.checkpoint, "r+") as file:
        samples = file["dni_samples/samples"]
        samples[...] = np.full(samples.shape, wrong)
    seal(training.checkpoint)
    with pytest.raises(AssertionError, match="are not training samples of this data set"):
        train(1, "--resume", training.checkpoint, "--max-steps", "8")


def test_sizes_that_only_the_directory_of_a_zip_file_claims(tmp_path: Path) -> None:
    """Labels of 8 bytes a sample would be allocated before a sample is read."""
    header, count, path = io.BytesIO(), 10**11, tmp_path / "own.npz"
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (count, 4)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
        # Written at the end, when the archive is closed.
        archive.infolist()[0].file_size = archive.infolist()[0].compress_size = len(header.getvalue()) + 4 * count
    with pytest.raises(UserError, match="says more bytes than the file has"):
        open_split(str(path), None, "all")


def test_names_that_are_not_utf_8_are_no_reason_to_fail(tmp_path: Path) -> None:
    path = tmp_path / "own.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = X, Y
        file.id.links.create_soft(b"\xff\xfe", b"x")
    assert open_dataset(str(path), None).train.n == 16
    with h5py.File(path, "r+") as file:
        del file["y"]
    with pytest.raises(UserError, match="no array 'y'"):
        open_dataset(str(path), None)


def test_names_in_an_archive_that_are_not_utf_8_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, x=X, y=Y, é=Y)
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xfe"))
    with pytest.raises(UserError, match="damaged, truncated or not of the format"):
        open_dataset(str(path), None)
