"""Validation samples, runs that end after epochs without improvement, and the best checkpoint."""

import json

import numpy as np
import pytest
from helpers.runs import distance, run

from psmpi import checkpoint
from psmpi.checkpoint.build import keep_as
from psmpi.config import from_table
from psmpi.config.tree import Config
from psmpi.data import open_dataset, open_split
from psmpi.data.validation import random_share
from psmpi.errors import UserError
from psmpi.testing.conformance import tensors
from psmpi.training.best import Best, check_monitor

SHORT = ("--epochs", "3", "--batch-size", "100", "--dtype", "float64")


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.5, 0.9])
def test_a_share_of_each_class_is_drawn(share):
    labels = np.repeat(np.arange(5), [1, 10, 37, 100, 400])[np.random.default_rng(0).permutation(548)]
    chosen = random_share(labels, share, 0)
    assert np.array_equal(chosen, random_share(labels, share, 0))
    assert not np.array_equal(chosen, random_share(labels, share, 1))
    assert abs(chosen.sum() - 548 * share) <= 1
    counts, drawn = np.bincount(labels), np.bincount(labels[chosen], minlength=5)
    assert (np.abs(drawn - share * counts) < 1 + 1e-9).all()
    values = random_share(np.zeros((200, 3)), share, 0)
    assert abs(values.sum() - 200 * share) <= 1


def test_validation_samples_are_training_samples_that_are_left_out(tmp_path):
    x, y = np.arange(100, dtype=np.float32)[:, None] + 1, np.arange(100) % 3
    np.savez(tmp_path / "own.npz", x=x, y=y)
    name = str(tmp_path / "own.npz")
    plain, with_validation = open_dataset(name, None), open_dataset(name, None, validation=0.2)
    read = {key: getattr(with_validation, key) for key in ("train", "validation", "test")}
    values = {key: split.read(np.arange(split.n)).ravel() for key, split in read.items()}
    assert np.array_equal(values["test"], plain.test.read(np.arange(plain.test.n)).ravel())
    assert (
        sorted([*values["train"], *values["validation"]]) == plain.train.read(np.arange(plain.train.n)).ravel().tolist()
    )
    for key, split in read.items():
        assert np.array_equal(split.labels, (values[key] - 1) % 3)
        assert np.array_equal(open_split(name, None, key, validation=0.2).read(np.arange(split.n)).ravel(), values[key])
    training = with_validation.for_training()
    assert (
        training.test is with_validation.validation
        and training.unseen is with_validation.test
        and training.tested == "validation"
    )
    assert plain.for_training() is plain and plain.tested == "test"
    with pytest.raises(UserError, match="has no validation samples"):
        open_split(name, None, "validation")
    for share in (0.001, 0.999):
        with pytest.raises(UserError, match="give a share that takes some and leaves some"):
            open_dataset(name, None, validation=share)


@pytest.mark.parametrize("name", ["digits", "digits:rows", "sparse", "copying:5", "adding:9"])
def test_all_kinds_of_data_sets_have_validation_samples(name):
    plain, with_validation = open_dataset(name, None), open_dataset(name, None, validation=0.1)
    assert (
        with_validation.train.n + with_validation.validation.n == plain.train.n
        and with_validation.validation.n == round(plain.train.n / 10)
    )
    assert with_validation.validation.shape == plain.shape and with_validation.test.n == plain.test.n


@pytest.mark.parametrize("method", [(), ("--method", "data_parallel"), ("--method", "local_sgd")])
def test_training_sees_no_validation_sample(train, tmp_path, method):
    """Compare with a training on files that have the validation samples as test samples."""
    with_validation = open_dataset("digits", None, validation=0.2)
    arrays = {
        f"{key}{end}": values
        for end, split in (("", with_validation.train), ("_test", with_validation.validation))
        for key, values in (("x", split.read(np.arange(split.n)).reshape(-1, 8, 8) / 16), ("y", split.labels))
    }
    np.savez(tmp_path / "parted.npz", **arrays)
    trained = train(2, "--validation", "0.2", *SHORT, *method)
    expected = train(2, "--dataset", tmp_path / "parted.npz", *SHORT, *method)
    assert distance(trained.tensors(), expected.tensors()) <= 1e-12
    for key in ("loss", "accuracy", "top5"):
        assert trained.rows[-1][f"validation_{key}"] == pytest.approx(expected.rows[-1][f"test_{key}"], rel=1e-12)
    assert not any(key.startswith("test_") for key in trained.rows[-1])
    assert "1,150 training and 288 validation samples (and 359 test samples that nothing looks at)" in trained.stdout
    assert "validation loss" in trained.stdout and "test loss" not in trained.stdout


def predicted(path, split):
    return json.loads(run(1, "-m", "psmpi.predict", path, "--json", "--split", split)[1])


def test_ranks_make_no_difference_and_predictions_know_the_samples(train, serial):
    options = ("--validation", "0.1", *SHORT)
    one_rank, three_ranks = serial(*options), train(3, *options)
    assert distance(one_rank.tensors(), three_ranks.tensors()) <= 1e-10
    assert three_ranks.rows[-1]["validation_loss"] == pytest.approx(one_rank.rows[-1]["validation_loss"], rel=1e-10)
    assert predicted(three_ranks.out, "validation")["accuracy"] == three_ranks.rows[-1]["validation_accuracy"]
    assert (
        predicted(three_ranks.out, "validation")["samples"] == 144
        and predicted(three_ranks.out, "test")["samples"] == 359
    )
    assert predicted(three_ranks.out, "train")["samples"] == 1294
    plain = serial(*SHORT)
    status, _, err = run(1, "-m", "psmpi.predict", plain.out, "--split", "validation")
    assert status == 1 and "digits has no validation samples" in err


def best_of(*losses, **run_table):
    config = from_table({"run": {"patience": 2, **run_table}}, Config(), "tests")
    best = Best(config, open_dataset("digits", None))
    rows = [
        {"epoch": k + 1, "test_loss": loss, "test_accuracy": 1 / loss, "train_loss": -loss}
        for k, loss in enumerate(losses)
    ]
    return best, rows


@pytest.mark.parametrize(
    ("losses", "number", "due"),
    [
        ((3.0,), 0, False),
        ((3.0, 2.0, 2.5), 1, False),
        ((3.0, 2.0, 2.5, 2.1), 1, True),
        ((3.0, 2.0, 2.0, 2.0), 1, True),
        ((np.nan, np.inf), -1, True),
        ((np.nan, 2.0, np.nan), 1, False),
    ],
)
def test_a_run_ends_after_epochs_without_a_better_one(losses, number, due):
    best, rows = best_of(*losses)
    assert (best.number(rows), best.due(rows)) == (number, due)
    by_accuracy, rows = best_of(*losses, monitor="accuracy")
    assert (by_accuracy.number(rows), by_accuracy.due(rows)) == (
        (number, due) if np.isfinite(losses[-1]) else (by_accuracy.number(rows), by_accuracy.due(rows))
    )


def test_what_is_better_follows_from_its_kind():
    for monitor, number, score in (
        ("loss", 1, "test loss 2"),
        ("accuracy", 1, "test accuracy 50.00 %"),
        ("train_loss", 0, "train loss -3"),
    ):
        best, rows = best_of(3.0, 2.0, 2.5, monitor=monitor, keep_best=True, patience=9)
        assert list(best.describe(rows, "best.h5")) == [f"best {score}, after epoch {number + 1}, kept as best.h5"]
        assert best.number(rows) == number and best.is_last(rows[: number + 1]) and not best.is_last(rows[: number + 2])
    assert not best_of(2.0)[0].is_last(best_of(2.0)[1]) and not best.is_last([])
    best, rows = best_of(3.0, 2.0, 2.5, patience=0)
    assert not best.due(rows * 9)
    with pytest.raises(
        UserError, match="--monitor rmse: what is measured of these data is loss, accuracy, top5, train"
    ):
        list(
            check_monitor(
                from_table({"run": {"patience": 2, "monitor": "rmse"}}, Config(), ""), open_dataset("digits", None)
            )
        )


def test_the_best_checkpoint_stays_and_a_run_that_was_stopped_ends_as_one_that_was_not(train, tmp_path):
    """The rate is so high that the loss rises again."""
    options = (
        "--epochs",
        "40",
        "--batch-size",
        "100",
        "--lr",
        "0.3",
        "--validation",
        "0.1",
        "--patience",
        "3",
        "--seed",
        "2",
    )
    options += ("--keep-best", "--checkpoint-keep", "1", "--model", "mlp", "--widths", "8", "--loss", "nll")
    options += ("--method", "data_parallel", "--dtype", "float64")
    full_run = train(2, *options)
    losses = [row["validation_loss"] for row in full_run.rows]
    best_row = int(np.argmin(losses))
    assert len(losses) == best_row + 4 < 40, losses
    assert "no better validation loss for 3 epochs: the run ends (--patience)" in full_run.stdout
    assert (
        f"best validation loss {losses[best_row]:.5g}, after epoch {best_row + 1}, kept as {full_run.out}/best.h5"
        in full_run.stdout
    )
    best = checkpoint.read_contents(full_run.out / "best.h5")
    assert best.progress.epoch == best_row + 1 and len(list((full_run.out / "checkpoints").glob("*.h5"))) == 1
    assert (
        predicted(full_run.out / "best.h5", "validation")["accuracy"] == full_run.rows[best_row]["validation_accuracy"]
    )
    # Stop inside an epoch after the best one, and resume on another number of ranks.
    out, steps = tmp_path / "stopped", (best_row + 2) * 13 - 5
    train(2, *options, "--max-steps", str(steps), out=out)
    resumed = train(3, "--resume", "auto", out=out)
    assert [row["epoch"] for row in resumed.rows] == [row["epoch"] for row in full_run.rows]
    assert [row["validation_loss"] for row in resumed.rows] == pytest.approx(losses, rel=1e-9)
    assert distance(tensors(out / "best.h5"), tensors(full_run.out / "best.h5")) <= 1e-9
    finished = train(2, "--resume", "auto", out=out)
    assert (
        "nothing left to do: no better validation loss for 3 epochs" in finished.stdout
        and len(finished.rows) == best_row + 4
    )


def test_test_samples_are_gone_by_with_a_warning(train):
    trained = train(1, "--patience", "9", *SHORT)
    assert trained.stdout.count("warning: --patience goes by the test samples, which then say less of others") == 1
    assert "warning: --keep-best" not in train(1, "--keep-best", "--monitor", "train_loss", *SHORT).stdout


def test_a_file_system_without_links_has_a_copy(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"123")

    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refuse)
    for _ in range(2):
        keep_as(tmp_path / "a", tmp_path / "best.h5")
    (tmp_path / "a").write_bytes(b"4")
    assert (tmp_path / "best.h5").read_bytes() == b"123" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("share", ["-0.1", "1", "2"])
def test_shares_that_are_none_are_refused(share):
    status, _, err = run(1, "-m", "psmpi.train", f"--validation={share}")
    assert status == 1 and "--validation" in err and "expected a share of the training samples" in err
