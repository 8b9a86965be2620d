"""Predictions from a checkpoint."""

import csv
import json
import tracemalloc

import h5py
import numpy as np
import pytest
from helpers.runs import run

from psmpi.data import open_dataset, open_split
from psmpi.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    status, _, err = run(1, "-m", "psmpi.train", "--out", out, "--epochs", "12", "--lr", "0.01", "--batch-size", "100")
    assert status == 0, err
    return out


def predict(ranks, *arguments):
    status, out, err = run(ranks, "-m", "psmpi.predict", *arguments)
    assert status == 0 and "Traceback" not in err, err
    return out


def refused(*arguments):
    status, _, err = run(1, "-m", "psmpi.predict", *arguments)
    assert status == 1 and "Traceback" not in err
    return " ".join(err.split())


@pytest.mark.parametrize("ranks", [1, 3, 10, 13])
def test_any_ranks_find_the_accuracy_of_the_training(trained, tmp_path, ranks):
    row = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    report = json.loads(predict(ranks, trained, "--json", "--out", tmp_path / "p.npz"))
    assert report["accuracy"] == row["test_accuracy"] > 0.5 and report["top5"] == row["test_top5"] > report["accuracy"]
    saved = np.load(tmp_path / "p.npz")
    labels = open_dataset("digits", None).test.labels
    assert np.array_equal(saved["labels"], labels) and saved["scores"].shape == (len(labels), 10)
    assert np.array_equal(saved["predicted"], saved["scores"].argmax(axis=1))
    confusion = np.array(report["confusion"])
    assert confusion.sum() == len(labels)
    assert all(
        confusion[i, j] == np.sum((labels == i) & (saved["predicted"] == j)) for i in range(10) for j in range(10)
    )


def test_ranks_give_the_same_scores(trained, tmp_path):
    for ranks in (1, 4):
        predict(ranks, trained, "--out", tmp_path / f"{ranks}.npz", "--split", "train")
    one_rank, four_ranks = (np.load(tmp_path / f"{ranks}.npz")["scores"] for ranks in (1, 4))
    assert abs(one_rank - four_ranks).max() <= 1e-5 * abs(one_rank).max()


def test_a_network_that_cannot_be_cut_shares_the_samples(tmp_path):
    options = ("--out", tmp_path / "run", "--model", "mlp", "--widths", "8", "--epochs", "2")
    status, _, err = run(1, "-m", "psmpi.train", *options)
    assert status == 0, err
    one_rank, three_ranks = (json.loads(predict(ranks, tmp_path / "run", "--json")) for ranks in (1, 3))
    assert one_rank == three_ranks


def test_files_of_ones_own_need_no_labels(trained, tmp_path):
    split = open_dataset("digits", None).test
    x = (split.read(np.arange(30)) / np.float32(16)).astype(np.float32).reshape(-1, 8, 8)
    np.savez(tmp_path / "x.npz", x=x)
    options = (trained, "--dataset", tmp_path / "x.npz", "--split", "all", "--out", tmp_path / "p.csv")
    out = predict(1, *options)
    assert "30 samples" in out and "scores of classes 0-9; no accuracy" in out
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    predict(1, trained, "--out", tmp_path / "p.npz")
    expected = np.load(tmp_path / "p.npz")
    assert [int(row["predicted"]) for row in rows] == expected["predicted"][:30].tolist()
    assert {row["label"] for row in rows} == {""}
    assert float(rows[4]["score_7"]) == pytest.approx(expected["scores"][4, 7], rel=1e-5)
    np.savez(tmp_path / "x.npz", x=x, y=split.labels[:30])
    report = json.loads(predict(2, *options, "--json"))
    assert report["accuracy"] == np.mean(expected["predicted"][:30] == split.labels[:30])


def test_a_part_scores_its_classes(trained, tmp_path):
    status, _, err = run(1, "-m", "psmpi.inspect", "cut", trained, "--classes", "4", "6", "--out", tmp_path / "part.h5")
    assert status == 0, err
    predict(1, trained, "--out", tmp_path / "all.npz")
    for ranks in (1, 2, 3):
        out = predict(ranks, tmp_path / "part.h5", "--out", tmp_path / "part.npz")
        assert "classes 4 6" in out
        part, full = np.load(tmp_path / "part.npz"), np.load(tmp_path / "all.npz")
        assert abs(part["scores"] - full["scores"][:, [4, 6]]).max() <= 1e-5 * abs(full["scores"]).max()
        assert set(part["predicted"]) <= {4, 6}


def test_mistakes_are_named(trained, tmp_path):
    assert "there is no such checkpoint" in refused(tmp_path / "none.h5")
    assert "ends in .csv or .npz" in refused(trained, "--out", "p.txt")
    assert "nowhere" in refused(trained, "--out", tmp_path / "nowhere" / "p.csv")
    np.savez(tmp_path / "x.npz", x=np.zeros((9, 3), np.float32), y=np.zeros(9, int))
    assert "was trained on (1, 8, 8)" in refused(trained, "--dataset", tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", x=np.zeros((9, 8, 8), np.float32), y=np.full(9, 12))
    assert "has the label 12" in refused(trained, "--dataset", tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", x=np.zeros((9, 8, 8), np.float32))
    assert "no array 'y'" in refused(trained, "--dataset", tmp_path / "x.npz")
    assert "splits train and test" in refused(trained, "--split", "all")


SAMPLES, LABELS = np.full((9, 8, 8), 0.5, np.float32), np.arange(9)
ALL = "to predict samples without labels or values add --split all, which takes all samples x"


@pytest.mark.parametrize("end", [".npz", ".h5"])
@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": SAMPLES}, f"no array 'y'; found x; {ALL}"),
        ({"x": SAMPLES, "x_test": SAMPLES}, f"no array 'y'; found x, x_test; {ALL}"),
        ({"x": SAMPLES, "labels": LABELS}, f"no array 'y'; found labels, x; {ALL}, else save labels as y"),
        (
            {"x": SAMPLES, "y": LABELS, "x_test": SAMPLES},
            "or to predict x_test without labels or values save it as x and",
        ),
        ({"images": SAMPLES}, "no array 'x'; found images; expected x (the samples)"),
    ],
)
def test_what_to_do_without_labels_is_said(tmp_path, end, split, arrays, says):
    path = tmp_path / f"own{end}"
    if end == ".npz":
        np.savez(path, **dict(sorted(arrays.items())))
    else:
        with h5py.File(path, "w") as file:
            for key, values in arrays.items():
                file[key] = values
    with pytest.raises(UserError) as caught:
        open_split(str(path), None, split, predicted=True)
    assert f"{path}: " in str(caught.value) and says in str(caught.value)
    # Trainings need labels.
    with pytest.raises(UserError) as caught:
        open_dataset(str(path), None)
    assert "--split" not in str(caught.value)
    if "x" in arrays:
        assert open_split(str(path), None, "all", predicted=True).n == 9


def test_samples_without_labels_are_predicted_as_the_error_says(trained, tmp_path):
    np.savez(tmp_path / "x.npz", x=SAMPLES)
    for ranks in (1, 3):
        status, _, err = run(ranks, "-m", "psmpi.predict", trained, "--dataset", tmp_path / "x.npz")
        assert status == 1 and " ".join(err.split()).count(ALL) == 1
        assert "9 samples" in predict(ranks, trained, "--dataset", tmp_path / "x.npz", "--split", "all")


def test_the_file_of_a_training_that_has_lost_its_labels_is_predicted(tmp_path):
    path = tmp_path / "own.npz"
    np.savez(path, x=np.random.default_rng(0).random((40, 6)), y=np.arange(40) % 4)
    options = ("--model", "mlp", "--widths", "4", "--epochs", "1", "--batch-size", "8", "--out", tmp_path / "run")
    status, _, err = run(1, "-m", "psmpi.train", "--dataset", path, *options)
    assert status == 0, err
    np.savez(path, x=np.ones((7, 6)))
    assert "no array 'y'" in refused(tmp_path / "run") and "no array 'y'" in refused(tmp_path / "run", "--split", "all")
    assert ALL in refused(tmp_path / "run", "--dataset", path)
    status, out, err = run(1, "-m", "psmpi.predict", tmp_path / "run", "--dataset", path, "--split", "all")
    assert status == 0 and "7 samples" in out and "cannot be compared with what checkpoint" in err


def test_of_many_classes_what_is_confused_is_listed(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 5)), np.arange(100) % 50
    np.savez(tmp_path / "many.npz", x=x, y=y, x_test=x, y_test=y)
    options = ("--dataset", tmp_path / "many.npz", "--model", "head", "--widths", "6", "--loss", "nll", "--epochs", "2")
    status, _, err = run(
        1, "-m", "psmpi.train", "--out", tmp_path / "run", *options, "--lr", "0.01", "--batch-size", "50"
    )
    assert status == 0, err
    report = json.loads(predict(1, tmp_path / "run", "--json", "--out", tmp_path / "p.npz"))
    predicted = np.load(tmp_path / "p.npz")["predicted"]
    counts = [count for *_, count in report["confused"]]
    assert counts == sorted(counts, reverse=True) and sum(counts) == np.count_nonzero(predicted != y) > 0
    for label, choice, count in report["confused"]:
        assert count == np.count_nonzero((y == label) & (predicted == choice)) and label != choice
    output = predict(1, tmp_path / "run")
    assert f"{len(counts)} pairs of classes confused, most often:" in output and output.count("taken for") == 10
    correct = np.array([np.count_nonzero(predicted[y == c] == c) for c in range(50)])
    worst = cells(output, "worst classes", 3)
    assert len(worst) == 10 and [float(row[2][:-1]) / 50 for row in worst] == np.sort(correct)[:10].tolist()
    assert all(correct[int(label)] == float(share[:-1]) / 50 and samples == "2" for label, samples, share in worst)


def cells(output, title, columns):
    """Return the rows of the table under a title, as lists of `columns` words."""
    _, _, following = output.partition(f"{title} ")
    rows = []
    for line in following.splitlines()[3:]:
        if len(line.replace(" %", "%").split()) != columns:
            break
        rows.append(line.replace(" %", "%").split())
    return rows


def test_scores_and_confusion_are_printed_where_no_file_is_named(trained, tmp_path):
    predict(1, trained, "--out", tmp_path / "p.npz")
    saved = np.load(tmp_path / "p.npz")
    correct = saved["labels"] == saved["predicted"]
    output = predict(2, trained)
    class_accuracy = [correct[saved["labels"] == c].mean() for c in range(10)]
    second = np.argsort(-saved["scores"], axis=1, kind="stable")[:, :5] == saved["labels"][:, None]
    expected = [correct.mean(), second.any(axis=1).mean(), np.mean(class_accuracy), min(class_accuracy)]
    assert cells(output, "scores", 4) == [[f"{100 * value:.2f}%" for value in expected]]
    table = cells(output, "confusion: rows are labels, columns predictions", 12)
    assert len(table) == 10 and max(map(len, output.splitlines()[1:])) <= 80
    for c, row in enumerate(table):
        counts = np.bincount(saved["predicted"][saved["labels"] == c], minlength=10)
        assert row == [str(c), *(str(n) if n else "." for n in counts), f"{100 * class_accuracy[c]:.1f}%"]


def test_the_first_predictions_are_printed_where_there_are_no_labels(trained, tmp_path):
    x = np.random.default_rng(0).random((15, 8, 8))
    np.savez(tmp_path / "x.npz", x=x)
    options = (trained, "--dataset", tmp_path / "x.npz", "--split", "all")
    predict(1, *options, "--out", tmp_path / "p.npz")
    scores = np.load(tmp_path / "p.npz")["scores"]
    for more in ((), ("--out", tmp_path / "q.npz")):
        table = cells(predict(3, *options, *more), "first predictions", 5)
        assert len(table) == 10
        for k, (sample, first, first_score, second, second_score) in enumerate(table):
            order = np.argsort(-scores[k])[:2]
            assert [int(sample), int(first), int(second)] == [k, *order]
            assert [float(first_score), float(second_score)] == pytest.approx(scores[k, order], rel=2e-3)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A run with 20,000 classes; the scores of all test samples take 96 MB."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    # Half of the samples are of nine classes with distant numbers.
    class_lists = [7 + 2200 * rng.integers(0, 9, n) for n in (900, 1200)]
    y, y_test = (
        np.where(rng.random(len(classes)) < 0.5, classes, rng.integers(0, 20_000, len(classes)))
        for classes in class_lists
    )
    x, x_test = (rng.normal(size=(len(labels), 5)).astype(np.float32) for labels in (y, y_test))
    y[0] = 19_999
    np.savez(folder / "many.npz", x=x, y=y, x_test=x_test, y_test=y_test)
    options = ("--dataset", folder / "many.npz", "--model", "head", "--widths", "6", "--loss", "nll", "--epochs", "9")
    options = (*options, "--lr", "0.01", "--batch-size", "300", "--out", folder / "run")
    status, _, err = run(1, "-m", "psmpi.train", *options)
    assert status == 0, err
    return folder / "run"


def test_of_many_classes_no_rank_holds_the_scores_of_all_samples(many, tmp_path):
    """A rank finds the largest scores by tiles of classes, and --out writes all scores."""
    peaks = []
    # Load modules before memory is measured.
    one_rank = json.loads(predict(1, many, "--json"))
    for ranks, *out in ((3,), (1, "--out", tmp_path / "p.npz")):
        tracemalloc.start()
        try:
            report = json.loads(predict(ranks, many, "--json", *out))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert report == one_rank
    saved = np.load(tmp_path / "p.npz")
    scores, labels = saved["scores"], saved["labels"]
    assert scores.shape == (1200, 20_000) and np.array_equal(saved["predicted"], scores.argmax(axis=1))
    larger = (scores > scores[np.arange(1200), labels][:, None]).sum(axis=1)
    assert (report["accuracy"], report["top5"]) == (np.mean(larger < 1), np.mean(larger < 5)) and report["top5"] > 0
    assert peaks[0] < scores.nbytes / 8 and peaks[1] < scores.nbytes / 2
