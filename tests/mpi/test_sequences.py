"""Trainings on sequences: the same on any ranks, resumed, predicted; and what is said where they do not fit."""

import json

import numpy as np
import pytest
from helpers.runs import distance, run

from psmpi.data import open_dataset

SMALL = ("--dtype", "float64", "--widths", "6", "5", "--max-steps", "12", "--epochs", "1")
RAGGED = ("--dataset", "repeat_copy:2", "--loss", "nll", "--method", "data_parallel", *SMALL)


def refused(*options, ranks=1):
    status, _, err = run(ranks, "-m", "psmpi.train", *options)
    assert status == 1 and "Traceback" not in err and err.count("error: ") == 1, err
    return " ".join(err.split())


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_ragged_sequences_train_the_same_on_any_ranks(train, kind):
    """The mean is over the steps that count of the whole minibatch, not of each rank's slice."""
    one, three = (train(ranks, "--model", kind, *RAGGED) for ranks in (1, 3))
    assert distance(one.tensors(), three.tensors()) <= 1e-9
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert one.rows[-1][name] == pytest.approx(three.rows[-1][name], rel=1e-9)


@pytest.mark.parametrize("options", [("--partition", "scores"), ("--trunk", "split"), ("--placement", "owner")])
def test_classes_over_ranks_share_recurrent_layers(train, tmp_path, options):
    layers = '[model]\nmodel = "head"\n' + "".join(
        f"[[model.layers]]\n{text}\n" for text in ('type = "lstm"\nunits = 6', 'type = "last"')
    )
    (tmp_path / "trunk.toml").write_text(layers)
    given = ("--config", tmp_path / "trunk.toml", "--dataset", "digits:rows", "--dtype", "float64", "--epochs", "1")
    one, three = (train(ranks, *given, *(options if ranks > 1 else ())) for ranks in (1, 3))
    assert distance(one.tensors(), three.tensors()) <= 1e-8


def test_values_of_each_step_are_learnt(train, tmp_path):
    """The running sum of a sequence, of which some steps do not count."""
    rng = np.random.default_rng(0)
    x = rng.random((400, 6, 1)).astype(np.float32)
    y = np.cumsum(x[..., 0], axis=1)[..., None].astype(np.float64)
    y[:, 3] = np.nan
    np.savez(tmp_path / "sums.npz", x=x, y=y, lengths=rng.integers(2, 7, 400))
    options = ("--dataset", tmp_path / "sums.npz", "--model", "gru", "--widths", "16", "--loss", "squared")
    found = train(2, *options, "--method", "data_parallel", "--epochs", "40", "--batch-size", "20", "--lr", "0.01")
    assert found.rows[-1]["test_rmse"] < 0.1 < found.rows[0]["test_rmse"]


def test_a_resumed_training_of_sequences_ends_where_it_would_have(train, tmp_path):
    whole = train(2, "--model", "lstm", *RAGGED)
    train(1, "--model", "lstm", *RAGGED, "--max-steps", "5", out=tmp_path / "cut")
    again = train(3, "--resume", "auto", "--max-steps", "12", out=tmp_path / "cut")
    assert distance(whole.tensors(), again.tensors()) <= 1e-9


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_predicted_with_the_accuracy_of_the_training(train, tmp_path, ranks):
    trained = train(1, "--model", "gru", *RAGGED)
    for name in ("p.npz", "p.csv"):
        options = (trained.out, "--dataset", "repeat_copy:2", "--out", tmp_path / name, "--json")
        status, out, err = run(ranks, "-m", "psmpi.predict", *options)
        assert status == 0, err
        found, test = json.loads(out), open_dataset("repeat_copy:2", None).test
        assert found["accuracy"] == trained.rows[-1]["test_accuracy"] and found["steps"] == test.steps
    saved = np.load(tmp_path / "p.npz")
    assert saved["scores"].shape == (test.n, test.steps, 5) and (saved["labels"] == test.targets).all()
    right = saved["predicted"] == test.targets
    assert found["accuracy"] == right[test.targets >= 0].mean()
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0].startswith("sample,step,label,predicted") and len(lines) == 1 + test.n * test.steps
    # Longer ones than it was trained on.
    status, out, err = run(1, "-m", "psmpi.predict", trained.out, "--dataset", "repeat_copy:3", "--json")
    assert status == 0 and json.loads(out)["steps"] == 14, err


def test_tokens_are_looked_up(train, tmp_path):
    """Whether the first token comes again: learnt with vectors of tokens, and from the file with another one alone."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, (600, 4))
    path = tmp_path / "tokens.npz"
    np.savez(path, x=x, y=(x[:, 1:] == x[:, :1]).any(axis=1).astype(int), lengths=np.full(600, 4))
    options = ("--dataset", path, "--model", "lstm", "--widths", "16", "--batch-size", "20", "--lr", "0.01")
    found = train(2, *options, "--vocabulary", "5", "--method", "data_parallel", "--epochs", "30")
    assert found.rows[-1]["test_accuracy"] > 0.95
    assert "the samples are tokens" in refused(*options) and "--vocabulary 5" in refused(*options)
    assert "have the token 4, and the vocabulary has 4" in refused(*options, "--vocabulary", "4", ranks=2)


def test_what_does_not_fit_sequences_is_said():
    steps, rows = ("--dataset", "copying:3", "--model", "lstm"), ("--dataset", "digits:rows", "--model", "lstm")
    for method in ("dfa", "ist", "sil", "next"):
        said = refused(*rows, "--method", method)
        assert (
            f"--method {method} does not train on samples that are sequences: use --method psl, data_parallel" in said
        )
    assert "--method psl does not train on a target at each step: use --method data_parallel" in refused(*steps)
    assert "not made for samples of shape (1, 8, 8): make sequences of images (--dataset NAME:rows)" in refused(
        "--model", "lstm"
    )
    assert "use --model rnn, gru, lstm" in refused("--dataset", "digits:rows")
    assert "expected copying:N with N from 1 to 5000" in refused("--dataset", "copying:0")
