"""Trainings on sequences: equal on any ranks, resumed, predicted, and refused where sequences do not fit."""

import json

import numpy as np
import pytest
from helpers.runs import distance, run

from psmpi.backend import NumpyOps
from psmpi.data import Batch, open_dataset
from psmpi.nn.model import Model
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.train import parse
from psmpi.training.context import Context
from psmpi.training.usual import usual

SMALL = ("--dtype", "float64", "--widths", "6", "5", "--max-steps", "12", "--epochs", "1")
RAGGED = ("--dataset", "repeat_copy:2", "--loss", "nll", "--method", "data_parallel", *SMALL)


def refused(*options, ranks=1):
    status, _, err = run(ranks, "-m", "psmpi.train", *options)
    assert status == 1 and "Traceback" not in err and err.count("error: ") == 1, err
    return " ".join(err.split())


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_ragged_sequences_train_the_same_on_any_ranks(train, kind):
    """The mean is over the counted steps of the whole minibatch, not of each rank's slice."""
    one_rank, three_ranks = (train(ranks, "--model", kind, *RAGGED) for ranks in (1, 3))
    assert distance(one_rank.tensors(), three_ranks.tensors()) <= 1e-9
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert one_rank.rows[-1][name] == pytest.approx(three_ranks.rows[-1][name], rel=1e-9)


@pytest.mark.parametrize("options", [("--partition", "scores"), ("--trunk", "split"), ("--placement", "owner")])
def test_classes_over_ranks_share_recurrent_layers(train, tmp_path, options):
    layers = '[model]\nmodel = "head"\n' + "".join(
        f"[[model.layers]]\n{text}\n" for text in ('type = "lstm"\nunits = 6', 'type = "last"')
    )
    (tmp_path / "trunk.toml").write_text(layers)
    fixed = ("--config", tmp_path / "trunk.toml", "--dataset", "digits:rows", "--dtype", "float64", "--epochs", "1")
    one_rank, three_ranks = (train(ranks, *fixed, *(options if ranks > 1 else ())) for ranks in (1, 3))
    assert distance(one_rank.tensors(), three_ranks.tensors()) <= 1e-8


def test_values_of_each_step_are_learnt(train, tmp_path):
    """Targets are running sums of the inputs, and NaN at a step that does not count."""
    rng = np.random.default_rng(0)
    x = rng.random((400, 6, 1)).astype(np.float32)
    y = np.cumsum(x[..., 0], axis=1)[..., None].astype(np.float64)
    y[:, 3] = np.nan
    np.savez(tmp_path / "sums.npz", x=x, y=y, lengths=rng.integers(2, 7, 400))
    options = ("--dataset", tmp_path / "sums.npz", "--model", "gru", "--widths", "16", "--loss", "squared")
    trained = train(2, *options, "--method", "data_parallel", "--epochs", "40", "--batch-size", "20", "--lr", "0.01")
    assert trained.rows[-1]["test_rmse"] < 0.1 < trained.rows[0]["test_rmse"]


def test_a_resumed_training_of_sequences_ends_where_it_would_have(train, tmp_path):
    full_run = train(2, "--model", "lstm", *RAGGED)
    train(1, "--model", "lstm", *RAGGED, "--max-steps", "5", out=tmp_path / "cut")
    resumed = train(3, "--resume", "auto", "--max-steps", "12", out=tmp_path / "cut")
    assert distance(full_run.tensors(), resumed.tensors()) <= 1e-9


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_are_predicted_with_the_accuracy_of_the_training(train, tmp_path, ranks):
    trained = train(1, "--model", "gru", *RAGGED)
    for name in ("p.npz", "p.csv"):
        options = (trained.out, "--dataset", "repeat_copy:2", "--out", tmp_path / name, "--json")
        status, out, err = run(ranks, "-m", "psmpi.predict", *options)
        assert status == 0, err
        report, test = json.loads(out), open_dataset("repeat_copy:2", None).test
        assert report["accuracy"] == trained.rows[-1]["test_accuracy"] and report["steps"] == test.steps
    saved = np.load(tmp_path / "p.npz")
    assert saved["scores"].shape == (test.n, test.steps, 5) and (saved["labels"] == test.targets).all()
    correct = saved["predicted"] == test.targets
    assert report["accuracy"] == correct[test.targets >= 0].mean()
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0].startswith("sample,step,label,predicted") and len(lines) == 1 + test.n * test.steps
    # Sequences that are longer than those of the training.
    status, out, err = run(1, "-m", "psmpi.predict", trained.out, "--dataset", "repeat_copy:3", "--json")
    assert status == 0 and json.loads(out)["steps"] == 14, err


def test_tokens_are_looked_up(train, tmp_path):
    """The label says whether the first token occurs again, and a network learns it from vectors of tokens."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, (600, 4))
    path = tmp_path / "tokens.npz"
    np.savez(path, x=x, y=(x[:, 1:] == x[:, :1]).any(axis=1).astype(int), lengths=np.full(600, 4))
    options = ("--dataset", path, "--model", "lstm", "--widths", "16", "--batch-size", "20", "--lr", "0.01")
    trained = train(2, *options, "--vocabulary", "5", "--method", "data_parallel", "--epochs", "30")
    assert trained.rows[-1]["test_accuracy"] > 0.95
    assert "the samples are tokens" in refused(*options) and "--vocabulary 5" in refused(*options)
    assert "have the token 4, and the vocabulary has 4" in refused(*options, "--vocabulary", "4", ranks=2)


def gradient(folder, *options):
    """Return the gradient of a training's first minibatch, and the same gradient computed sample by sample and step by
    step."""
    config = usual(parse([*map(str, options), "--method", "data_parallel", "--optimizer", "sgd", "--lr", "1", "--clip",
                          "0", "--dtype", "float64", "--threads", "1"]))  # fmt: skip
    dataset = open_dataset(config.data.dataset, None)
    by_step = dataset.train.by_step
    network = make_network(config.model.model, dataset.shape, dataset.outputs, **config.model.shape, by_step=by_step)
    context = Context(Alone(), network, dataset, config, NumpyOps())
    method = find_method("data_parallel")(context)
    model = Model(network, context.layout, method.w.copy(), np.zeros_like(method.w), NumpyOps())
    ids, train = np.arange(9), dataset.train
    method.gradient(Batch(ids))
    total, value, loss = np.zeros_like(model.g), 0.0, context.loss()
    for k in ids:
        # Sample by sample, step by step.
        length = dataset.shape[1] if train.lengths is None else train.lengths[k]
        x = train.read([k]).reshape(*dataset.shape, 1)[:, :length].astype(float) * train.scale
        tape = model.forward(np.ascontiguousarray(x))
        dy, targets = np.zeros(tape.scores.shape), np.atleast_1d(train.targets[k])
        for t, label in enumerate(targets[:length] if by_step else targets):
            if label >= 0:
                scores, grad = tape.scores[:, t] if by_step else tape.scores, np.zeros((len(dy), 1))
                value += loss(np.ascontiguousarray(scores), np.array([label]), 1.0, grad)
                (dy[:, t] if by_step else dy)[...] = grad
        model.backward(tape, dy)
        total += model.g
    count = int((train.targets[ids] >= 0).sum())
    return method.g.copy(), total / count


class Alone:
    rank, size = 0, 1


@pytest.mark.parametrize("task", ["repeat_copy:3", "digits:rows"])
def test_the_loss_is_the_mean_over_what_counts(tmp_path, task):
    """The gradient is the sum of the gradients of single steps, divided by the number of steps that count."""
    method_gradient, step_gradient = gradient(
        tmp_path, "--dataset", task, "--model", "lstm", "--widths", "5", "4", "--loss", "nll"
    )
    assert np.abs(method_gradient - step_gradient).max() <= 1e-12 * np.abs(step_gradient).max()


def test_values_of_each_step_are_predicted_without_those_that_do_not_count(train, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.random((50, 4, 1)).astype(np.float32), rng.random((50, 4, 2))
    y[rng.random((50, 4)) < 0.3] = np.nan
    np.savez(tmp_path / "own.npz", x=x, y=y, lengths=rng.integers(2, 5, 50))
    options = ("--dataset", tmp_path / "own.npz", "--model", "gru", "--widths", "4", "--loss", "squared")
    trained = train(1, *options, "--method", "data_parallel", "--epochs", "1", "--batch-size", "10")
    words = (trained.out, "--dataset", tmp_path / "own.npz", "--json", "--out", tmp_path / "p.npz")
    status, out, err = run(1, "-m", "psmpi.predict", *words)
    assert status == 0, err
    assert json.loads(out)["rmse"] == pytest.approx(trained.rows[-1]["test_rmse"], rel=1e-5)
    saved = np.load(tmp_path / "p.npz")
    errors = saved["values"] - saved["targets"]
    assert json.loads(out)["rmse"] == pytest.approx(np.sqrt(np.nanmean(errors**2)), rel=1e-5)


def test_normalized_networks_of_ragged_sequences_are_calibrated_and_exported(train, tmp_path):
    """Statistics leave out padding: files that differ in their padding alone give the same scores."""
    rng = np.random.default_rng(0)
    x, lengths = rng.random((60, 6, 2)).astype(np.float32), rng.integers(1, 7, 60)
    layers = ['type = "lstm"\nunits = 5', 'type = "last"', 'type = "batch_norm"', 'type = "dense"\nunits = 3']
    (tmp_path / "net.toml").write_text(
        '[model]\nmodel = "custom"\n' + "".join(f"[[model.layers]]\n{layer}\n" for layer in layers)
    )
    scores = []
    for steps, number in ((6, 0.0), (11, 7.0)):
        padded = np.full((60, steps, 2), number, np.float32)
        padded[:, :6] = np.where((np.arange(6) < lengths[:, None])[..., None], x, np.float32(number))
        np.savez(tmp_path / "own.npz", x=padded, y=np.arange(60) % 3, lengths=lengths)
        options = ("--config", tmp_path / "net.toml", "--dataset", tmp_path / "own.npz", "--method", "data_parallel")
        trained = train(1, *options, "--epochs", "2", "--batch-size", "12", "--lr", "0.01")
        words = (trained.out, "--dataset", tmp_path / "own.npz", "--calibrate", "40", "--out", tmp_path / "p.npz")
        status, _, err = run(1, "-m", "psmpi.predict", *words)
        assert status == 0, err
        scores.append(np.load(tmp_path / "p.npz")["scores"])
        pytest.importorskip("onnxruntime")
        words = ("export", trained.out, "--calibrate", "40", "--out", tmp_path / "net.onnx")
        status, out, err = run(1, "-m", "psmpi.inspect", *words)
        assert status == 0 and "onnxruntime's scores differ" in out, err
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-4)


def test_what_does_not_fit_sequences_is_said(tmp_path):
    steps, rows = ("--dataset", "copying:3", "--model", "lstm"), ("--dataset", "digits:rows", "--model", "lstm")
    for method in ("dfa", "ist", "sil", "next"):
        message = refused(*rows, "--method", method)
        assert (
            f"--method {method} does not train on samples that are sequences: use --method psl, data_parallel"
            in message
        )
    assert "--method psl does not train on a target at each step: use --method data_parallel" in refused(*steps)
    assert "not made for samples of shape (1, 8, 8): make sequences of images (--dataset NAME:rows)" in refused(
        "--model", "lstm"
    )
    assert "use --model rnn, gru, lstm" in refused("--dataset", "digits:rows", "--model", "lenet")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ragged.npz", x=rng.random((20, 5)), y=np.arange(20) % 2, lengths=rng.integers(1, 6, 20))
    ragged = ("--dataset", tmp_path / "ragged.npz", "--method", "data_parallel")
    assert "takes the padding of shorter sequences" in refused(*ragged, "--model", "mlp")
    assert "takes them for tokens: leave --vocabulary out" in refused(*ragged, "--model", "gru", "--vocabulary", "5")
    assert "expected copying:N with N from 1 to 5000" in refused("--dataset", "copying:0")
