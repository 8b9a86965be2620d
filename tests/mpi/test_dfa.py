"""Direct feedback alignment: against backward passes, on several numbers of ranks, and its accuracy."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from helpers.datasets import real
from helpers.runs import distance, run, usual_config

from psmpi.backend import make_backend
from psmpi.data import Batch, open_dataset
from psmpi.methods.dfa import Settings, feedback, widths
from psmpi.nn.cut import split_layers
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.training.context import Context

DFA = ("--method", "dfa", "--model", "mlp", "--loss", "nll")


class Alone:
    rank, size = 0, 1


def network(*units, activation="tanh", inputs=64):
    layers = [{"type": "flatten"}]
    for n in units:
        layers += [{"type": "dense", "units": n}, {"type": activation}]
    return build("test", (1, 8, 8), [*layers, {"type": "dense", "units": 10}], 10)


def method(net, **settings):
    base = usual_config()
    config = replace(
        base,
        model=replace(base.model, dtype="float64"),
        objective=replace(base.objective, loss="nll"),
        optimization=replace(base.optimization, optimizer="sgd", clip=0.0),
    ).changed(Settings, **settings)
    return find_method("dfa")(Context(Alone(), net, open_dataset("digits", ""), config, make_backend("auto")))


def gradients(trainer, ids):
    """Return the (weight, bias) gradients of each layer after a step of dfa, and after a backward pass."""
    by_method = []
    parts = [part for part in trainer.model.parts if part.layer.linear]
    trainer.step(Batch(ids), 0.0)
    by_method.append([[view.copy() for pair in part.g for view in pair] for part in parts])
    trainer.g.fill(np.nan)
    error = trainer.error[: 10 * len(ids)].reshape(10, -1).copy()
    trainer.model.backward(trainer.tape, error)
    by_method.append([[view.copy() for pair in part.g for view in pair] for part in parts])
    return by_method


def test_the_last_layer_s_gradient_is_that_of_backward_to_the_bit():
    feedback_g, backward_g = gradients(method(network(30, 20)), np.arange(40))
    for feedback_part, backward_part in zip(feedback_g[-1], backward_g[-1], strict=True):
        assert np.array_equal(feedback_part, backward_part)
    assert not np.allclose(feedback_g[0][0], backward_g[0][0])
    # A single layer has no feedback at all.
    for feedback_part, backward_part in zip(*gradients(method(network()), np.arange(40)), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(feedback_part, backward_part, strict=True))


def test_with_the_products_of_the_weights_for_feedback_linear_layers_have_the_gradient():
    trainer = method(network(30, 20, activation="identity"))
    parts = [part for part in trainer.model.parts if part.layer.linear]
    matrices = [part.w[0][0][0] if len(part.w) == 1 else np.concatenate([w[0] for w, _ in part.w]) for part in parts]
    last = matrices[-1].reshape(10, 20)
    trainer.back = [matrices[1].reshape(20, 30).T @ last.T, last.T.copy()]
    for feedback_part, backward_part in zip(*gradients(trainer, np.arange(40)), strict=True):
        for a, b in zip(feedback_part, backward_part, strict=True):
            assert abs(a - b).max() <= 1e-12 * abs(b).max()


@pytest.mark.parametrize(("ranks", "optimizer"), [(2, "momentum"), (4, "momentum"), (3, "adam")])
def test_layers_on_many_ranks_learn_as_on_one(train, ranks, optimizer):
    # Without clipping: a norm over all layers is summed rank by rank.
    options = (*DFA, "--widths", "40", "30", "20", "--dtype", "float64", "--max-steps", "50", "--epochs", "10",
               "--optimizer", optimizer, "--lr", "0.05", "--clip", "0")  # fmt: skip
    one_rank, many_ranks = train(1, *options), train(ranks, *options)
    assert distance(one_rank.tensors(), many_ranks.tensors()) <= 1e-12
    assert many_ranks.rows[-1]["alignment"] == pytest.approx(one_rank.rows[-1]["alignment"], abs=2e-6)
    assert many_ranks.rows[-1]["test_loss"] == pytest.approx(one_rank.rows[-1]["test_loss"], rel=1e-12)


def test_activations_go_forward_one_error_comes_back(train):
    options = (*DFA, "--widths", "40", "30", "--max-steps", "10", "--epochs", "1")
    last = train(3, *options).rows[-1]
    # 10 steps of 100 samples, float32; a broadcast counts at its root, once for each receiver.
    assert last["bytes_sent_by_rank"] == [10 * 4 * 100 * 40, 10 * 4 * 100 * 30, 10 * 4 * 100 * 10 * 2]
    assert last["bytes_received_by_rank"] == [10 * 4 * 1000, 10 * 4 * (4000 + 1000), 10 * 4 * 3000]


def test_feedback_is_the_same_on_any_number_of_ranks():
    for kind in ("normal", "uniform", "shared"):
        matrices = [feedback(kind, 10, n, 800, 3, k) for k, n in enumerate((800, 500))]
        for matrix, n in zip(matrices, (800, 500), strict=True):
            assert np.array_equal(matrix, feedback(kind, 10, n, 800, 3, int(n == 500)))
            expected = {"uniform": np.sqrt(1 / (3 * n))}.get(kind, 1 / np.sqrt(10 * n))
            assert matrix.shape == (n, 10) and matrix.std() == pytest.approx(expected, rel=0.05)
        assert not np.array_equal(matrices[0], feedback(kind, 10, 800, 800, 4, 0))
        scaled = matrices[0][:500] * np.sqrt(800 / 500)
        assert np.allclose(matrices[1], scaled) == (kind == "shared")


def test_layers_are_dealt_whole():
    net = make_network("lenet", (1, 28, 28), 10)
    for ranks in range(1, 6):
        stages = split_layers(net, ranks)
        assert stages[0][0] == 0 and stages[-1][1] == len(net.layers)
        assert all(a[1] == b[0] for a, b in pairwise(stages))
    assert widths(net) == [6 * 12 * 12, 16 * 4 * 4, 120, 84, 10]


@pytest.mark.parametrize("ranks", [1, 3])
def test_convolutions_learn_with_a_warning(train, ranks):
    options = ("--method", "dfa", "--model", "psnet", "--max-steps", "20", "--epochs", "5", "--dtype", "float64")
    one_rank, many_ranks = train(1, *options), train(ranks, *options)
    assert distance(one_rank.tensors(), many_ranks.tensors()) <= 1e-12
    assert "convolutions learn poorly by direct feedback" in many_ranks.stdout


def test_a_narrow_layer_is_warned_of(train):
    result = train(2, *DFA, "--widths", "30", "5", "--max-steps", "2", "--epochs", "1")
    assert "a hidden layer of 5 units is narrower than the 10 scores" in result.stdout


def test_a_run_goes_on_on_any_number_of_ranks(train, tmp_path):
    options = (*DFA, "--widths", "40", "30", "--dtype", "float64", "--epochs", "10")
    out = tmp_path / "begun"
    train(3, *options, "--max-steps", "7", out=out)
    result = train(2, *options, "--max-steps", "21", "--resume", "auto", out=out)
    assert distance(train(3, *options, "--max-steps", "21").tensors(), result.tensors()) <= 1e-12


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--widths", "20"), "start 2 ranks or fewer"),
        (("--masters", "2"), "--masters is of --method psl"),
        (("--optimizer", "lbfgs"), "needs gradients of the loss, which direct feedback does not compute"),
        (("--feedback-scale", "0"), "expected a number above 0"),
        (("--feedback-seed", "-1"), "from 0 up"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, options, says):
    options = options if "--widths" in options else (*options, "--widths", "20", "20")
    status, _, err = run(3, "-m", "psmpi.train", "--out", tmp_path / "run", *DFA, *options)
    assert status != 0 and err.count(says) == 1 and "Traceback" not in err, err


def test_a_run_that_diverges_ends_the_job(tmp_path):
    options = ("--widths", "20", "20", "--optimizer", "sgd", "--lr", "1e38", "--clip", "0")
    status, _, err = run(3, "-m", "psmpi.train", "--out", tmp_path / "run", *DFA, *options, timeout=30)
    assert status != 0 and err.count("not a finite number") == 1 and "Traceback" not in err, err


TANH = """
[model]
model = "custom"
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "dense"
units = {units}
[[model.layers]]
type = "tanh"
[[model.layers]]
type = "dense"
units = {units}
[[model.layers]]
type = "tanh"
[[model.layers]]
type = "dense"
units = 10
"""


@pytest.mark.slow
def test_mnist_aligns_and_is_learned(train, tmp_path):
    """Bounds on accuracy and alignment from small runs of these settings, with back-propagation and nearly fixed hidden
    layers as controls."""
    folder = real("mnist") / "mnist"
    config = tmp_path / "net.toml"
    config.write_text(TANH.format(units=256))
    setting = ("--config", config, "--dataset", "mnist", "--data-dir", folder, "--loss", "nll", "--batch-size", "128",
               "--optimizer", "momentum", "--clip", "0", "--epochs", "3", "--threads", "1")  # fmt: skip
    aligned = train(2, "--method", "dfa", *setting, "--lr", "0.1")
    error = 1 - aligned.rows[-1]["test_accuracy"]
    backward_error = 1 - train(1, "--method", "data_parallel", *setting, "--lr", "0.05").rows[-1]["test_accuracy"]
    assert all(cosine >= 0.2 for cosine in aligned.rows[0]["alignment"])
    assert error <= 0.06 and error <= backward_error + 0.03
    # Hidden layers that hardly move learn less.
    frozen = train(1, "--method", "dfa", *setting, "--lr", "0.1", "--feedback-scale", "1e-9")
    assert 1 - frozen.rows[-1]["test_accuracy"] >= error + 0.03


def test_nothing_is_aligned_at_first():
    trainer = method(network(200, 150))
    cosines = trainer.diagnostics()["alignment"]
    assert len(cosines) == 2 and all(abs(cosine) <= 0.1 for cosine in cosines)
    assert json.dumps(cosines)
