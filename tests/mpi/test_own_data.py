"""Trainings and predictions on a user's own data, from the command line."""

import csv
import json

import h5py
import numpy as np
import pytest
from helpers.runs import distance, run

from psmpi import checkpoint
from psmpi.errors import DamagedError

NAMES = ["setosa", "versi,color", "virginica"]
OPTIONS = ("--model", "head", "--widths", "6", "--lr", "0.1", "--epochs", "12", "--batch-size", "20")


def write(path, n=90, labels=True, names=NAMES, seed=0):
    """Write a table of points of three classes, with a header and names of classes; return its path."""
    rng, centres = np.random.default_rng(seed), np.array([[2, 0, 0], [0, 2, 0], [0, 0, 2]])
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "c", *(["species"] if labels else [])])
        for k in range(n):
            x = centres[k % 3] + 0.3 * rng.normal(size=3)
            writer.writerow([*(f"{value:.4f}" for value in x), *([names[k % 3]] if labels else [])])
    return path


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A folder with a table whose labels are strings, and a training on it by three ranks."""
    folder = tmp_path_factory.mktemp("flowers")
    write(folder / "flowers.csv")
    status, out, err = run(
        3, "-m", "psmpi.train", "--dataset", "flowers.csv", *OPTIONS, "--out", folder / "run", cwd=folder
    )
    assert status == 0, err
    assert "│ setosa, versi,color" in out and "│ virginica" in out
    return folder


def predicted(folder, *options, ranks=1):
    status, out, err = run(ranks, "-m", "psmpi.predict", folder / "run", *options, cwd=folder)
    assert status == 0, err
    return out


def test_names_of_classes_go_into_checkpoints_and_predictions(flowers):
    contents = checkpoint.validate(checkpoint.newest(flowers / "run"))
    assert list(contents.names) == NAMES and checkpoint.Contents.of(contents.texts()).names == contents.names
    out = predicted(flowers)
    assert out.count("100.0 %") == 3 and "versi,color . 6 . 100.0 %" in " ".join(out.split())
    write(flowers / "new.csv", 6, labels=False, seed=1)
    predicted(flowers, "--dataset", "new.csv", "--split", "all", "--out", "p.csv", ranks=3)
    rows = list(csv.DictReader((flowers / "p.csv").read_text().splitlines()))
    assert [row["predicted"] for row in rows] == NAMES * 2 and {row["label"] for row in rows} == {""}
    assert list(rows[0]) == ["sample", "label", "predicted", *(f"score_{name}" for name in NAMES)]
    predicted(flowers, "--out", "p.npz")
    assert np.load(flowers / "p.npz")["names"].tolist() == NAMES
    # A table with two of the classes has the training's numbers of classes.
    table = (flowers / "flowers.csv").read_text().splitlines()
    (flowers / "two.csv").write_text("\n".join(line for line in table if "setosa" not in line))
    report = json.loads(predicted(flowers, "--dataset", "two.csv", "--split", "all", "--json"))
    assert report["names"] == NAMES and report["accuracy"] == 1 and np.diag(report["confusion"]).tolist() == [0, 30, 30]


def test_other_tables_name_the_column_of_their_labels(flowers):
    lines = [
        line.rpartition(",")
        for line in write(flowers / "l.csv", 9, names=["setosa", "virginica", "setosa"]).read_text().split()
    ]
    (flowers / "first.csv").write_text("\n".join(f"{label},{rest}" for rest, _, label in lines))
    report = json.loads(predicted(flowers, "--dataset", "first.csv", "--label", "species", "--split", "all", "--json"))
    assert report["samples"] == 9 and report["accuracy"] == pytest.approx(1 / 3)
    # Without --label, the column that is no feature is the label, wherever it is.
    assert json.loads(predicted(flowers, "--dataset", "first.csv", "--split", "all", "--json")) == report
    write(flowers / "eels.csv", 9, names=["eel", "virginica", "setosa"])
    status, _, err = run(
        1, "-m", "psmpi.predict", flowers / "run", "--dataset", "eels.csv", "--split", "all", cwd=flowers
    )
    assert status == 1 and "found the label 'eel'" in " ".join(err.split())


def test_a_run_goes_on_with_the_same_names_alone(flowers):
    write(flowers / "others.csv", names=["eel", "virginica", "setosa"])
    options = ("--resume", "auto", "--out", flowers / "run", "--epochs", "13", "--dataset", "others.csv", "--new-data")
    status, _, err = run(2, "-m", "psmpi.train", *options, cwd=flowers)
    assert status == 1 and "is of the classes setosa, versi,color, virginica" in " ".join(err.split())


WRONG = ('["a", "b"]', '["a", "a", "b"]', '["a", "b", 3]', '{"a": 1}', '["a", "b", "\\u0000"]', '["a", "b", ""]', "[")


@pytest.mark.parametrize("text", WRONG)
def test_names_that_are_none_are_refused(flowers, tmp_path, text):
    path = tmp_path / "step-000000001.h5"
    path.write_bytes(checkpoint.newest(flowers / "run").read_bytes())
    with h5py.File(path, "r+") as file:
        del file["names"]
        file.create_dataset("names", data=[text], dtype=h5py.string_dtype())
    with pytest.raises(DamagedError, match="was not written as"):
        checkpoint.read_contents(path)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_make_no_difference(flowers, train, serial, ranks):
    options = ("--dataset", flowers / "flowers.csv", *OPTIONS, "--dtype", "float64")
    one_rank, many_ranks = serial(*options), train(ranks, *options)
    assert distance(one_rank.tensors(), many_ranks.tensors()) <= 1e-10
    assert many_ranks.rows[-1]["test_loss"] == pytest.approx(one_rank.rows[-1]["test_loss"], rel=1e-10)


def test_decimals_are_a_regression(tmp_path):
    lines = [f"{k},{k % 3},{0.5 * k - k % 3:.2f}" for k in range(60)]
    (tmp_path / "values.csv").write_text("\n".join(lines))
    options = ("--dataset", "values.csv", "--model", "linear", "--loss", "squared", "--method", "data_parallel")
    options += ("--epochs", "2", "--lr", "1e-4", "--out", "run")
    status, out, err = run(1, "-m", "psmpi.train", *options, cwd=tmp_path)
    assert status == 0 and "test RMSE" in out, err


@pytest.mark.parametrize("ranks", [3, 5])
def test_the_default_network_is_cut_by_classes_for_samples_of_any_shape(tmp_path, train, serial, ranks):
    """Samples are small images with channels last, of named classes."""
    rng = np.random.default_rng(0)
    x, y = (
        rng.integers(0, 256, (60, 7, 9, 3)).astype(np.uint8),
        np.array(["ant", "bee", "cat", "dog"])[np.arange(60) % 4],
    )
    x[np.arange(60), np.arange(60) % 4] //= 4
    for key, values in (("x", x), ("y", y)):
        np.save(tmp_path / f"{key}.npy", values)
    options = ("--dataset", tmp_path, "--layout", "nhwc", "--epochs", "2", "--batch-size", "16", "--dtype", "float64")
    one_rank, many_ranks = serial(*options), train(ranks, *options)
    assert "data x.npy: 48 training and 12 test samples (held out) of shape 3 x 7 x 9, uint8 from" in many_ranks.stdout
    assert "4 classes: ant (12), bee (12), cat (12), dog (12)" in many_ranks.stdout
    assert distance(one_rank.tensors(), many_ranks.tensors()) <= 1e-10
    reports = [json.loads(run(k, "-m", "psmpi.predict", many_ranks.out, "--json")[1]) for k in (1, 3)]
    assert reports[0] == reports[1] and reports[0]["accuracy"] == many_ranks.rows[-1]["test_accuracy"]


@pytest.mark.parametrize("options", [("--validation", "0.1"), ("--augment", "flip"), ("--data-memory", "1k")])
def test_private_data_are_not_parted_moved_or_bounded(options):
    numbers = ("--epochs", "1", "--batch-size", "10", "--lr", "0.1")
    status, _, err = run(2, "-m", "psmpi.train", "--method", "next", "--private-data", *numbers, *options)
    assert status == 1 and f"{options[0]} is for samples that all ranks can read" in " ".join(err.split())
