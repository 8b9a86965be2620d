"""Samples that are read from their file within a bound of memory."""

import tracemalloc

import h5py
import numpy as np
import pytest
from helpers.runs import run

from psmpi.data import Resident, open_dataset
from psmpi.data.bounded import bytes_of, with_memory
from psmpi.errors import UserError
from psmpi.testing.conformance import tensors

RNG = np.random.default_rng(0)
X, Y = RNG.integers(0, 256, (90, 8, 8)).astype(np.uint8), np.arange(90) % 3
ENDS = (".npy", ".h5", ".npz")


def save(folder, end, x=X, y=Y):
    if end == ".npy":
        np.save(folder / "own_x.npy", x)
        np.save(folder / "own_y.npy", y)
        return str(folder / "own_x.npy")
    path = folder / f"own{end}"
    if end == ".npz":
        np.savez(path, x=x, y=y)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("x", data=x, chunks=(7, 8, 8), compression="gzip")
            file["y"] = y
    return str(path)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("x", [X, (X / 255).astype(np.float32), X.astype(np.int16), X / 255])
@pytest.mark.parametrize("memory", [0, 1000, 10**9])
def test_minibatches_are_the_same_to_the_bit(tmp_path, end, x, memory):
    data = open_dataset(save(tmp_path, end, x), None, validation=0.2).for_training()
    for name in ("train", "test"):
        split, bounded = (getattr(source, name) for source in (data, with_memory(data, memory)))
        rows = np.arange(1, split.n, 2)
        for features in (None, np.array([3, 17, 63])):
            in_memory, from_file = (
                Resident(source, rows, np.float32, features=features) for source in (split, bounded)
            )
            for ids in (rows, rows[[5, 2, 2, 0, 5]], rows[:0]):
                shape = (64 if features is None else 3, len(ids))
                kept_x, read_x = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
                in_memory.fetch(ids, kept_x)
                from_file.fetch(ids, read_x)
                assert kept_x.tobytes() == read_x.tobytes()
            assert memory > 10**6 or from_file.nbytes <= memory + rows.nbytes + from_file._samples.scratch.nbytes
            with pytest.raises(ValueError, match="not resident"):
                from_file.fetch([0], np.empty((shape[0], 1), np.float32))


def test_no_more_is_kept_than_the_bound(tmp_path):
    x = np.zeros((2000, 1000), np.float32)
    x[:, 0] = np.arange(2000)
    data = with_memory(open_dataset(save(tmp_path, ".npy", x, np.arange(2000) % 2), None), 500_000)
    tracemalloc.start()
    samples, out = Resident(data.train, np.arange(data.train.n), np.float32), np.empty((1000, 8), np.float32)
    for k in range(0, 1600, 8):
        samples.fetch(np.arange(k, k + 8), out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 300_000 < peak < 900_000 < x.nbytes / 8, peak


def test_values_that_are_no_numbers_are_named_when_they_are_read(tmp_path):
    x = np.zeros((90, 64), np.float32)
    x[70, 3] = np.nan
    split = with_memory(open_dataset(save(tmp_path, ".npy", x), None, -1), 1000).train
    samples, position = Resident(split, np.arange(split.n), np.float32), int(np.flatnonzero(split.index == 70)[0])
    samples.fetch([position - 1], np.empty((64, 1), np.float32))
    with pytest.raises(UserError, match="sample 70 has values that are not finite"):
        samples.fetch([1, position], np.empty((64, 2), np.float32))


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512", 512), ("1k", 1024), ("1.5 MB", 3 << 19), ("2G", 2 << 30), ("1GiB", 1 << 30)]
)
def test_sizes_are_read(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1e9", "2P", "1 2", "nan"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(UserError, match=r"--data-memory .*: expected a size in bytes, as 500M or 2G"):
        bytes_of(text)


def test_samples_that_are_not_read_by_rows_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "packed.npz", x=X, y=Y)
    (tmp_path / "own.csv").write_text("1,2,a\n3,4,b\n" * 9)
    for name in (str(tmp_path / "packed.npz"), str(tmp_path / "own.csv"), "digits", "sparse"):
        with pytest.raises(UserError, match=r"is not read by rows: save its samples as \.npy or HDF5"):
            with_memory(open_dataset(name, None), 100)
    with pytest.raises(UserError, match="and these are sequences"):
        with_memory(open_dataset("adding", None), 100)
    status, _, err = run(1, "-m", "psmpi.train", "--data-memory", "much")
    assert status == 1 and "--data-memory much: expected a size" in err


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    "options",
    [(1,), (3,), (2, "--method", "data_parallel"), (2, "--method", "sil", "--model", "mlp", "--widths", "8", "8")],
)
def test_trainings_are_the_same_to_the_bit(tmp_path, train, end, options):
    ranks, *words = options
    words = ("--dataset", save(tmp_path, end), "--epochs", "2", "--batch-size", "20", *words)
    unbounded, bounded = train(ranks, *words), train(ranks, *words, "--data-memory", "1k")
    first, second = tensors(unbounded.checkpoint), tensors(bounded.checkpoint)
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
    assert unbounded.rows[-1]["test_loss"] == bounded.rows[-1]["test_loss"]
