"""psmpi.data: reading data sets, refusing bad files, and making minibatches."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.datasets import CIFAR_NAMES, make_cifar, real, write
from hypothesis import given
from hypothesis import strategies as st

from psmpi.data import DATASETS, Batch, Minibatches, Resident, Split, open_dataset, open_split
from psmpi.data.files import CHUNK_BYTES, fill
from psmpi.data.peaks import peaks
from psmpi.errors import UserError

MNIST_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def make_mnist(folder: Path, end: str = "", n: int = 23, n_test: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    arrays = {
        MNIST_NAMES[0]: rng.integers(0, 256, (n, 5, 4)),
        MNIST_NAMES[1]: rng.integers(0, 10, n),
        MNIST_NAMES[2]: rng.integers(0, 256, (n_test, 5, 4)),
        MNIST_NAMES[3]: rng.integers(0, 10, n_test),
    }
    for name, values in arrays.items():
        write(folder / (name + end), idx(values))
    return arrays


def make_cifar_pickles(folder: Path, protocol: int = 2) -> list[np.ndarray]:
    batches = make_cifar(folder / "unused")
    for name, records in zip(CIFAR_NAMES, batches, strict=True):
        content = {
            b"data": records[:, 1:].copy(),
            b"labels": records[:, 0].tolist(),
            b"batch_label": b"a batch",
        }
        write(folder / name, pickle.dumps(content, protocol))
    for name in CIFAR_NAMES:
        (folder / "unused" / f"{name}.bin").unlink()
    return batches


def save(path: Path, packed: bool = False, **arrays: Any) -> str:
    if path.suffix == ".npz":
        (np.savez_compressed if packed else np.savez)(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, values in arrays.items():
                options = {"compression": "gzip", "chunks": True} if packed and np.ndim(values) > 1 else {}
                file.create_dataset(key, data=values, **options)
    return str(path)


def expect_error(*fragments: str, name: str, data_dir: Path | None = None) -> None:
    with pytest.raises(UserError) as caught:
        open_dataset(name, data_dir)
    for fragment in fragments:
        assert fragment in str(caught.value)


def assert_reads(split: Split, x: np.ndarray, y: np.ndarray) -> None:
    """The split holds exactly x and y, and reads of some rows equal picking them from a read of all."""
    flat = x.reshape(len(x), -1)
    assert split.n == len(y) == len(split.labels)
    assert split.labels.dtype == np.int64
    np.testing.assert_array_equal(split.labels, y)
    rng = np.random.default_rng(3)
    for rows in (
        np.arange(split.n),
        np.arange(split.n)[::-1],
        np.arange(0, split.n, 3),
        rng.integers(0, split.n, 2 * split.n),
        np.array([split.n - 1]),
        np.empty(0, np.int64),
    ):
        values = split.read(rows)
        assert values.dtype == split.dtype == x.dtype.newbyteorder("=")
        assert values.flags.c_contiguous and values.flags.writeable
        assert values.shape == (len(rows), flat.shape[1])
        np.testing.assert_array_equal(values, flat[rows])


@pytest.fixture(params=[None, 64])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default size of chunks, and one so small that every file takes many chunks."""
    if request.param:
        monkeypatch.setattr("psmpi.data.files.CHUNK_BYTES", request.param)


# ---------------------------------------------------------------------------------- names and digits


def test_unknown_name_lists_the_choices(tmp_path: Path) -> None:
    expect_error("'minst'", *DATASETS, ".npz", ".hdf5", ".txt", name="minst", data_dir=tmp_path)


def test_digits_are_split_by_every_fifth_sample_and_ignore_the_data_dir(tmp_path: Path) -> None:
    data = open_dataset("digits", tmp_path / "nowhere")
    assert (data.name, data.outputs, data.shape) == ("digits", 10, (1, 8, 8))
    assert (data.train.n, data.test.n) == (1438, 359)
    assert data.train.scale == 1 / 16
    assert data.train.dtype == np.uint8
    x = data.train.read(np.arange(1438))
    assert (x.min(), x.max()) == (0, 16)


def test_digits_equal_the_copy_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    data = open_dataset("digits", None)
    held_out = np.arange(1797) % 5 == 4
    assert_reads(data.train, bunch.data[~held_out].astype(np.uint8), bunch.target[~held_out])
    assert_reads(data.test, bunch.data[held_out].astype(np.uint8), bunch.target[held_out])


def test_peaks_are_fifths_of_the_function_and_always_the_same() -> None:
    data = open_dataset("peaks", None)
    assert (data.name, data.outputs, data.shape, data.train.n, data.test.n) == ("peaks", 5, (2,), 5000, 1250)
    points = np.concatenate([split.read(np.arange(split.n)) for split in (data.train, data.test)])
    labels = np.concatenate([data.train.labels, data.test.labels])
    assert np.abs(points).max() <= 3 and np.bincount(labels).tolist() == [1250] * 5
    x, y = points.T
    # The formula of MATLAB's help.
    values = (
        3 * (1 - x) ** 2 * np.exp(-(x**2) - (y + 1) ** 2)
        - 10 * (x / 5 - x**3 - y**5) * np.exp(-(x**2) - y**2)
        - 1 / 3 * np.exp(-((x + 1) ** 2) - y**2)
    )
    fifths = [values[labels == k] for k in range(5)]
    assert all(low.max() < high.min() for low, high in pairwise(fifths))
    assert peaks(np.zeros((1, 2)))[0] == pytest.approx(3 * np.exp(-1) - np.exp(-1) / 3)
    assert np.array_equal(open_dataset("peaks", None).train.read([3]), data.train.read([3]))


def test_a_damaged_copy_of_the_digits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psmpi.data.digits.files", lambda package: tmp_path)
    for content in (b"1,2,3\n", b"a,b\n", b""):
        write(tmp_path / "digits.csv.gz", content)
        if content:
            expect_error("digits.csv.gz", "install psmpi again", name="digits")
    (tmp_path / "digits.csv.gz").write_bytes(b"junk")
    expect_error("digits.csv.gz", name="digits")
    (tmp_path / "digits.csv.gz").unlink()
    expect_error("digits.csv.gz", name="digits")


def test_labels_cannot_be_changed_by_accident() -> None:
    labels = open_dataset("digits", None).train.labels
    with pytest.raises(ValueError, match="read-only"):
        labels[0] = 1


def test_reading_refuses_rows_that_are_not_there(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    train = open_dataset("mnist", tmp_path).train
    for rows in ([0, train.n], [-1], [train.n]):
        with pytest.raises(IndexError, match=r"0\.\.22 only"):
            train.read(rows)
    with pytest.raises(TypeError):
        train.read(np.array([0.0]))
    with pytest.raises(ValueError, match="vector"):
        train.read(np.array([[0]]))


# ---------------------------------------------------------------------------------- MNIST


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "mnist", "MNIST/raw"])
def test_mnist_is_found_and_read(tmp_path: Path, folder: str, end: str) -> None:
    arrays = list(make_mnist(tmp_path / folder, end).values())
    data = open_dataset("mnist", tmp_path)
    assert (data.name, data.outputs, data.shape, data.train.scale) == ("mnist", 10, (1, 5, 4), 1 / 255)
    assert_reads(data.train, arrays[0].astype(np.uint8), arrays[1])
    assert_reads(data.test, arrays[2].astype(np.uint8), arrays[3])


def test_mnist_accepts_names_with_a_dot(tmp_path: Path) -> None:
    arrays = make_mnist(tmp_path)
    for name in arrays:
        (tmp_path / name).rename(tmp_path / name.replace("-idx", ".idx"))
    assert open_dataset("mnist", str(tmp_path)).train.n == 23


def test_mnist_takes_all_files_from_one_folder(tmp_path: Path) -> None:
    make_mnist(tmp_path / "mnist", n=9)
    write(tmp_path / MNIST_NAMES[0], idx(np.zeros((1, 5, 4))))
    assert open_dataset("mnist", tmp_path).train.n == 9
    for name in MNIST_NAMES[1:]:
        write(tmp_path / name, (tmp_path / "mnist" / name).read_bytes())
    (tmp_path / "mnist" / MNIST_NAMES[2]).unlink()
    expect_error(MNIST_NAMES[0], "9 labels", name="mnist", data_dir=tmp_path)


def test_mnist_in_a_gzip_file_of_several_members_is_read(tmp_path: Path) -> None:
    arrays = make_mnist(tmp_path, ".gz")
    path = tmp_path / (MNIST_NAMES[0] + ".gz")
    content = idx(arrays[MNIST_NAMES[0]])
    path.write_bytes(gzip.compress(content[:100]) + gzip.compress(content[100:]))
    assert_reads(open_dataset("mnist", tmp_path).train, arrays[MNIST_NAMES[0]].astype(np.uint8), arrays[MNIST_NAMES[1]])


def test_mnist_needs_a_data_dir() -> None:
    expect_error("mnist", "--data-dir", name="mnist")


def test_mnist_with_a_missing_data_dir_is_refused(tmp_path: Path) -> None:
    expect_error(str(tmp_path / "no"), "no such directory", name="mnist", data_dir=tmp_path / "no")


def test_mnist_without_files_lists_the_directories_searched(tmp_path: Path) -> None:
    folders = [str(tmp_path), str(tmp_path / "mnist"), str(tmp_path / "MNIST" / "raw")]
    expect_error(*MNIST_NAMES, *folders, name="mnist", data_dir=tmp_path)


@pytest.mark.parametrize("name", MNIST_NAMES)
def test_mnist_with_one_file_missing_names_it(tmp_path: Path, name: str) -> None:
    make_mnist(tmp_path)
    (tmp_path / name).unlink()
    expect_error(str(tmp_path), f"missing {name}", name="mnist", data_dir=tmp_path)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name", MNIST_NAMES)
@pytest.mark.parametrize("keep", [-1, 6, 0])
def test_mnist_truncated_inside_is_refused_at_opening(tmp_path: Path, name: str, end: str, keep: int) -> None:
    content = idx(make_mnist(tmp_path, end)[name])
    write(tmp_path / (name + end), content[:keep])
    expect_error(name, "truncated", name="mnist", data_dir=tmp_path)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name", MNIST_NAMES)
def test_mnist_with_bytes_left_over_is_refused(tmp_path: Path, name: str, end: str) -> None:
    content = idx(make_mnist(tmp_path, end)[name])
    write(tmp_path / (name + end), content + b"\0")
    expect_error(name, "too long", str(len(content)), name="mnist", data_dir=tmp_path)


@pytest.mark.parametrize("name", MNIST_NAMES)
def test_mnist_whose_gzip_file_is_cut_short_is_refused(tmp_path: Path, name: str) -> None:
    make_mnist(tmp_path, ".gz")
    path = tmp_path / (name + ".gz")
    path.write_bytes(path.read_bytes()[:-9])
    expect_error(str(path), "truncated", name="mnist", data_dir=tmp_path)


def test_mnist_whose_gzip_checksum_is_wrong_is_refused_when_any_row_is_read(tmp_path: Path) -> None:
    make_mnist(tmp_path, ".gz")
    path = tmp_path / (MNIST_NAMES[0] + ".gz")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    train = open_dataset("mnist", tmp_path).train
    with pytest.raises(UserError, match="damaged") as caught:
        train.read(np.array([0]))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", MNIST_NAMES)
def test_mnist_whose_compressed_data_are_damaged_is_refused(tmp_path: Path, name: str) -> None:
    make_mnist(tmp_path, ".gz")
    path = tmp_path / (name + ".gz")
    content = bytearray(path.read_bytes())
    content[10] = 0b111
    path.write_bytes(content)
    expect_error(str(path), "damaged", name="mnist", data_dir=tmp_path)


def test_mnist_whose_gzip_file_changes_its_length_after_opening_is_refused(tmp_path: Path) -> None:
    content = idx(make_mnist(tmp_path, ".gz")[MNIST_NAMES[0]])
    train = open_dataset("mnist", tmp_path).train
    for changed, fault in (
        (content[:-20], "end 20"),
        (content[:9], "end 7"),
        (content + b"\0", "more bytes"),
    ):
        write(tmp_path / (MNIST_NAMES[0] + ".gz"), changed)
        with pytest.raises(UserError, match=fault):
            train.read(np.arange(train.n))


def test_a_stream_that_hands_over_little_at_a_time_is_read_in_full() -> None:
    class Dribble(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:3])

    buffer = bytearray(10)
    assert fill(Dribble(b"0123456789abc"), memoryview(buffer)) == 10
    assert buffer == b"0123456789"
    assert fill(Dribble(b"0123"), memoryview(buffer)) == 4


def test_mnist_named_gz_but_not_compressed_is_refused(tmp_path: Path) -> None:
    arrays = make_mnist(tmp_path, ".gz")
    (tmp_path / (MNIST_NAMES[0] + ".gz")).write_bytes(idx(arrays[MNIST_NAMES[0]]))
    advice = f"not compressed by gzip, though its name ends in .gz; rename it to {MNIST_NAMES[0]}"
    expect_error(MNIST_NAMES[0] + ".gz", advice, name="mnist", data_dir=tmp_path)


def test_mnist_compressed_but_not_named_gz_is_refused_with_that_advice(tmp_path: Path) -> None:
    arrays = make_mnist(tmp_path)
    (tmp_path / MNIST_NAMES[0]).write_bytes(gzip.compress(idx(arrays[MNIST_NAMES[0]])))
    expect_error(MNIST_NAMES[0], "add .gz", name="mnist", data_dir=tmp_path)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("name", MNIST_NAMES)
def test_mnist_with_a_wrong_magic_number_is_refused(tmp_path: Path, name: str, end: str) -> None:
    content = idx(make_mnist(tmp_path, end)[name])
    write(tmp_path / (name + end), b"\0\0\x0d" + content[3:])
    expected = "0x00000803" if "images" in name else "0x00000801"
    expect_error(name, "0x00000d0", expected, name="mnist", data_dir=tmp_path)


@pytest.mark.parametrize("index", [1, 3])
def test_mnist_with_more_images_than_labels_is_refused(tmp_path: Path, index: int) -> None:
    arrays = make_mnist(tmp_path)
    write(tmp_path / MNIST_NAMES[index], idx(arrays[MNIST_NAMES[index]][:-1]))
    expect_error(MNIST_NAMES[index - 1], MNIST_NAMES[index], "labels", name="mnist", data_dir=tmp_path)


@pytest.mark.parametrize("index", [1, 3])
def test_mnist_with_a_label_above_nine_is_refused(tmp_path: Path, index: int) -> None:
    labels = make_mnist(tmp_path)[MNIST_NAMES[index]]
    labels[4] = 10
    write(tmp_path / MNIST_NAMES[index], idx(labels))
    expect_error(MNIST_NAMES[index], "10 of sample 4", "0..9", name="mnist", data_dir=tmp_path)


def test_mnist_with_test_images_of_another_size_is_refused(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    write(tmp_path / MNIST_NAMES[2], idx(np.zeros((7, 4, 5))))
    expect_error(MNIST_NAMES[2], "4 x 5", "5 x 4", name="mnist", data_dir=tmp_path)


def typed(values: np.ndarray, code: int, dtype: str) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, code, values.ndim, *values.shape) + values.astype(dtype).tobytes()


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "code", "dtype", "shape", "says"),
    [
        (MNIST_NAMES[0], 13, ">f4", (23, 5, 4), "it has float32 along 3 axes, and psmpi reads uint8 along 3"),
        (MNIST_NAMES[1], 12, ">i4", (23,), "it has int32 along 1 axis, and psmpi reads uint8 along 1"),
        (MNIST_NAMES[3], 12, ">i4", (7, 8), "it has int32 along 2 axes"),
        (MNIST_NAMES[2], 8, ">u1", (7, 5, 4, 3), "it has uint8 along 4 axes"),
        (MNIST_NAMES[0], 8, ">u1", (23,), "it has labels: exchange the names"),
        (MNIST_NAMES[1], 8, ">u1", (23, 5, 4), "it has images: exchange the names"),
    ],
)
def test_idx_files_of_other_kinds_are_called_what_they_are(
    tmp_path: Path, end: str, name: str, code: int, dtype: str, shape: tuple[int, ...], says: str
) -> None:
    make_mnist(tmp_path, end)
    write(tmp_path / (name + end), typed(np.ones(shape), code, dtype))
    expect_error(name, says, name="mnist", data_dir=tmp_path)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(("low", "high", "y"), [(1, 26, "y - 1"), (0, 46, "y")])
def test_idx_files_of_more_classes_are_to_be_saved_otherwise(
    tmp_path: Path, end: str, low: int, high: int, y: str
) -> None:
    make_mnist(tmp_path, end, n=200)
    write(tmp_path / (MNIST_NAMES[1] + end), idx(np.arange(200) % (high - low + 1) + low))
    says = (f"labels 0..9, and these are {low}..{high}", f"with np.savez, with {y} for y")
    expect_error(MNIST_NAMES[1], "labels are out of range", *says, name="mnist", data_dir=tmp_path)


def test_mnist_without_images_is_refused(tmp_path: Path) -> None:
    make_mnist(tmp_path, n=0)
    expect_error(MNIST_NAMES[0], "empty", name="mnist", data_dir=tmp_path)


# ---------------------------------------------------------------------------------- CIFAR-10


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("folder", [".", "cifar-10-batches-bin"])
def test_cifar_binary_files_are_found_and_read(tmp_path: Path, folder: str) -> None:
    batches = make_cifar(tmp_path / folder)
    data = open_dataset("cifar10", tmp_path)
    train = np.concatenate(batches[:-1])
    assert (data.name, data.outputs, data.shape, data.test.scale) == ("cifar10", 10, (3, 32, 32), 1 / 255)
    assert_reads(data.train, train[:, 1:], train[:, 0])
    assert_reads(data.test, batches[-1][:, 1:], batches[-1][:, 0])


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("folder", [".", "cifar-10-batches-py"])
def test_cifar_pickles_are_read_with_a_warning(tmp_path: Path, folder: str, protocol: int) -> None:
    batches = make_cifar_pickles(tmp_path / folder, protocol)
    with pytest.warns(UserWarning, match="restricted unpickler.*binary version"):
        data = open_dataset("cifar10", tmp_path)
    train = np.concatenate(batches[:-1])
    assert_reads(data.train, train[:, 1:], train[:, 0])
    assert_reads(data.test, batches[-1][:, 1:], batches[-1][:, 0])


def test_cifar_binary_files_are_preferred_to_pickles(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    make_cifar_pickles(tmp_path / "cifar-10-batches-py")
    make_cifar(tmp_path / "cifar-10-batches-bin", (1, 1, 1, 1, 1, 1))
    assert open_dataset("cifar10", tmp_path).train.n == 5
    assert not recwarn.list


class Attack:
    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.reduced = call, args

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.filterwarnings("ignore:.*restricted unpickler")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_restricted_unpickler_refuses_a_pickle_that_runs_a_command(tmp_path: Path, protocol: int) -> None:
    make_cifar_pickles(tmp_path)
    trace = tmp_path / "trace"
    attack = {b"data": Attack(os.system, f"touch '{trace}'"), b"labels": [1]}
    write(tmp_path / CIFAR_NAMES[2], pickle.dumps(attack, protocol))
    expect_error(CIFAR_NAMES[2], "system, which is not allowed", name="cifar10", data_dir=tmp_path)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:.*restricted unpickler")
@pytest.mark.parametrize(
    "attack",
    [Attack(eval, "1"), Attack(getattr, 1, "real"), Attack(np.load, "file"), Attack(bytes.decode, b"a")],
    ids=["eval", "getattr", "numpy.load", "bytes.decode"],
)
def test_the_restricted_unpickler_refuses_other_calls(tmp_path: Path, attack: Attack) -> None:
    make_cifar_pickles(tmp_path)
    write(tmp_path / CIFAR_NAMES[5], pickle.dumps(attack, 2))
    expect_error(CIFAR_NAMES[5], "not allowed", name="cifar10", data_dir=tmp_path)


@pytest.mark.filterwarnings("ignore:.*restricted unpickler")
def test_the_restricted_unpickler_refuses_codecs_other_than_latin1(tmp_path: Path) -> None:
    make_cifar_pickles(tmp_path)
    write(tmp_path / CIFAR_NAMES[0], b"c_codecs\nencode\n(Vabc\nVrot13\ntR.")
    expect_error(CIFAR_NAMES[0], "rot13", "not allowed", name="cifar10", data_dir=tmp_path)


@pytest.mark.filterwarnings("ignore:.*restricted unpickler")
@pytest.mark.parametrize(
    ("batch", "fragment"),
    [
        ([1, 2], "expected a dict"),
        ({b"data": np.zeros((1, 3072), np.uint8)}, "expected data and labels"),
        ({b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]}, "(1, 3071)"),
        ({b"data": np.zeros((1, 3072), np.int64), b"labels": [1]}, "int64"),
        ({b"data": b"text", b"labels": [1]}, "bytes"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}, "1 images and 2 labels"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "at least one"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1.0]}, "no list of integers"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "out of range"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, "out of range"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1 << 80]}, "out of range"),
    ],
)
def test_cifar_pickles_that_are_no_batches_are_refused(tmp_path: Path, batch: Any, fragment: str) -> None:
    make_cifar_pickles(tmp_path)
    write(tmp_path / CIFAR_NAMES[3], pickle.dumps(batch, 4))
    expect_error(CIFAR_NAMES[3], fragment, name="cifar10", data_dir=tmp_path)


@pytest.mark.filterwarnings("ignore:.*restricted unpickler")
@pytest.mark.parametrize("order", ["C", "F"])
def test_cifar_pickles_in_either_order_are_read(tmp_path: Path, order: Any) -> None:
    make_cifar_pickles(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072)).astype(np.uint8)
    batch = {"data": np.asarray(pixels, order=order), "labels": [1, 0, 3, 9]}
    write(tmp_path / CIFAR_NAMES[5], pickle.dumps(batch, 4))
    assert_reads(open_dataset("cifar10", tmp_path).test, pixels, np.array([1, 0, 3, 9]))


@pytest.mark.filterwarnings("ignore:.*restricted unpickler")
@pytest.mark.parametrize("new", [b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x01", b"NNNM\xff\xffJ\xff\xff\xff\xffK\0"])
def test_flags_and_sizes_that_a_pickle_gives_uint8_are_passed_over(tmp_path: Path, new: bytes) -> None:
    """NumPy would use these flags and sizes, and clear objects that do not exist, or read beyond its memory."""
    batches = make_cifar_pickles(tmp_path)
    content, old = (tmp_path / CIFAR_NAMES[5]).read_bytes(), b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0"
    assert content.count(old) == 1
    write(tmp_path / CIFAR_NAMES[5], content.replace(old, new))
    assert_reads(open_dataset("cifar10", tmp_path).test, batches[-1][:, 1:], batches[-1][:, 0])


@pytest.mark.filterwarnings("ignore:.*restricted unpickler")
@pytest.mark.parametrize("keep", [0, 1, 50, -1])
def test_cifar_pickles_cut_short_are_refused(tmp_path: Path, keep: int) -> None:
    make_cifar_pickles(tmp_path)
    path = tmp_path / CIFAR_NAMES[1]
    path.write_bytes(path.read_bytes()[:keep])
    expect_error(str(path), "damaged pickle", name="cifar10", data_dir=tmp_path)


@pytest.mark.filterwarnings("ignore:.*restricted unpickler")
@pytest.mark.parametrize("start", [b"]r\0\0\x40\0", b"\x8e\0\0\0\x10\0\0\0\0", b"\x96\0\0\0\x10\0\0\0\0"])
def test_the_restricted_unpickler_takes_no_more_memory_than_the_file(tmp_path: Path, start: bytes) -> None:
    """One pickle stores an object under the number 2^22, two state lengths of 2^28 bytes."""
    make_cifar_pickles(tmp_path)
    write(tmp_path / CIFAR_NAMES[1], b"\x80\x05" + start + b".")
    tracemalloc.start()
    expect_error(CIFAR_NAMES[1], "damaged pickle", name="cifar10", data_dir=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.filterwarnings("ignore:.*restricted unpickler")
def test_cifar_pickles_that_change_after_opening_are_refused(tmp_path: Path) -> None:
    make_cifar_pickles(tmp_path)
    data = open_dataset("cifar10", tmp_path)
    (tmp_path / "test_batch").write_bytes((tmp_path / "data_batch_1").read_bytes())
    with pytest.raises(UserError, match="changed"):
        data.test.read(np.array([0]))


def test_cifar_without_files_lists_the_directories_searched(tmp_path: Path) -> None:
    folders = [str(tmp_path / "cifar-10-batches-bin"), str(tmp_path / "cifar-10-batches-py")]
    expect_error(*folders, "test_batch.bin", name="cifar10", data_dir=tmp_path)


def test_cifar_needs_a_data_dir_that_exists(tmp_path: Path) -> None:
    expect_error("cifar10", "--data-dir", name="cifar10")
    expect_error("no such directory", name="cifar10", data_dir=tmp_path / "no")


@pytest.mark.parametrize("name", CIFAR_NAMES)
def test_cifar_with_one_file_missing_names_it(tmp_path: Path, name: str) -> None:
    make_cifar(tmp_path)
    (tmp_path / f"{name}.bin").unlink()
    expect_error(f"missing {name}.bin", name="cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("size", [0, 1, 3072, 3074])
def test_cifar_files_that_hold_no_whole_number_of_records_are_refused(tmp_path: Path, size: int) -> None:
    make_cifar(tmp_path)
    write(tmp_path / "data_batch_4.bin", bytes(size))
    expect_error("data_batch_4.bin", f"{size} bytes", "3073", name="cifar10", data_dir=tmp_path)


def test_cifar_files_that_are_compressed_are_to_be_unpacked(tmp_path: Path) -> None:
    make_cifar(tmp_path)
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(gzip.compress(path.read_bytes()))
    expect_error("data_batch_2.bin", "compressed by gzip; unpack it with gunzip", name="cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["data_batch_5.bin", "test_batch.bin"])
def test_cifar_with_a_label_above_nine_is_refused(tmp_path: Path, name: str) -> None:
    make_cifar(tmp_path)
    write(tmp_path / name, bytes(3073) + bytes([10]) + bytes(3072))
    expect_error(name, "10 of sample 1", "0..9", name="cifar10", data_dir=tmp_path)


def test_a_file_that_shrinks_or_goes_after_opening_is_reported_when_it_is_read(tmp_path: Path) -> None:
    make_cifar(tmp_path)
    test = open_dataset("cifar10", tmp_path).test
    write(tmp_path / "test_batch.bin", bytes(3073))
    assert test.read(np.array([0])).shape == (1, 3072)
    with pytest.raises(UserError, match="truncated"):
        test.read(np.array([5]))
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        test.read(np.array([0]))


# ---------------------------------------------------------------------------------- files of the user's


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("end", [".npz", ".h5", ".hdf5"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_files_of_all_dtypes_are_read(tmp_path: Path, end: str, packed: bool, dtype: str, order: Any) -> None:
    rng = np.random.default_rng(4)
    x = np.asarray(rng.integers(0, 256, (33, 2, 3, 5)), dtype=dtype, order=order)
    y, y_test = rng.integers(0, 4, 33).astype(np.int8), np.array([4, 0], np.uint64)
    data = open_dataset(save(tmp_path / f"own{end}", packed, x=x, y=y, x_test=x[:2] // 2, y_test=y_test), None)
    assert (data.outputs, data.shape) == (5, (2, 3, 5))
    assert data.train.scale == data.test.scale == (1 / 255 if dtype == "uint8" else 1.0)
    assert_reads(data.train, x, y)
    assert_reads(data.test, x[:2] // 2, y_test)


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize(("stored", "shape"), [((10, 6), (6,)), ((10, 2, 3), (1, 2, 3)), ((10, 3, 2, 1), (3, 2, 1))])
def test_sample_shapes_follow_from_the_array(tmp_path: Path, end: str, stored: Any, shape: Any) -> None:
    x, y = np.arange(60.0).reshape(stored), np.arange(10) % 2
    data = open_dataset(save(tmp_path / f"own{end}", x=x, y=y), None)
    assert data.shape == data.train.shape == data.test.shape == shape


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_fifth_sample_is_held_out_for_a_split_seed_of_minus_one(tmp_path: Path, end: str, packed: bool) -> None:
    x, y = np.arange(46.0).reshape(23, 2), np.arange(23) % 3
    data = open_dataset(save(tmp_path / f"own{end}", packed, x=x, y=y), None, -1)
    held_out = np.arange(23) % 5 == 4
    assert_reads(data.train, x[~held_out], y[~held_out])
    assert_reads(data.test, x[held_out], y[held_out])


def test_a_relative_path_is_looked_up_in_the_data_dir_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(tmp_path / "here" / "own.npz", x=np.zeros((5, 1)), y=np.arange(5) % 4)
    assert open_dataset("own.npz", None).outputs == 4
    assert open_dataset("own.npz", tmp_path / "data").outputs == 4
    save(tmp_path / "data" / "own.npz", x=np.zeros((6, 1)), y=np.arange(6) % 5)
    assert open_dataset("own.npz", tmp_path / "data").outputs == 5
    assert open_dataset(str(tmp_path / "here" / "own.npz"), tmp_path / "data").outputs == 4
    (tmp_path / "data" / "own.npz").rename(tmp_path / "data" / "OWN.NPZ")
    assert open_dataset("OWN.NPZ", tmp_path / "data").outputs == 5


def test_a_missing_file_lists_the_directories_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    expect_error("own.h5", str(tmp_path / "d"), str(tmp_path / "cwd"), name="own.h5", data_dir=tmp_path / "d")


X, Y = np.zeros((10, 3), np.float32), np.arange(10) % 2
BAD_ARRAYS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no x": ({"X": X, "y": Y}, ["no array 'x'", "X, y", "save X as x"]),
    "no y": ({"labels": Y, "x": X}, ["no array 'y'", "labels, x", "save labels as y"]),
    "nothing alike": ({"a": X, "b": Y}, ["no array 'x'", "a, b", "save them under these names"]),
    "names of Keras": (
        {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y},
        ["no array 'x'; found", "save x_train as x and y_train as y"],
    ),
    "no names": ({"arr_0": X, "arr_1": Y}, ["without names: np.savez(NAME, x=samples, y=labels)"]),
    "MATLAB's axes": (
        {"x": X.T, "y": Y[None]},
        ["(3, 10)", "(1, 10)", "along the last axis", "save x.T and y.ravel()"],
    ),
    "samples last": ({"x": X.T, "y": Y}, ["along the last axis", "save x.T"]),
    "images last": (
        {"x": np.zeros((4, 5, 3, 10), np.uint8), "y": Y[:, None]},
        ["save x.transpose(3, 2, 0, 1) and y.ravel()"],
    ),
    "grey images last": ({"x": np.zeros((4, 5, 10), np.uint8), "y": Y}, ["save np.moveaxis(x, -1, 0)"]),
    "values last": ({"x": X.T, "y": np.zeros((2, 10))}, ["along the last axis", "save x.T and y.T"]),
    "test samples last": (
        {"x": X, "y": Y, "x_test": X.T, "y_test": Y},
        ["x_test has the shape (3, 10)", "along the last axis", "save x_test.T"],
    ),
    "values a row": ({"x": X, "y": np.zeros((1, 10))}, ["y has the shape (1, 10)", "save y.T"]),
    "x_test alone": ({"x": X, "y": Y, "x_test": X}, ["x_test and y_test"]),
    "y_test alone": ({"x": X, "y": Y, "y_test": Y}, ["x_test and y_test"]),
    "x a vector": ({"x": X[:, 0], "y": Y}, ["x has the shape (10,)"]),
    "x of five dimensions": ({"x": X.reshape(10, 3, 1, 1, 1), "y": Y}, ["(10, 3, 1, 1, 1)"]),
    "x empty": ({"x": X[:0], "y": Y[:0]}, ["empty"]),
    "samples empty": ({"x": X[:, :0], "y": Y}, ["empty"]),
    "x_test empty": ({"x": X, "y": Y, "x_test": X[:0], "y_test": Y[:0]}, ["x_test is empty"]),
    "too few samples": ({"x": X[:4], "y": Y[:4]}, ["too few"]),
    "x complex": ({"x": X.astype(np.complex64), "y": Y}, ["complex64", "astype"]),
    "x_test another dtype": (
        {"x": X, "y": Y, "x_test": X.astype(float), "y_test": Y},
        ["float32", "float64"],
    ),
    "x_test another shape": ({"x": X, "y": Y, "x_test": X[:, :2], "y_test": Y}, ["(3,)", "(2,)"]),
    "fewer labels": ({"x": X, "y": Y[:9]}, ["9 labels", "10 samples"]),
    "fewer test labels": ({"x": X, "y": Y, "x_test": X, "y_test": Y[:9]}, ["9 labels in y_test"]),
    "y a matrix": ({"x": X, "y": Y[:, None]}, ["y has the shape (10, 1)", "ravel"]),
    "y a scalar": ({"x": X, "y": np.int64(1)}, ["y has the shape ()"]),
    "y complex": ({"x": X, "y": Y.astype(complex)}, ["complex128", "integers 0..C-1 for classes, or float64"]),
    "y strings of two axes": ({"x": X, "y": np.full((10, 1), "cat", "S3")}, ["S3", "one label a sample", "y.ravel()"]),
    "y_test strings": (
        {"x": X, "y": Y, "x_test": X, "y_test": np.array(["cat"] * 10, "S3")},
        ["y has integers and y_test strings", "save the same kind"],
    ),
    "x strings": ({"x": np.array([["1", "2"]] * 10, "S1"), "y": Y}, ["x holds strings", "expected numbers"]),
    "y float of three axes": ({"x": X, "y": np.zeros((10, 2, 2))}, ["(10, 2, 2)", "y.reshape(10, -1)"]),
    "y without columns": ({"x": X, "y": np.zeros((10, 0))}, ["0 values a sample"]),
    "y float with a NaN": ({"x": X, "y": np.where(Y == 1, np.nan, 0.5)}, ["5 samples", "the first being sample 1"]),
    "y with an infinity": ({"x": X, "y": np.where(Y == 1, np.inf, 1.0)}, ["5 samples"]),
    "one of two values a NaN": ({"x": X, "y": np.where(np.eye(10, 2) == 1, np.nan, 0.5)}, ["2 samples", "sample 0"]),
    "y_test values": ({"x": X, "y": Y, "x_test": X, "y_test": Y * 0.5}, ["y has labels", "y_test has 1 values"]),
    "fewer values": ({"x": X, "y": np.zeros((9, 2))}, ["9 rows in y", "10 samples"]),
    "y_test labels": ({"x": X, "y": Y * 0.5, "x_test": X, "y_test": Y}, ["y has 1 values", "y_test has labels"]),
    "y_test more values": (
        {"x": X, "y": np.zeros((10, 2)), "x_test": X, "y_test": np.zeros((10, 3))},
        ["y has 2 values a sample, y_test has 3 values a sample"],
    ),
    "y bool of two axes": ({"x": X, "y": Y[:, None] > 0}, ["(10, 1)", "save y.ravel()"]),
    "y huge": ({"x": X, "y": np.full(10, 2**64 - 1, np.uint64)}, ["18446744073709551615"]),
}


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(tmp_path: Path, end: str, case: str) -> None:
    arrays, fragments = BAD_ARRAYS[case]
    name = save(tmp_path / f"own{end}", **arrays)
    expect_error(name, *fragments, name=name)


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f8"])
@pytest.mark.parametrize("shape", [(10,), (10, 1), (10, 3)])
def test_floating_point_targets_are_a_regression(tmp_path: Path, end: str, dtype: Any, shape: tuple[int, ...]) -> None:
    y = np.random.default_rng(0).normal(size=shape).astype(dtype)
    data = open_dataset(save(tmp_path / f"own{end}", x=X, y=y), None, -1)
    columns = y.reshape(10, -1).astype(np.float64)
    assert (data.task, data.outputs, data.train.n, data.test.n) == ("regression", columns.shape[1], 8, 2)
    np.testing.assert_array_equal(data.test.targets, columns[[4, 9]])
    assert data.train.targets.dtype == np.float64 and not data.train.targets.flags.writeable
    with pytest.raises(ValueError, match="values and no labels"):
        data.train.labels  # noqa: B018
    resident = Resident(data.train, [1, 3], np.float32)
    np.testing.assert_array_equal(resident.targets([7, 0]), columns[[8, 0]].T)
    assert open_split(str(tmp_path / f"own{end}"), None, "all").targets.shape == columns.shape
    assert open_dataset("digits", None).task == "classes"


def test_a_batch_has_the_samples_of_its_ids_and_is_shared_in_order() -> None:
    split = open_dataset("digits", None).train
    resident, ids = Resident(split, np.arange(0, 100, 2), np.float64), np.array([8, 2, 2, 90, 14])
    buffer = np.full(64 * 7, np.nan)
    batch = resident.batch(ids, buffer)
    np.testing.assert_array_equal(batch.inputs, split.read(ids).T / 16)
    np.testing.assert_array_equal(batch.targets, split.labels[ids])
    assert batch.inputs.base is buffer and np.isnan(buffer[64 * 5 :]).all() and batch.lengths is None
    shares = [Batch(ids).share(k, 3) for k in range(3)]
    assert [share.ids.tolist() for share in shares] == [[8, 2], [2, 90], [14]] and len(shares[2]) == 1
    assert shares[0].inputs is None and not len(Batch(ids[:1]).share(1, 2))


@pytest.mark.parametrize("axes", [(30, 10), (30, 1), (1, 10)])
def test_samples_along_the_first_axis_are_not_taken_for_transposed(tmp_path: Path, axes: tuple[int, int]) -> None:
    """This holds also for as many features as samples."""
    x, y = np.zeros((10, axes[0]), np.float32), np.zeros((10, axes[1]))
    assert open_dataset(save(tmp_path / "own.npz", x=x, y=y), None).outputs == axes[1]
    square = np.zeros((10, 10), np.float32)
    assert open_dataset(save(tmp_path / "own.npz", x=square, y=Y), None).shape == (10,)


@pytest.mark.parametrize("key", ["x", "y"])
def test_object_arrays_are_refused_without_unpickling_them(tmp_path: Path, key: str) -> None:
    trace = tmp_path / "trace"
    values = np.empty(10, object)
    values[0] = Attack(os.system, f"touch '{trace}'")
    path = tmp_path / "own.npz"
    np.savez(path, **{"x": X, "y": Y, key: values})
    expect_error(str(path), f"{key} is an array of Python objects", name=str(path))
    assert not trace.exists()


def test_strings_for_samples_in_hdf5_are_refused(tmp_path: Path) -> None:
    name = save(tmp_path / "own.h5", x=[["1", "2"]] * 10, y=Y)
    expect_error(name, "x holds strings", "expected numbers", name=name)


def test_a_group_in_the_place_of_an_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.h5"
    with h5py.File(path, "w") as file:
        file.create_group("x")
        file["y"] = Y
    expect_error(str(path), "x is a group", name=str(path))
    with h5py.File(path, "w") as file:
        file["x"] = h5py.SoftLink("/gone")
        file["y"] = Y
    expect_error(str(path), "dead link", name=str(path))


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_files_cut_short_are_refused(tmp_path: Path, end: str, keep: int) -> None:
    path = tmp_path / f"own{end}"
    save(path, x=X, y=Y)
    path.write_bytes(path.read_bytes()[:keep])
    expect_error(str(path), name=str(path))


@pytest.mark.parametrize("end", [".npz", ".h5"])
def test_files_of_another_format_are_refused(tmp_path: Path, end: str) -> None:
    path = tmp_path / f"own{end}"
    path.write_bytes(b"x,y\n1,2\n" * 100)
    expect_error(str(path), name=str(path))


def test_what_is_no_npz_is_called_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    for content, says in (
        (npy(X, tmp_path / "x.npy"), "a single array of NumPy (.npy)"), (b"\x89HDF\r\n\x1a\n", "an HDF5 file (.h5)"),
        (b"", "empty"), (gzip.compress(b"text"), "compressed by gzip"), (b"x,y\n1,2\n" * 99, "of an unknown format"),
    ):  # fmt: skip
        path.write_bytes(content)
        expect_error(
            str(path), f"it is {says}", "not an .npz file", "np.savez(NAME, x=samples, y=labels)", name=str(path)
        )


def replace_member(path: Path, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> None:
    """Write `path` anew with `content` as x.npy."""
    save(path, y=Y)
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr("x.npy", content)


def npy(values: np.ndarray, path: Path) -> bytes:
    np.save(path, values)
    return path.read_bytes()


def test_an_npz_member_shorter_or_longer_than_its_header_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    content = npy(X, tmp_path / "x.npy")
    for changed in (content[:-1], content + b"\0"):
        replace_member(path, changed)
        expect_error(str(path), "x.npy", f"{len(changed)} bytes", f"{len(content)} by its", name=str(path))


def test_an_npz_member_without_a_sound_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    for content in (b"", b"text" * 100, b"\x93NUMPY\x09\x00" + bytes(100)):
        replace_member(path, content)
        expect_error(str(path), "x.npy", "header", name=str(path))


def test_an_npz_member_packed_in_an_unusual_way_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    replace_member(path, npy(X, tmp_path / "x.npy"), zipfile.ZIP_LZMA)
    expect_error(str(path), "savez_compressed", name=str(path))


def test_an_npz_header_of_version_two_is_read(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, X + 1, version=(2, 0))
    replace_member(tmp_path / "own.npz", (tmp_path / "x.npy").read_bytes())
    assert (open_dataset(str(tmp_path / "own.npz"), None).train.read(np.arange(8)) == 1).all()


def test_an_uncompressed_npz_whose_local_header_has_an_extra_field_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    info = zipfile.ZipInfo("x.npy")
    info.extra = struct.pack("<HH5s", 0x9999, 5, b"extra")
    save(path, y=Y)
    x = np.random.default_rng(0).normal(size=(10, 3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, npy(x, tmp_path / "x.npy"))
    data = open_dataset(str(path), None, -1)
    np.testing.assert_array_equal(data.test.read([0, 1]), x[[4, 9]])


def test_an_npz_with_a_damaged_compressed_x_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    x = np.random.default_rng(0).normal(size=(500, 3))
    save(path, True, x=x, y=np.arange(500) % 2)
    content = bytearray(path.read_bytes())
    content[5000] ^= 255
    path.write_bytes(content)
    train = open_dataset(str(path), None).train
    with pytest.raises(UserError, match="damaged"):
        train.read(np.array([0]))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("packed", [False, True])
def test_no_flipped_bit_of_an_npz_becomes_a_sample(tmp_path: Path, packed: bool, order: Any) -> None:
    path, rng = tmp_path / "own.npz", np.random.default_rng(0)
    # So many samples that zipfile, on reading the header, does not yet reach the end and its checksum.
    x, y = rng.random((800, 5), np.float32), np.arange(800) % 2
    save(path, packed, x=np.asarray(x, order=order), y=y, x_test=x[:2], y_test=y[:2])
    intact, refused = path.read_bytes(), 0
    for at in [*range(0, len(intact), 97), *range(len(intact) - 300, len(intact), 5)]:
        content = bytearray(intact)
        content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            data = open_dataset(str(path), None)
            assert_reads(data.train, x, y)
            assert_reads(data.test, x[:2], y[:2])
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    # The other bits are those of times, permissions and the like.
    assert refused > 0.9 * len(intact) / 97


def test_a_flipped_bit_of_an_uncompressed_array_is_found_by_whatever_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    x = np.random.default_rng(0).normal(size=(5000, 40))
    save(path, x=x, y=np.arange(5000) % 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    data = open_dataset(str(path), None)
    for _ in range(2):
        with pytest.raises(UserError, match=r"damaged.*Bad CRC-32 for file 'x.npy'"):
            data.train.read([0])


def test_an_uncompressed_array_is_read_whole_once_and_then_by_rows(tmp_path: Path) -> None:
    path, x = tmp_path / "own.npz", np.random.default_rng(0).normal(size=(50, 4))
    save(path, x=x, y=np.arange(50) % 2)
    data = open_dataset(str(path), None, -1)
    assert np.array_equal(data.test.read([1]), x[[9]])
    content = bytearray(path.read_bytes())
    content[content.index(x[4].tobytes()) : content.index(x[4].tobytes()) + 32] = bytes(32)
    path.write_bytes(content)
    assert np.array_equal(data.test.read([1]), x[[9]]) and not data.test.read([0]).any()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["x.npy", "x"])
def test_two_arrays_of_one_name_are_refused(tmp_path: Path, second: str) -> None:
    path = tmp_path / "own.npz"
    save(path, x=X, y=Y)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(second, npy(X + 1, tmp_path / "x.npy"))
    expect_error(str(path), "2 arrays named x", name=str(path))


def header(text: str) -> bytes:
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("{'descr':'<f4','shape':(10,3)", 120),
        ("{'descr':'<f4','fortran_order':False,'shape':" + "(" * 3000 + ")" * 3000 + "}", 0),
        ("{'descr':'<f4','fortran_order':False,'shape':(-10,-3)}", 120),
        ("{'descr':'<f4','fortran_order':False,'shape':(10,-1,-3)}", 120),
        ("{'descr':'<f4','fortran_order':False,'shape':(1000000000000,3)}", 120),
        ("{'descr':('<f4',(3,)),'fortran_order':False,'shape':(10,)}", 120),
        ("{'descr':'|V4','fortran_order':False,'shape':(10,3)}", 120),
    ],
)
def test_an_npz_header_that_makes_no_sense_is_refused_in_a_line(tmp_path: Path, text: str, body: int) -> None:
    path = tmp_path / "own.npz"
    replace_member(path, header(text) + bytes(body))
    with pytest.raises(UserError, match="x") as caught:
        open_dataset(str(path), None)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_packed_files_that_only_repeat_themselves_are_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psmpi.data.files.UNPACKED_BYTES", 5_000)
    x, y = np.random.default_rng(0).integers(0, 256, (1000, 4, 5)), np.zeros(1000, np.int64)
    name = save(tmp_path / "own.npz", True, x=x.astype(np.uint8), y=y)
    assert open_dataset(name, None).outputs == 1
    monkeypatch.setattr("psmpi.data.files.PACKED", 20)
    expect_error(name, "y.npy", "unpack to 8,128", "save it with np.savez", name=name)
    make_mnist(tmp_path, ".gz")
    write(tmp_path / (MNIST_NAMES[0] + ".gz"), idx(x * 0))
    write(tmp_path / (MNIST_NAMES[1] + ".gz"), idx(y))
    expect_error(MNIST_NAMES[0], "unpack to 20,016", "gunzip", name="mnist", data_dir=tmp_path)


def test_an_hdf5_file_that_changes_after_opening_is_refused(tmp_path: Path) -> None:
    name = save(tmp_path / "own.h5", x=X, y=Y)
    train = open_dataset(name, None).train
    save(tmp_path / "own.h5", x=X[:, :2], y=Y)
    with pytest.raises(UserError, match="changed"):
        train.read(np.array([0]))


@pytest.mark.parametrize("kind", ["idx.gz", "packed npz", "npz", "h5", "packed h5"])
def test_reading_some_rows_takes_memory_for_them_and_a_few_chunks_only(tmp_path: Path, kind: str) -> None:
    x, y = np.zeros((16000, 2000), np.uint8), np.zeros(16000, np.int64)
    if kind == "idx.gz":
        for name, values in zip(MNIST_NAMES, (x[:, None], y, x[:9, None], y[:9]), strict=True):
            write(tmp_path / f"{name}.gz", idx(values))
        split = open_dataset("mnist", tmp_path).train
    else:
        path = tmp_path / ("own.npz" if "npz" in kind else "own.h5")
        split = open_dataset(save(path, "packed" in kind, x=x, y=y, x_test=x, y_test=y), None).train
    for rows in (np.arange(3200), np.arange(0, 16000, 5), np.array([0, 15999])):
        tracemalloc.start()
        split.read(rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < len(rows) * 2000 + 5 * CHUNK_BYTES


# ---------------------------------------------------------------------------------- Resident


@pytest.fixture
def train() -> Split:
    return open_dataset("digits", None).train


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stored", [np.uint8, np.float32, np.float64])
def test_resident_fetch_equals_plain_indexing(tmp_path: Path, stored: Any, dtype: Any) -> None:
    rng = np.random.default_rng(5)
    x = (rng.random((50, 7)) * 255).astype(stored)
    y = rng.integers(0, 3, 50)
    split = open_dataset(save(tmp_path / "own.npz", x=x, y=y, x_test=x, y_test=y), None).train
    rows = np.flatnonzero(rng.random(50) < 0.6)
    resident = Resident(split, rows, dtype)
    # Sizes go up and down, so that scratch memory is both grown and reused.
    for size in (5, 20, 1, 0, 13):
        ids = rng.choice(rows, size)
        out = np.full((7, size), np.nan, dtype)
        resident.fetch(ids, out)
        np.testing.assert_array_equal(out, x[ids].T.astype(dtype) * dtype(split.scale))
        np.testing.assert_array_equal(resident.targets(ids), y[ids])
        assert resident.targets(ids).dtype == np.int64


def test_resident_values_lie_between_zero_and_one(train: Split) -> None:
    out = np.empty((64, train.n), np.float32)
    Resident(train, np.arange(train.n), np.float32).fetch(np.arange(train.n), out)
    assert (out.min(), out.max()) == (0, 1)


def test_resident_refuses_ids_that_are_not_resident(train: Split) -> None:
    resident = Resident(train, np.arange(10, 20, 2), np.float32)
    for ids, first in (([10, 11], 11), ([9], 9), ([12, 20], 20), ([-1], -1), ([18, 2000], 2000)):
        with pytest.raises(ValueError, match=f"first being {first}$"):
            resident.fetch(np.array(ids), np.empty((64, len(ids)), np.float32))
    with pytest.raises(ValueError, match="not resident"):
        Resident(train, [], np.float32).fetch(np.array([0]), np.empty((64, 1), np.float32))


def test_resident_refuses_ids_that_are_no_vector_of_integers(train: Split) -> None:
    resident = Resident(train, np.arange(10), np.float32)
    for ids in (np.array([1.0]), np.array([[1]])):
        with pytest.raises(ValueError, match="vector of integers"):
            resident.fetch(ids, np.empty((64, 1), np.float32))


def test_resident_refuses_an_out_of_another_shape_dtype_or_layout(train: Split) -> None:
    resident = Resident(train, np.arange(10), np.float32)
    for out in (
        np.empty((64, 3), np.float32),
        np.empty((2, 64), np.float32),
        np.empty((64, 2), np.float64),
        np.empty((2, 64), np.float32).T,
    ):
        with pytest.raises(ValueError, match="out has to be"):
            resident.fetch(np.array([1, 2]), out)


def test_resident_refuses_rows_that_do_not_increase(train: Split) -> None:
    for rows in ([1, 1], [2, 1]):
        with pytest.raises(ValueError, match="increase"):
            Resident(train, rows, np.float32)
    with pytest.raises(IndexError):
        Resident(train, [train.n], np.float32)


@pytest.mark.parametrize("name", ["plain.npz", "packed.npz", "turned.npz", "own.h5"])
@pytest.mark.parametrize(("key", "row"), [("x", 3), ("x_test", 6), ("", 8)])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_no_numbers_are_named_by_array_and_sample(
    tmp_path: Path, name: str, key: str, row: int, value: float
) -> None:
    """Test samples that were drawn from x (no key) are named by their row of x."""
    arrays = {"x": np.ones((10, 3)), "y": Y, "x_test": np.ones((10, 3)), "y_test": Y}
    if not key:
        del arrays["x_test"], arrays["y_test"]
    arrays[key or "x"][row, 1] = value
    if name == "turned.npz":
        arrays = {array_name: np.asfortranarray(values) for array_name, values in arrays.items()}
    path = tmp_path / name
    if name == "packed.npz":
        np.savez_compressed(path, **arrays)
    else:
        save(path, **arrays)
    data = open_dataset(str(path), None)
    splits = {"x": (data.train,), "x_test": (data.test,)}.get(key, (data.train, data.test))
    with pytest.raises(UserError) as caught:
        for split in splits:
            Resident(split, np.arange(split.n)[1:], np.float64)
    expected = (
        f"{path}, {key or 'x'}: sample {row} has values that are not finite numbers; correct or remove such samples"
    )
    assert str(caught.value) == expected


def test_places_of_samples_in_several_files_are_told(tmp_path: Path) -> None:
    make_cifar(tmp_path)
    data = open_dataset("cifar10", tmp_path)
    assert [data.train.source.place(row) for row in (0, 2, 3, 4, 14)] == [
        f"{tmp_path}/data_batch_{k}.bin: sample {at}" for k, at in ((1, 0), (1, 2), (2, 0), (3, 0), (5, 4))
    ]
    assert data.test.source.place(5) == f"{tmp_path}/test_batch.bin: sample 5"
    assert open_dataset("digits", None).train.source.place(7) == "the data set: sample 7"


@pytest.mark.parametrize("end", [".npz", ".h5"])
def test_values_that_the_dtype_of_training_cannot_hold_are_refused(tmp_path: Path, end: str) -> None:
    x = np.ones((10, 3))
    x[7, 1], largest = -1e39, float(np.finfo(np.float32).max)
    split = open_dataset(save(tmp_path / f"own{end}", x=x, y=Y, x_test=x, y_test=Y), None).train
    with pytest.raises(
        UserError, match=r"own\.(npz|h5), x: sample 7 has values beyond 3.4e\+38, infinite in float32; .*float64"
    ):
        Resident(split, np.arange(10), np.float32)
    assert Resident(split, np.arange(7), np.float32).nbytes and Resident(split, np.arange(10), np.float64).nbytes
    x[7, 1] = -largest
    split = open_dataset(save(tmp_path / f"own{end}", x=x, y=Y, x_test=x, y_test=Y), None).train
    out = np.empty((3, 10), np.float32)
    Resident(split, np.arange(10), np.float32).fetch(np.arange(10), out)
    assert np.isfinite(out).all() and out[1, 7] == -largest


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize("shape", [(0, 3), (), (3,)])
def test_samples_of_no_shape_are_refused_beside_labels_too(tmp_path: Path, end: str, shape: tuple[int, ...]) -> None:
    name = save(tmp_path / f"own{end}", x=np.zeros(shape), y=np.zeros(shape[:1], np.int64))
    expect_error(name, f"the shape {shape}", name=name)
    with pytest.raises(UserError, match="the shape"):
        open_split(name, None, "all")


def test_resident_refuses_other_dtypes(train: Split) -> None:
    with pytest.raises(ValueError, match="float16"):
        Resident(train, [0], np.float16)


def test_resident_keeps_the_stored_dtype(train: Split) -> None:
    resident = Resident(train, np.arange(100), np.float64)
    assert resident.nbytes == 100 * 64 + 100 * 8
    resident.fetch(np.arange(30), np.empty((64, 30)))
    assert resident.nbytes == 100 * 64 + 100 * 8 + 30 * 64


def test_resident_labels_are_known_for_all_ids_of_the_split(train: Split) -> None:
    resident = Resident(train, [], np.float32)
    np.testing.assert_array_equal(resident.targets(np.arange(train.n)), train.labels)
    for ids in ([-1], [train.n]):
        with pytest.raises(IndexError):
            resident.targets(ids)


def test_resident_fetch_makes_no_big_temporaries(tmp_path: Path) -> None:
    name = save(tmp_path / "own.npz", x=np.ones((500, 4000), np.uint8), y=np.zeros(500, np.int64))
    resident = Resident(open_dataset(name, None).train, np.arange(400), np.float32)
    ids, out = np.arange(400), np.empty((4000, 400), np.float32)
    resident.fetch(ids, out)
    tracemalloc.start()
    resident.fetch(ids, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Numpy converts through buffers of a fixed size; a temporary of the minibatch would take 1.6 MB.
    assert peak < 200_000


# ---------------------------------------------------------------------------------- Minibatches


@given(st.data(), st.integers(1, 200), st.integers(0, 2**40), st.booleans(), st.integers(0, 10**6))
def test_minibatches_of_an_epoch_partition_the_samples(
    data: st.DataObject, n: int, seed: int, shuffle: bool, epoch: int
) -> None:
    batch_size = data.draw(st.integers(1, n))
    order = Minibatches(n, batch_size, seed, shuffle)
    batches = [order.ids(epoch, step) for step in range(order.steps_per_epoch)]
    assert all(batch.dtype == np.int64 for batch in batches)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert len(batches[-1]) == (n - 1) % batch_size + 1
    assert sorted(np.concatenate(batches).tolist()) == list(range(n))


def test_minibatches_depend_on_seed_epoch_and_step_alone() -> None:
    forward, backward = Minibatches(101, 7, 3), Minibatches(101, 7, 3)
    calls = [(epoch, step) for epoch in range(4) for step in range(forward.steps_per_epoch)]
    first = {call: forward.ids(*call).copy() for call in calls}
    np.random.seed(0)
    for call in reversed(calls):
        np.testing.assert_array_equal(backward.ids(*call), first[call])
    for call in np.random.default_rng(0).permutation(calls).tolist():
        np.testing.assert_array_equal(Minibatches(101, 7, 3).ids(*call), first[tuple(call)])


def test_minibatches_differ_between_seeds_and_epochs() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return Minibatches(100, 100, seed).ids(number, 0).tolist()

    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 1) != epoch(1, 0)
    assert epoch(0, 0) != list(range(100))


def test_minibatches_of_another_size_cut_the_same_order() -> None:
    small, large = Minibatches(60, 10, 5), Minibatches(60, 30, 5)
    np.testing.assert_array_equal(np.concatenate([small.ids(2, step) for step in range(3)]), large.ids(2, 0))


def test_minibatches_are_in_order_without_shuffling() -> None:
    assert Minibatches(5, 2, 0, shuffle=False).ids(3, 1).tolist() == [2, 3]


def test_minibatches_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Minibatches(5, 2, 0).ids(0, 0)[0] = 7


@pytest.mark.parametrize(("batch_size", "seed"), [(0, 0), (-3, 0), (6, 0), (2, -1)])
def test_minibatches_refuse_bad_sizes_and_seeds(batch_size: int, seed: int) -> None:
    with pytest.raises(UserError, match=str(batch_size if seed == 0 else seed)):
        Minibatches(5, batch_size, seed)


@pytest.mark.parametrize(("epoch", "step"), [(0, 3), (0, -1), (-1, 0)])
def test_minibatches_refuse_steps_that_are_not_there(epoch: int, step: int) -> None:
    with pytest.raises(IndexError):
        Minibatches(5, 2, 0).ids(epoch, step)


# ---------------------------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("name", "sizes", "shape"),
    [("mnist", (60000, 10000), (1, 28, 28)), ("cifar10", (50000, 10000), (3, 32, 32))],
)
def test_the_real_files_are_read(name: str, sizes: tuple[int, int], shape: tuple[int, ...]) -> None:
    data = open_dataset(name, real(name))
    assert (data.train.n, data.test.n) == sizes
    assert (data.shape, data.outputs) == (shape, 10)
    assert set(np.unique(data.train.labels)) == set(range(10))
    x = data.test.read(np.arange(data.test.n))
    assert x.max() > 250
    rows = np.array([9999, 0, 5000, 17])
    np.testing.assert_array_equal(data.test.read(rows), x[rows])
    if name == "mnist":
        assert data.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
        assert round(float(data.train.read(np.arange(60000)).mean()) / 255, 4) == 0.1307
