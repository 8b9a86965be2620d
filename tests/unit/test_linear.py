"""Linear models: one score for two classes, their losses in closed form, and trainings that find the minimum."""

import h5py
import numpy as np
import pytest
from helpers.problems import make_model, random_problem
from helpers.runs import run, trainer

from psmpi.data import open_dataset
from psmpi.errors import UserError
from psmpi.nn.losses import make_loss
from psmpi.nn.metric import Metric
from psmpi.nn.network import build
from psmpi.nn.zoo import make_network

F64 = np.dtype(np.float64)
# Loss and derivative of a score c with t = -1 or 1, kappa = 1.
CLOSED = {
    "logistic": (lambda m: np.log(1 + np.exp(-m)), lambda m: -1 / (1 + np.exp(m))),
    "nll": (lambda m: np.log(1 + np.exp(-m)), lambda m: -1 / (1 + np.exp(m))),
    "hinge": (lambda m: np.maximum(0, 1 - m), lambda m: -1.0 * (m < 1)),
    "squared": (lambda m: (1 - m) ** 2 / 2, lambda m: m - 1),
    "psl": (lambda m: np.exp(-m), lambda m: -np.exp(-m)),
}


@pytest.mark.parametrize("loss", CLOSED)
def test_two_classes_have_one_score_and_the_loss_of_its_sign(loss):
    network = make_network("linear", (7,), 2)
    layout, w, x, _ = random_problem(network, batch=9)
    assert layout.size == 8 and network.classes == 2 and network.tie() == "dense1"
    model, labels = make_model(network, layout, w), np.array([0, 1, 1, 0, 1, 0, 0, 1, 1])
    tape = model.forward(x)
    c, t = w[:7] @ x + w[7], 2 * labels - 1
    grad = np.empty((2, 9))
    value = make_loss(loss, F64)(tape.scores, labels, 1 / 9, grad)
    of_margin, slope = CLOSED[loss]
    constant = len(c) * make_loss(loss, F64).constant / 9
    assert value - constant == pytest.approx(of_margin(t * c).mean(), rel=1e-12)
    model.backward(tape, grad)
    derivatives = t * slope(t * c) / 9
    np.testing.assert_allclose(model.g, [*(x @ derivatives), derivatives.sum()], rtol=1e-10, atol=1e-13)
    correct = Metric(make_loss(loss, F64), 2).sums(tape.scores, labels)[1]
    assert correct == np.count_nonzero((c > 0) == labels)


@pytest.mark.parametrize("kept", [[0], [1]])
def test_a_part_may_have_the_score_of_one_class(kept):
    network = make_network("linear", (7,), 2)
    layout, w, x, d = random_problem(network)
    full, part = make_model(network, layout, w), make_model(network, layout, w, kept)
    assert np.array_equal(part.forward(x).scores, full.forward(x).scores[kept])
    d_kept = np.zeros_like(d)
    d_kept[kept] = d[kept]
    part.backward(part.forward(x), d[kept].copy())
    full.backward(full.forward(x), d_kept)
    np.testing.assert_allclose(part.g, full.g, rtol=1e-13)


def test_what_is_no_choice_of_two_classes_has_a_score_each():
    for classes, task, size in ((3, "classes", 24), (2, "regression", 16), (1, "regression", 8), (2, "classes", 8)):
        assert make_network("linear", (7,), classes, task=task).layout().size == size
    assert make_network("linear", (1, 4, 5), 2).layout().size == 21
    assert make_network("linear", (7,), 3).tie() is None
    with pytest.raises(UserError, match="--model linear has one"):
        make_network("linear", (7,), 2, batch_norm=True)
    for shape, units in (((7,), 2), ((1, 4, 4), 1)):
        tables = [{"type": "dense", "units": units}] if len(shape) == 1 else []
        with pytest.raises(UserError, match="binary makes scores of two classes from one number, but its input has"):
            build("custom", shape, [*tables, {"type": "binary"}], 2)


def minimum(x, y, decay):
    """Logistic regression with a penalty, by Newton's method; x (n, features) with a column of ones."""
    w, t = np.zeros(x.shape[1]), 2 * y - 1
    for _ in range(20):
        p = 1 / (1 + np.exp(t * (x @ w)))
        g = -x.T @ (t * p) / len(y) + decay * w
        w -= np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x / len(y) + decay * np.eye(len(w)), g)
    return w


@pytest.mark.parametrize("ranks", [1, 3])
def test_logistic_regression_of_sparse_samples_ends_in_its_minimum(tmp_path, ranks):
    options = ("--dataset", "sparse:60", "--model", "linear", "--loss", "logistic", "--optimizer", "lbfgs")
    options += ("--weight-decay", "0.01", "--batch-size", "8000", "--epochs", "25", "--dtype", "float64", "--lr", "1")
    training = trainer(tmp_path)(ranks, *options, "--method", "data_parallel")
    rows = open_dataset("sparse:60", None).train.compressed
    x = np.column_stack([rows.dense(), np.ones(rows.n)]).astype(float)
    expected = minimum(x, open_dataset("sparse:60", None).train.targets, 0.01)
    with h5py.File(training.checkpoint) as file:
        weight, bias = (file[f"weights/dense1.{name}"][...].ravel() for name in ("weight", "bias"))
    np.testing.assert_allclose([*weight, *bias], expected, atol=2e-4)
    assert training.rows[-1]["test_accuracy"] > 0.8


@pytest.mark.parametrize("options", [("--method", "psl", "--loss", "hinge"), ("--method", "local_sgd")])
def test_other_methods_train_sparse_samples_and_predict_them(tmp_path, options):
    out = tmp_path / "out"
    trainer(tmp_path)(2, "--dataset", "sparse:60", "--model", "linear", "--epochs", "2", *options, out=out)
    status, stdout, err = run(1, "-m", "psmpi.predict", out, "--dataset", "sparse:60", cwd=tmp_path)
    assert status == 0 and "accuracy" in stdout, err


def test_the_score_of_two_classes_is_exported(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from psmpi.inspect.export import build_onnx

    network = build("custom", (7,), [{"type": "dense", "units": 1}, {"type": "binary"}], 2)
    layout, w, x, _ = random_problem(network, dtype=np.float32)
    model = make_model(network, layout, w, fold=False)
    session = onnxruntime.InferenceSession(build_onnx(model).SerializeToString(), providers=["CPUExecutionProvider"])
    onnx_scores = session.run(None, {"x": np.ascontiguousarray(x.T)})[0]
    np.testing.assert_allclose(onnx_scores, model.forward(x).scores.T, rtol=1e-5)
