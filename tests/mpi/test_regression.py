"""Regression: data sets whose targets are values, against least squares and across methods and numbers of ranks."""

import json

import numpy as np
import pytest
from helpers.runs import run, usual_config
from scipy.linalg import lstsq

from psmpi.backend import NumpyOps
from psmpi.config import check, from_table
from psmpi.data import open_dataset
from psmpi.errors import UserError
from psmpi.nn.losses import LOSSES, make_loss
from psmpi.nn.metric import Metric
from psmpi.nn.model import Model
from psmpi.nn.objective import Objective
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method, method_names

F64 = np.dtype(np.float64)
SQUARED = ("--loss", "squared", "--dataset", "own.npz", "--data-dir", ".", "--dtype", "float64")
LINEAR = '[model]\nmodel = "custom"\n[[model.layers]]\ntype = "dense"\nunits = 3\n'


@pytest.fixture
def own(tmp_path):
    """A folder with own.npz: 120 training and 40 test samples of 6 features, with three values that are nearly linear
    in them."""
    rng = np.random.default_rng(0)
    x, map_ = rng.normal(size=(160, 6)), rng.normal(size=(6, 3))
    y = x @ map_ + [1.0, -2.0, 0.5] + 0.1 * rng.normal(size=(160, 3))
    np.savez(tmp_path / "own.npz", x=x[:120], y=y[:120], x_test=x[120:], y_test=y[120:])
    (tmp_path / "linear.toml").write_text(LINEAR)
    return tmp_path


def least_squares(folder):
    """Return the least-squares weights (7, 3), biases in the last row, and the RMSE on the test samples."""
    data = np.load(folder / "own.npz")
    with_one = {key: np.column_stack([data[key], np.ones(len(data[key]))]) for key in ("x", "x_test")}
    weights = lstsq(with_one["x"], data["y"])[0]
    return weights, np.sqrt(np.mean((with_one["x_test"] @ weights - data["y_test"]) ** 2))


def test_a_linear_network_finds_the_least_squares_on_1_and_3_ranks(own, train):
    options = ("--optimizer", "lbfgs", "--lr", "1", "--batch-size", "120", "--epochs", "60", "--config", "linear.toml")
    weights, rmse = least_squares(own)
    for ranks in (1, 3):
        trained = train(ranks, *SQUARED, *options, "--colocate")
        row, tensors = trained.rows[-1], trained.tensors()
        np.testing.assert_allclose(tensors["weights/dense1.weight"].reshape(3, 6), weights[:6].T, atol=1e-5)
        np.testing.assert_allclose(tensors["weights/dense1.bias"].reshape(3), weights[6], atol=1e-5)
        assert row["test_rmse"] == pytest.approx(rmse, rel=1e-5)
        assert row["test_loss"] == pytest.approx(3 * row["test_rmse"] ** 2, rel=1e-12)
        assert "test_accuracy" not in row and f"test RMSE {row['test_rmse']:.5g}" in trained.stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "psl", "--config", "linear.toml", "--colocate"),
        ("--method", "psl", "--model", "mlp", "--widths", "8", "--replicas", "3", "--colocate"),
        ("--method", "data_parallel", "--model", "mlp", "--widths", "8"),
        ("--method", "dfa", "--model", "mlp", "--widths", "8", "8"),
    ],
    ids=["psl", "replicas", "data_parallel", "dfa"],
)
def test_1_and_3_ranks_give_the_same_error(own, train, options):
    one_rank_options = [word if word != "3" else "1" for word in options]
    one_rank, three_ranks = (
        train(ranks, *SQUARED, *words, "--epochs", "3", "--batch-size", "20", "--lr", "0.01").rows[-1]
        for ranks, words in ((1, one_rank_options), (3, options))
    )
    assert three_ranks["test_rmse"] == pytest.approx(one_rank["test_rmse"], rel=1e-9)
    assert three_ranks["train_loss"] == pytest.approx(one_rank["train_loss"], rel=1e-9)


@pytest.mark.parametrize("method", ["local_sgd", "ist"])
def test_methods_whose_result_depends_on_ranks_learn_values_too(own, train, method):
    options = ("--model", "mlp", "--widths", "24", "--batch-size", "20", "--lr", "0.02", "--epochs", "30")
    rows = train(2, *SQUARED, "--method", method, *options, *(("--colocate",) if method == "ist" else ())).rows
    spread = np.load(own / "own.npz")["y_test"].std()
    assert rows[-1]["test_rmse"] < 0.5 * min(spread, rows[0]["test_rmse"])


def test_predictions_are_values(own, train):
    trained = train(1, *SQUARED, "--config", "linear.toml", "--epochs", "2", "--batch-size", "20")
    data = np.load(own / "own.npz")
    for ranks, name in ((1, "p.npz"), (2, "p.csv")):
        words = (trained.out, "--json", "--out", own / name)
        status, out, err = run(ranks, "-m", "psmpi.predict", *words, cwd=own)
        assert status == 0, err
        assert json.loads(out)["rmse"] == pytest.approx(trained.rows[-1]["test_rmse"], rel=1e-12)
    values = np.load(own / "p.npz")["values"]
    table = np.loadtxt(own / "p.csv", delimiter=",", skiprows=1)
    assert (own / "p.csv").read_text().startswith("sample,target_0,target_1,target_2,value_0,value_1,value_2\n")
    np.testing.assert_allclose(table[:, 4:], values, rtol=1e-12)
    np.testing.assert_array_equal(table[:, 1:4], data["y_test"])
    np.savez(own / "bare.npz", x=data["x_test"])
    status, out, err = run(1, "-m", "psmpi.predict", trained.out, "--dataset", "bare.npz", "--split", "all", cwd=own)
    assert status == 0 and "no RMSE (it needs targets y)" in out, err
    first = np.array([line.split() for line in out.splitlines()[-10:]], float)
    np.testing.assert_array_equal(first[:, 0], np.arange(10))
    np.testing.assert_allclose(first[:, 1:], values[:10], rtol=1e-4)
    _, out, _ = run(1, "-m", "psmpi.predict", trained.out, cwd=own)
    printed = np.array([line.split() for line in out.splitlines()[-3:]], float)
    targets = data["y_test"]
    errors, spread = np.mean((values - targets) ** 2, axis=0), np.var(targets, axis=0)
    expected = np.stack(
        [np.arange(3), np.sqrt(errors), targets.mean(axis=0), np.sqrt(spread), 1 - errors / spread], axis=1
    )
    np.testing.assert_allclose(printed, expected, rtol=1e-3, atol=1e-4)
    for y, message in (
        (np.arange(40) % 3, "predicts values"), (np.ones((40, 2)), "has 2 values a sample, checkpoint"),
    ):  # fmt: skip
        np.savez(own / "other.npz", x=data["x_test"], y=y)
        status, _, err = run(1, "-m", "psmpi.predict", trained.out, "--dataset", "other.npz", cwd=own)
        assert status == 1 and message in " ".join(err.split()) and "Traceback" not in err
    status, out, err = run(1, "-m", "psmpi.inspect", "show", trained.out, cwd=own)
    assert status == 0 and "test RMSE" in out, err


REFUSED = [
    *(({"objective": {"loss": name}}, f"--loss {name} needs labels.* use --loss squared, or save labels as integers")
      for name, loss in LOSSES.items() if "regression" not in loss.tasks),
    ({"parallel": {"method": "sil"}}, "--method sil is for classes, and own.npz has values to learn: use"),
    ({"psl": {"partition": "pairs"}}, "--partition pairs is for classes"),
    ({"optimization": {"optimizer": "plbfgs"}}, "--optimizer plbfgs is for classes"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED)
def test_what_needs_classes_refuses_values_by_name(own, monkeypatch, changes, says):
    monkeypatch.chdir(own)
    dataset, config = open_dataset("own.npz", "."), usual_config()
    settings = {"objective": {"loss": "squared"}, "model": {"model": "mlp", "widths": [8, 8]}, **changes}
    config = from_table({"data": {}, **settings}, config, "settings")
    check(config)
    network = make_network("mlp", dataset.shape, dataset.outputs, widths=(8, 8))
    methods = [config.parallel.method] if "parallel" in changes else ["psl"]
    if "objective" in changes:
        # Methods with networks of their own refuse this network first.
        methods = [name for name in method_names() if name != "sil" and not find_method(name).usual_options]
    for method in methods:
        with pytest.raises(UserError, match=says):
            find_method(method).check(2 if method != "psl" else 1, network, dataset, config)


def test_a_wrong_loss_is_said_once_at_the_start(own):
    status, _, err = run(3, "-m", "psmpi.train", "--dataset", "own.npz", "--config", "linear.toml", cwd=own)
    assert status == 1 and err.count("use --loss squared") == 1 and "Traceback" not in err
    assert not (own / "runs").exists()


def test_gradients_of_values_match_central_differences():
    rng = np.random.default_rng(0)
    scores, targets, grad, h = rng.normal(size=(4, 5)), rng.normal(size=(4, 5)), np.empty((4, 5)), 1e-6
    loss = make_loss("squared", F64, task="regression")
    assert loss(scores, targets, 0.5, grad) == pytest.approx(0.5 * ((scores - targets) ** 2).sum(), rel=1e-14)
    for index in np.ndindex(scores.shape):
        step = np.zeros_like(scores)
        step[index] = h
        slope = (loss(scores + step, targets, 0.5) - loss(scores - step, targets, 0.5)) / (2 * h)
        assert slope == pytest.approx(grad[index], abs=1e-8)


def test_the_objective_takes_values_in_the_order_of_the_scores():
    network = make_network("mlp", (6,), 3, widths=(4,))
    layout, rng, ops = network.layout(), np.random.default_rng(0), NumpyOps()
    x, targets = rng.normal(size=(6, 5)), rng.normal(size=(5, 3))
    model = Model(network, layout, rng.normal(size=layout.size), np.empty(layout.size), ops)
    objective = Objective(make_loss("squared", F64, task="regression"), model)
    objective.reserve(3, 7)
    objective.bring(targets.T)
    tape = model.forward(x)
    objective.derive(tape, tape.scores, objective.targets(5), 0.2)
    assert objective.value() == pytest.approx(0.2 * ((tape.scores - targets.T) ** 2).sum(), rel=1e-14)


def test_the_root_mean_squared_error_is_over_samples_and_outputs():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(3, 40)).astype(np.float32), rng.normal(size=(3, 40))
    metric = Metric(make_loss("squared", np.dtype(np.float32), task="regression"), 3)
    shares = [metric.sums(scores[:, part], targets[:, part]) for part in (slice(0, 25), slice(25, 40))]
    result = metric.scores(sum(shares, metric.zeros()))
    assert result["rmse"] == pytest.approx(np.sqrt(np.mean((scores - targets) ** 2)), rel=1e-12)
    assert result["loss"] == pytest.approx(((scores - targets) ** 2).sum() / 40, rel=1e-12)


def test_a_run_that_has_learnt_labels_does_not_go_on_with_values(own, train):
    data = np.load(own / "own.npz")
    labels = {"y": np.arange(120) % 3, "y_test": np.arange(40) % 3}
    np.savez(own / "labels.npz", x=data["x"], x_test=data["x_test"], **labels)
    options = ("--loss", "squared", "--data-dir", own, "--dtype", "float64", "--config", own / "linear.toml")
    trained = train(1, *options, "--dataset", "labels.npz", "--epochs", "1")
    resume_options = ("-m", "psmpi.train", *options, "--dataset", "own.npz", "--out", trained.out, "--resume", "auto")
    status, _, err = run(1, *resume_options, "--epochs", "2", cwd=own)
    assert status == 1 and "has learnt labels" in " ".join(err.split())
    status, _, err = run(1, "-m", "psmpi.bench", "network", "--dataset", own / "own.npz", cwd=own)
    assert status == 1 and "use a data set with labels" in " ".join(err.split())


def test_inspect_shows_the_error_of_values(own, train):
    trained = train(1, *SQUARED, "--config", own / "linear.toml", "--epochs", "1")
    text = f"test RMSE {trained.rows[-1]['test_rmse']:.5g}"
    for command in (("show", trained.out), ("diff", trained.out, trained.out)):
        status, out, err = run(1, "-m", "psmpi.inspect", *command)
        assert status == 0 and text in out, err
    status, out, err = run(1, "-m", "psmpi.inspect", "list", trained.out)
    assert status == 0 and text.removeprefix("test ") in " ".join(out.split()), err
