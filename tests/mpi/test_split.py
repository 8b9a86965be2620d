"""Test samples of files without any: a fifth of each class, the same whoever opens the file."""

import ast
import json
import time

import h5py
import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.runs import run

from psmpi.checkpoint.format import as_data, filters, seal
from psmpi.config import Config, check, from_table, from_toml, to_toml
from psmpi.data import open_dataset, open_split
from psmpi.data.split import random_fifth
from psmpi.errors import UserError

SMALL = ("--model", "mlp", "--widths", "8", "--batch-size", "20", "--threads", "1", "--lr", "0.01")


def in_turn(path, classes, n=1000):
    """Write samples of well separated classes in the order 0 1 2 ... 0 1 2 ...; return x and y."""
    rng = np.random.default_rng(0)
    y = np.arange(n) % classes
    x = (rng.normal(0, 2, (classes, 20))[y] + rng.normal(0, 1, (n, 20))).astype(np.float32)
    np.savez(path, x=x, y=y)
    return x, y


@pytest.mark.parametrize("seed", [0, 1, 2**40])
@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.int64])
def test_a_fifth_of_each_class_is_drawn(seed, dtype):
    rng = np.random.default_rng(3)
    counts = np.array([1, 2, 3, 4, 5, 6, 9, 10, 11, 100, 101, 1])
    y = rng.permutation(np.repeat(np.arange(12), counts)).astype(dtype)
    drawn = random_fifth(y, seed)
    of_class = np.bincount(y[drawn].astype(np.int64), minlength=12)
    assert (of_class >= counts // 5).all() and (of_class <= -(-counts // 5)).all()
    # The only sample of a class is for training; rounding is shared among the classes.
    assert of_class[0] == of_class[11] == 0 and (of_class < counts).all() and of_class.sum() == (len(y) - 2) // 5
    assert drawn.dtype == bool and np.array_equal(drawn, random_fifth(y, seed))


def test_the_split_is_one_and_the_same_on_every_machine():
    """The expected rows are recorded: with other rows a checkpoint would be tested on its training samples."""
    y = np.array([0, 1, 2] * 7)
    assert np.flatnonzero(random_fifth(y, 0)).tolist() == ROWS[0]
    assert np.flatnonzero(random_fifth(y, 1)).tolist() == ROWS[1]
    assert np.flatnonzero(random_fifth(np.zeros((21, 2)), 0)).tolist() == ROWS[2]


ROWS = [[1, 5, 11, 12], [8, 12, 16, 17], [3, 9, 14, 20]]


def test_each_sample_of_a_class_is_as_likely_to_be_drawn():
    y = np.repeat([0, 1], [10, 5])
    counts = sum(random_fifth(y, seed).astype(int) for seed in range(1000))
    # A fifth of 1,000, within five standard deviations of the binomial distribution.
    assert abs(counts - 200).max() < 5 * np.sqrt(1000 * 0.2 * 0.8)


def test_values_are_split_at_random():
    drawn = random_fifth(np.zeros((1000, 1)), 0)
    assert (
        drawn.sum() == 200 and 0 < drawn[::5].sum() < 100 and not np.array_equal(drawn, random_fifth(drawn[:, None], 1))
    )


def test_many_classes_and_samples_are_split_quickly():
    y = np.random.default_rng(0).integers(0, 10_000, 500_000)
    start_time = time.perf_counter()
    drawn = random_fifth(y, 0)
    assert time.perf_counter() - start_time < 10
    assert (np.bincount(y[~drawn], minlength=10_000) > 0).all() and (np.bincount(y[drawn], minlength=10_000) > 0).all()


@pytest.mark.parametrize("counts", [[2], [1, 2], [3, 1, 1], [2, 1, 1, 1, 1], [4]])
def test_few_samples_leave_one_for_the_test(counts):
    y = np.repeat(np.arange(len(counts)), counts)
    assert random_fifth(y, 0).sum() == 1 and set(y[~random_fifth(y, 0)]) == set(y)


@pytest.mark.parametrize("end", [".npz", ".h5"])
def test_train_and_test_share_out_the_samples_of_a_file(tmp_path, end):
    x, y = in_turn(tmp_path / "own.npz", 10)
    if end == ".h5":
        with h5py.File(tmp_path / "own.h5", "w") as file:
            file["x"], file["y"] = x, y
    name = str(tmp_path / f"own{end}")
    for seed in (0, 7, -1):
        data, drawn = open_dataset(name, None, seed), random_fifth(y, seed) if seed >= 0 else np.arange(1000) % 5 == 4
        for split, rows in ((data.train, np.flatnonzero(~drawn)), (data.test, np.flatnonzero(drawn))):
            assert np.array_equal(split.labels, y[rows]) and np.array_equal(split.read(np.arange(split.n)), x[rows])
        assert data.held_out and np.array_equal(open_split(name, None, "test", seed).labels, data.test.labels)
    assert set(open_dataset(name, None, -1).test.labels) == {4, 9} and not open_dataset("digits", None, 3).held_out


def test_labels_of_one_sample_each_cannot_be_split(tmp_path):
    np.savez(tmp_path / "own.npz", x=np.zeros((10, 2), np.float32), y=np.arange(10))
    with pytest.raises(UserError, match=r"each of the 10 samples has a label of its own.*add x_test and y_test"):
        open_dataset(str(tmp_path / "own.npz"), None)


@pytest.mark.parametrize("name", ["digits", "own.npz"])
def test_the_embedded_digits_and_own_test_samples_know_no_seed(tmp_path, name):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "own.npz",
        x=rng.random((50, 3)),
        y=np.arange(50) % 2,
        x_test=rng.random((9, 3)),
        y_test=np.arange(9) % 2,
    )
    drawn, every_fifth = (open_dataset(name, tmp_path, seed) for seed in (0, -1))
    assert np.array_equal(
        drawn.test.read(np.arange(drawn.test.n)), every_fifth.test.read(np.arange(every_fifth.test.n))
    )
    assert not drawn.held_out and drawn.test.n in (359, 9)


def test_classes_in_turn_are_learnt_and_predicted(train, tmp_path):
    """Every fifth sample is of one of two classes, and a training without these samples never sees the two classes."""
    in_turn(tmp_path / "own.npz", 10)
    options = ("--dataset", "own.npz", "--epochs", "5", *SMALL)
    assert train(1, *options, "--split-seed", "-1").rows[-1]["test_accuracy"] < 0.2
    for ranks, seed in ((1, "0"), (3, "5")):
        trained = train(ranks, *options, "--split-seed", seed, "--seed", "3", "--method", "data_parallel")
        accuracy = trained.rows[-1]["test_accuracy"]
        assert accuracy > 0.5
        status, out, err = run(2, "-m", "psmpi.predict", trained.out, "--json", cwd=tmp_path)
        assert status == 0 and json.loads(out)["accuracy"] == pytest.approx(accuracy, abs=1e-12), err


def test_the_split_does_not_depend_on_the_seed_of_a_run(train, tmp_path):
    in_turn(tmp_path / "own.npz", 4, 60)
    labels = []
    for seed in ("0", "1"):
        trained = train(1, "--dataset", "own.npz", "--epochs", "1", *SMALL, "--seed", seed)
        status, _, err = run(1, "-m", "psmpi.predict", trained.out, "--out", tmp_path / "p.npz", cwd=tmp_path)
        assert status == 0, err
        labels.append(np.load(tmp_path / "p.npz")["labels"])
    assert np.array_equal(*labels) and len(labels[0]) == 12


def test_checkpoints_without_a_split_seed_were_trained_without_every_fifth_sample(train, tmp_path):
    in_turn(tmp_path / "own.npz", 3, 60)
    options = ("--dataset", "own.npz", "--epochs", "2", *SMALL)
    trained = train(1, *options, "--split-seed", "-1", "--max-steps", "3")
    with h5py.File(trained.checkpoint, "r+") as file:
        text = str(file["config"].asstr()[0])
        del file["config"]
        file.create_dataset("config", data=as_data(text.replace("split_seed = -1\n", "")), **filters(0))
    seal(trained.checkpoint)
    assert "split_seed" in text and from_toml("[data]\n", "there", foreign=True).data.split_seed == -1
    status, _, err = run(1, "-m", "psmpi.predict", trained.out, "--out", tmp_path / "p.npz", cwd=tmp_path)
    assert status == 0, err
    assert np.load(tmp_path / "p.npz")["labels"].tolist() == [(k % 3) for k in range(4, 60, 5)]
    resume_options = ("--split-seed", "0", "--resume", trained.checkpoint, "--out", "again")
    status, _, err = run(1, "-m", "psmpi.train", *options, *resume_options, cwd=tmp_path)
    refusal = "was made with --split-seed -1: with 0 it would be tested on samples"
    assert status == 1 and refusal in " ".join(err.split())
    assert train(1, *options, "--resume", trained.checkpoint).rows[-1]["epoch"] == 2


def test_a_split_seed_that_changes_nothing_is_not_told(train):
    first_run = train(1, "--epochs", "1")
    output = train(1, "--epochs", "2", "--split-seed", "4", "--resume", first_run.checkpoint).stdout
    assert "note: epochs is 2" in output and "split_seed is" not in output


def test_whoever_opens_a_data_set_of_a_run_says_its_split_seed():
    """bench/network.py is left out: it reads labels without a run."""
    least_arguments = {"open_dataset": 3, "open_split": 4}
    for path in (ROOT / "psmpi").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
            if name in least_arguments and path.name != "network.py":
                # `Data.source` has all settings of a run's data.
                by_source = [ast.unparse(argument).rpartition(".")[2] for argument in call.args] == ["source"]
                assert by_source or len(call.args) >= least_arguments[name], f"{path}, line {call.lineno}"


def test_the_split_seed_has_a_range_and_a_default():
    assert from_toml(to_toml(Config()), "again") == Config() and Config().data.split_seed == 0
    with pytest.raises(UserError, match="--split-seed -2: expected a whole number from -1 up"):
        check(from_table({"data": {"split_seed": -2}}, Config(), "there"))
