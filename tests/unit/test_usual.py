"""Epochs, minibatch and learning rate by default: their values, and the accuracy that they reach."""

import pytest
from helpers.runs import Trained, run

from psmpi.config import Config, Data, NetworkSettings, Optimization, read_file, usual_numbers
from psmpi.config.usual import RATES
from psmpi.errors import counted
from psmpi.optim import OPTIMIZERS, is_first_order

TRAIN = ("-m", "psmpi.train", "--threads", "1")


def numbers(samples, model="psnet", optimizer="adam", batch=None, **settings):
    model = NetworkSettings(model=model, **settings)
    return usual_numbers(samples, Config(Data(batch_size=batch), model, optimization=Optimization(optimizer=optimizer)))


@pytest.mark.parametrize(
    ("samples", "found"),
    [
        (7, (200, 7, 1e-2)),
        (100, (200, 32, 1e-2)),
        (1438, (60, 32, 1e-2)),
        (9_999, (10, 32, 1e-2)),
        (10_000, (27, 100, 1e-3)),
        (50_000, (10, 100, 1e-3)),
        (60_000, (10, 100, 1e-3)),
        (10**7, (10, 100, 1e-3)),
    ],
)
def test_small_data_sets_are_seen_more_often_in_smaller_minibatches(samples, found):
    assert numbers(samples) == found


def test_epochs_are_those_of_the_minibatch_that_is_given():
    assert numbers(1438, batch=100)[:2] == (180, 100)
    assert numbers(60_000, batch=6000)[:2] == (200, 6000)


def test_rates_are_of_the_network_and_the_optimizer():
    assert RATES.keys() == {name for name in OPTIMIZERS if is_first_order(name)}
    assert [numbers(1438, model).lr for model in ("psnet", "lenet", "mlp", "head", "resnet")] == [1e-2] * 2 + [1e-3] * 3
    layers = {"sigmoid": ({"type": "dense"}, {"type": "sigmoid"}), "tanh": ({"type": "tanh"},)}
    assert [numbers(1438, "custom", layers=layers[kind]).lr for kind in layers] == [1e-2, 1e-3]
    assert numbers(1438, batch_norm=True).lr == 1e-3
    assert [numbers(1438, optimizer=name).lr for name in ("momentum", "lbfgs", "plse", "sgd")] == [0.1, 1, 1, 1]


def test_a_run_keeps_the_numbers_that_it_found(tmp_path):
    status, out, err = run(2, *TRAIN, "--out", tmp_path / "run", "--max-steps", "2")
    assert status == 0, err
    assert "60 epochs, 32 samples a minibatch, learning rate 0.01: usual for 1,438 samples, psnet and adam" in out
    saved = read_file(str(tmp_path / "run" / "config.toml"))
    assert (saved.run.epochs, saved.data.batch_size, saved.optimization.lr) == (60, 32, 0.01)


def test_one_is_no_plural_and_what_is_refused_is_told_without_usual_numbers(tmp_path):
    status, out, err = run(1, *TRAIN, "--out", tmp_path / "run", "--epochs", "1", "--max-steps", "1")
    assert status == 0 and "\n1 epoch, 32 samples a minibatch" in "\n" + out, err
    for options in (("--batch-size", "5000"), ("--resume", "none.h5"), ("--method", "sil", "--parts", "9")):
        status, out, err = run(2, *TRAIN, "--out", tmp_path / "other", *options)
        assert status == 1 and "usual" not in out, err
    assert [counted(n, "sample") for n in (0, 1, 2, 1438)] == ["0 samples", "1 sample", "2 samples", "1,438 samples"]


def test_what_is_given_is_used(tmp_path):
    (tmp_path / "run.toml").write_text("[optimization]\nlr = 0.25\n")
    options = ("--config", tmp_path / "run.toml", "--epochs", "3", "--batch-size", "700", "--max-steps", "1")
    status, out, err = run(1, *TRAIN, "--out", tmp_path / "run", *options)
    assert status == 0 and "usual" not in out, err
    saved = read_file(str(tmp_path / "run" / "config.toml"))
    assert (saved.run.epochs, saved.data.batch_size, saved.optimization.lr) == (3, 700, 0.25)


def test_a_resumed_run_goes_on_with_its_own_numbers(train, tmp_path):
    first = train(1, "--epochs", "1", "--batch-size", "700", "--lr", "0.02")
    resume_options = ("--out", first.out, "--resume", "auto", "--epochs", "2")
    status, out, err = run(1, *TRAIN, *resume_options)
    assert status == 0 and "usual" not in out, err
    saved = read_file(str(first.out / "config.toml"))
    assert (saved.run.epochs, saved.data.batch_size, saved.optimization.lr) == (2, 700, 0.02)
    # Another optimizer has its own rate by default.
    path = Trained(first.out, "").checkpoint
    status, out, err = run(
        1, *TRAIN, "--out", tmp_path / "other", "--resume", path, "--optimizer", "sgd", "--epochs", "3"
    )
    assert status == 0, err
    saved = read_file(str(tmp_path / "other" / "config.toml"))
    assert (saved.data.batch_size, saved.optimization.lr) == (700, RATES["sgd"].small)


@pytest.mark.parametrize(
    "options",
    [(), *(pytest.param(options, marks=pytest.mark.slow) for options in (
        ("--partition", "pairs"), ("--optimizer", "momentum"), ("--optimizer", "sgd", "--loss", "nll"))),
     pytest.param(("--model", "mlp", "--widths", "64"), marks=pytest.mark.slow),
     ("--model", "mlp", "--widths", "64", "--loss", "nll", "--optimizer", "sgd")],
)  # fmt: skip
def test_the_plainest_command_learns_the_digits(tmp_path, options):
    status, out, err = run(1, *TRAIN, "--out", tmp_path / "run", *options)
    assert status == 0, err
    assert Trained(tmp_path / "run", out).rows[-1]["test_accuracy"] >= 0.96


def test_a_data_set_without_numbers_to_fit_is_named(tmp_path):
    status, _, err = run(2, *TRAIN, "--out", tmp_path / "run", "--dataset", "none.npz")
    assert status == 1 and err.count("none.npz: no such file") == 1, err
