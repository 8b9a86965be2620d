"""Batch normalization and residual blocks in trainings: on several ranks, in predictions and in exports."""

import json

import numpy as np
import pytest
import tomli_w
from helpers.runs import distance, run

from psmpi.backend import make_backend
from psmpi.data import Resident, open_dataset
from psmpi.nn.model import Model
from psmpi.nn.zoo import make_network
from psmpi.training.predictor import calibration_notes

PSNET = ("--batch-norm", "--dtype", "float64", "--max-steps", "20", "--epochs", "2", "--optimizer", "momentum")


def test_workers_of_a_row_normalize_alike(train):
    one_rank = train(1, *PSNET)
    for ranks, more in ((3, ()), (4, ("--colocate", "--placement", "owner"))):
        many_ranks = train(ranks, *PSNET, *more)
        assert distance(one_rank.tensors(), many_ranks.tensors()) <= 1e-9
        assert many_ranks.rows[-1]["test_loss"] == pytest.approx(one_rank.rows[-1]["test_loss"], rel=1e-9)
    # The normalized scores have no parameters.
    assert "weights/batch_norm3.weight" in one_rank.tensors() and "weights/batch_norm4.weight" not in one_rank.tensors()


def test_where_workers_would_normalize_otherwise_it_is_said(train):
    for options in (("--replicas", "2", "--colocate"), ("--partition", "pairs", "--colocate")):
        status, _, err = run(4, "-m", "psmpi.train", *PSNET, *options)
        assert status == 1 and "whole minibatches" in err, err
    trained = train(2, *PSNET, "--method", "data_parallel")
    assert "each rank's own slice" in " ".join(trained.stdout.split())


def test_predictions_and_exports_of_a_residual_network(train, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    trained = train(1, "--model", "resnet", "--widths", "4", "6", "--blocks", "1", "2", "--loss", "nll", "--epochs",
                    "4", "--lr", "0.01")  # fmt: skip
    for ranks in (1, 3):
        status, out, err = run(ranks, "-m", "psmpi.predict", trained.out, "--json", "--out", tmp_path / f"{ranks}.npz")
        assert status == 0, err
        assert json.loads(out)["accuracy"] == trained.rows[-1]["test_accuracy"] > 0.5
    one_rank, three_ranks = (np.load(tmp_path / f"{ranks}.npz")["scores"] for ranks in (1, 3))
    assert abs(one_rank - three_ranks).max() <= 1e-5 * abs(one_rank).max()

    export = ("-m", "psmpi.inspect", "export", trained.out, "--out")
    status, out, err = run(1, *export, tmp_path / "net.onnx")
    assert status == 1 and "add --calibrate 10000" in " ".join(err.split()) and not (tmp_path / "net.onnx").exists()
    status, out, err = run(1, *export, tmp_path / "net.onnx", "--calibrate", "1000")
    assert status == 0 and "differ from psmpi's by" in out, err
    # Scores of single samples are those of psmpi.predict with the same statistics.
    status, out, err = run(
        1, "-m", "psmpi.predict", trained.out, "--calibrate", "1000", "--out", tmp_path / "fixed.npz"
    )
    assert status == 0, err
    own_scores, data = np.load(tmp_path / "fixed.npz")["scores"], open_dataset("digits", "").test
    x = np.empty((64, data.n), np.float32)
    Resident(data, np.arange(data.n), x.dtype).fetch(np.arange(data.n), x)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    onnx_scores = np.concatenate([session.run(None, {"x": sample.reshape(1, 1, 8, 8)})[0] for sample in x.T.copy()])
    assert abs(onnx_scores - own_scores).max() <= 2e-5 * abs(own_scores).max()
    assert np.mean(onnx_scores.argmax(axis=1) == data.labels) == json.loads(
        run(1, "-m", "psmpi.predict", trained.out, "--calibrate", "1000", "--json")[1]
    )["accuracy"]  # fmt: skip
    # Other training samples are refused; an export without statistics prints a warning.
    other_data = tmp_path / "moved.npz"
    np.savez(
        other_data, x=np.zeros((4, 1, 8, 8)), y=np.arange(4) % 2, x_test=np.zeros((2, 1, 8, 8)), y_test=np.arange(2)
    )
    status, _, err = run(1, *export, tmp_path / "b.onnx", "--calibrate", "4", "--dataset", other_data)
    assert status == 1 and "has not the training samples" in " ".join(err.split())
    assert not (tmp_path / "b.onnx").exists()
    status, out, err = run(1, *export, tmp_path / "w.npz")
    assert status == 0 and "without the statistics" in err
    assert not [name for name in np.load(tmp_path / "w.npz") if name.endswith((".mean", ".variance"))]
    for count, note in (("2", "about 71 % of a standard deviation off"), ("10000", "all of them are taken")):
        status, _, err = run(1, *export, tmp_path / "w.npz", "--calibrate", count)
        assert status == 0 and note in " ".join(err.split()) and f"--calibrate {count}: " in err
    status, _, err = run(1, *export, tmp_path / "w.npz", "--calibrate", "1000")
    assert status == 0 and not err
    w, norm = dict(np.load(tmp_path / "w.npz")), "batch_norm"
    names = [name.removesuffix(".variance") for name in w if name.endswith(".variance")]
    assert names and all(norm in name and w[f"{name}.mean"].shape == w[f"{name}.weight"].shape for name in names)
    graph = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "net.onnx").graph.initializer}
    for name in names:
        assert np.array_equal(graph[f"{name}.mean"].ravel(), w[f"{name}.mean"])
        assert np.allclose(graph[f"{name}.scale"].ravel(), (w[f"{name}.variance"] + 1e-5) ** -0.5, rtol=1e-5)


def test_few_samples_are_predicted_by_the_statistics_of_the_training(train, tmp_path):
    trained = train(
        1, "--model", "mlp", "--widths", "32", "--batch-norm", "--loss", "nll", "--epochs", "5", "--lr", "0.01"
    )
    data = open_dataset("digits", "").test
    x = np.empty((64, data.n), np.float32)
    Resident(data, np.arange(data.n), x.dtype).fetch(np.arange(data.n), x)
    threes = data.labels == 3
    np.savez(tmp_path / "threes.npz", x=x.T[threes].reshape(-1, 1, 8, 8), y=data.labels[threes])
    np.savez(tmp_path / "one.npz", x=x.T[threes][:1].reshape(-1, 1, 8, 8), y=data.labels[threes][:1])
    accuracy = {}
    for name in ("threes", "one"):
        options = (trained.out, "--dataset", tmp_path / f"{name}.npz", "--split", "all", "--json")
        for ranks in (1, 3):
            status, out, err = run(ranks, "-m", "psmpi.predict", *options, "--calibrate", "1000")
            assert status == 0 and "note" not in err, err
            accuracy[name, ranks] = json.loads(out)["accuracy"]
    # Only one rank prints the note.
    for count, note in (("20000", "has 1,438 samples, and all of them"), ("100", "up to about 10 % of a standard")):
        for ranks in (1, 3):
            status, _, err = run(ranks, "-m", "psmpi.predict", *options, "--calibrate", count)
            assert status == 0 and err.count(f"--calibrate {count}: ") == " ".join(err.split()).count(note) == 1, err
    assert accuracy["threes", 1] == accuracy["threes", 3] > 0.85 and accuracy["one", 1] == accuracy["one", 3]
    status, out, err = run(1, "-m", "psmpi.predict", *options)
    assert status == 1 and "a single sample is not enough" in " ".join(err.split())
    options = (trained.out, "--dataset", tmp_path / "threes.npz", "--split", "all", "--json")
    status, out, err = run(1, "-m", "psmpi.predict", *options)
    assert status == 0 and "these very samples" in err and json.loads(out)["accuracy"] < 0.5


def test_the_error_that_is_told_of_few_samples_is_that_of_their_means():
    net = make_network("mlp", (6,), 3, widths=(400,), batch_norm=True)
    rng = np.random.default_rng(0)
    model = Model(net, net.layout(), rng.standard_normal(net.layout().size), None, make_backend("numpy"))
    x = rng.exponential(size=(6, 40_000))

    def means(samples):
        model.calibrate([samples.copy()])
        normalization = next(part for part in model.parts if part.layer.couples)
        return normalization.fixed[0].copy(), 1 / normalization.fixed[1]

    full_mean, deviation = means(x)
    for count in (4, 100, 900):
        errors = [(means(x[:, k * count : (k + 1) * count])[0] - full_mean) / deviation for k in range(20)]
        (note,) = calibration_notes(count, 40_000)
        assert note.startswith(f"warning: --calibrate {count}: ") and note.endswith("as with --calibrate 10000")
        percent = int(note.partition(" %")[0].rpartition(" ")[2])
        # 400 units of 6 inputs in 20 draws are about 120 independent means.
        assert 100 * np.sqrt(np.mean(np.square(errors))) == pytest.approx(percent, rel=0.2)


@pytest.mark.parametrize(("count", "samples", "kind"), [
    (2, 10**5, "warning"), (999, 10**5, "warning"), (1000, 10**5, ""), (10**5, 10**5, ""), (10**5 + 1, 10**5, "note"),
    (50, 50, ""), (49, 50, "warning"), (51, 50, "note"),
])  # fmt: skip
def test_too_few_samples_for_statistics_and_too_many_are_told(count, samples, kind):
    notes = calibration_notes(count, samples)
    assert [note.partition(":")[0] for note in notes] == ([kind] if kind else [])


def test_other_samples_than_those_of_the_training_give_no_statistics(tmp_path):
    """One changed value of a training sample is an error; test samples may change."""
    rng, path = np.random.default_rng(0), tmp_path / "own.npz"
    arrays = {
        "x": rng.random((300, 6)),
        "y": np.arange(300) % 4,
        "x_test": rng.random((40, 6)),
        "y_test": np.arange(40) % 4,
    }
    np.savez(path, **arrays)
    options = (
        "--model",
        "mlp",
        "--widths",
        "4",
        "--batch-norm",
        "--epochs",
        "1",
        "--batch-size",
        "30",
        "--loss",
        "nll",
    )
    status, _, err = run(1, "-m", "psmpi.train", "--dataset", path, *options, "--out", tmp_path / "run")
    assert status == 0, err
    export = ("-m", "psmpi.inspect", "export", tmp_path / "run", "--out", tmp_path / "w.npz", "--calibrate", "300")
    for name, index, allowed in (("x_test", 3, True), ("x", 123, False)):
        arrays[name][index, 2] += 1e-6
        np.savez(path, **arrays)
        status, _, err = run(1, *export)
        assert (status == 0) is allowed and ("has not the training samples" in err) is not allowed, err


def test_fixed_statistics_are_those_of_the_minibatches_seen():
    net = make_network("mlp", (6,), 3, widths=(5,), batch_norm=True)
    rng = np.random.default_rng(0)
    w = rng.standard_normal(net.layout().size)
    model = Model(net, net.layout(), w, None, make_backend("numpy"))
    x = rng.standard_normal((6, 40)) * 2 + 1
    scores = model.forward(x).scores.copy()
    # The fixed statistics of a single minibatch are the minibatch's own.
    model.calibrate([x])
    assert np.allclose(model.forward(x).scores, scores, rtol=1e-12)
    assert np.allclose(model.forward(x[:, :1].copy()).scores, scores[:, :1], rtol=1e-12)
    model.calibrate([x[:, :20].copy(), x[:, 20:].copy()])
    halves = [x[:, :20], x[:, 20:]]
    first = model.parts[0].w[0][0][0]
    mean = np.mean([(first @ half).mean(axis=1) for half in halves], axis=0)
    variance = (first @ x).var(axis=1)
    norm = next(part for part in model.parts if part.layer.couples)
    assert np.allclose(norm.fixed[0], mean) and np.allclose(norm.fixed[1], 1 / np.sqrt(variance + 1e-5))


def test_normalized_samples_are_learnt_by_direct_feedback_too(train, tmp_path):
    config = tmp_path / "net.toml"
    config.write_text(
        '[model]\nmodel = "custom"\n'
        + "".join(
            f"[[model.layers]]\n{line}\n"
            for line in ('type = "flatten"', 'type = "batch_norm"', 'type = "dense"\nunits = 20', 'type = "batch_norm"',
                         'type = "tanh"', 'type = "dense"\nunits = 10')
        )
    )  # fmt: skip
    options = (
        "--config",
        config,
        "--method",
        "dfa",
        "--loss",
        "nll",
        "--epochs",
        "3",
        "--lr",
        "0.02",
        "--dtype",
        "float64",
    )
    one_rank, two_ranks = (train(ranks, *options) for ranks in (1, 2))
    assert distance(one_rank.tensors(), two_ranks.tensors()) <= 1e-9
    assert (
        abs(one_rank.tensors()["weights/batch_norm1.weight"] - 1).max() > 1e-3
        and one_rank.rows[-1]["test_accuracy"] > 0.6
    )


def test_statistics_of_few_samples_or_classes_are_noted(train, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.random((101, 4)), np.arange(101) % 4
    test_labels = np.arange(2400) % 4
    norm = (
        "--model",
        "mlp",
        "--widths",
        "5",
        "--batch-norm",
        "--loss",
        "nll",
        "--max-steps",
        "1",
        "--batch-size",
        "20",
    )
    output = {}
    for name, labels in (("mixed", test_labels), ("sorted", np.sort(test_labels))):
        path = tmp_path / f"{name}.npz"
        np.savez(path, x=x, y=y, x_test=rng.random((2400, 4)), y_test=labels)
        output[name] = " ".join(train(1, "--dataset", path, *norm).stdout.split())
        assert "the last minibatch of an epoch has 1 of the 101 samples" in output[name]
        assert "--batch-size 19 leaves" not in output[name] and "--batch-size 18 leaves 11" in output[name]
    assert "in the order of their classes" in output["sorted"] and "in the order" not in output["mixed"]
    plain = [option for option in norm if option != "--batch-norm"]
    assert "note: the" not in train(1, "--dataset", tmp_path / "sorted.npz", *plain).stdout


# No biases before a normalization, because their gradients are only rounding errors.
CONV = {"type": "conv", "channels": 5, "kernel": 7, "bias": False}
FLAT, NORM = {"type": "flatten"}, {"type": "batch_norm"}
PARTLY_USED = {
    "features": [FLAT, NORM],
    "channels": [CONV, FLAT, NORM],
    "images": [CONV, NORM, {"type": "tanh"}, FLAT],
}


@pytest.mark.parametrize("name", PARTLY_USED)
def test_channels_of_which_a_class_uses_a_part_are_normalized_alike_on_any_ranks(train, tmp_path, name):
    """Compare 1 to 3 ranks, a part with three classes, and the definition in NumPy."""
    layers = [*PARTLY_USED[name], {"type": "separable_dense", "units": 10, "groups": 10}]
    unused = "dense1 ([[model.layers]] entry 3) of --model custom: the last 4 of 64 inputs are not used"
    (tmp_path / "net.toml").write_text(tomli_w.dumps({"model": {"model": "custom", "layers": layers}}))
    options = ("--config", tmp_path / "net.toml", "--dtype", "float64", "--epochs", "2", "--lr", "0.01")
    runs = [train(ranks, *options) for ranks in (1, 2, 3)]
    report = run(1, "-m", "psmpi.inspect", "show", runs[0].out)[1]
    for text in (runs[0].stdout, runs[2].stdout, report):
        assert " ".join(text.split()).count(unused) == (name == "features")
    for other_run in runs[1:]:
        assert distance(runs[0].tensors(), other_run.tensors()) <= 1e-9
        assert other_run.rows[-1]["test_loss"] == pytest.approx(runs[0].rows[-1]["test_loss"], rel=1e-9)
    scores = {}
    for label, ranks, source, classes in (("whole", 1, runs[2].out, None), ("three", 3, runs[2].out, None),
                                          ("part", 1, tmp_path / "part.h5", (1, 4, 9))):  # fmt: skip
        if classes:
            cut = ("cut", runs[2].out, "--classes", *map(str, classes), "--out", source)
            assert run(1, "-m", "psmpi.inspect", *cut)[0] == 0
        status, _, err = run(ranks, "-m", "psmpi.predict", source, "--out", tmp_path / f"{label}.npz")
        assert status == 0, err
        scores[label] = np.load(tmp_path / f"{label}.npz")["scores"]
    assert np.allclose(scores["three"], scores["whole"], rtol=1e-9)
    assert np.allclose(scores["part"], scores["whole"][:, [1, 4, 9]], rtol=1e-9)
    # Compare with the definition in NumPy.
    weights = {key.removeprefix("weights/"): value for key, value in runs[0].tensors().items()}
    data = open_dataset("digits", "").test
    x = np.empty((64, data.n))
    Resident(data, np.arange(data.n), x.dtype).fetch(np.arange(data.n), x)
    assert np.allclose(scores["whole"], by_definition(name, weights, x.T.reshape(-1, 1, 8, 8)), rtol=1e-6, atol=1e-8)


def by_definition(name, w, x):
    """Return the scores of a network of PARTLY_USED for one minibatch x."""
    if name != "features":
        windows = np.lib.stride_tricks.sliding_window_view(x, (7, 7), (2, 3))
        x = np.einsum("bcijkl,ockl->boij", windows, w["conv1.weight"])
    if name != "images":
        x = x.reshape(len(x), -1)
    axes = (0, 2, 3) if name == "images" else (0,)
    x = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    shape = (-1, 1, 1) if name == "images" else (-1,)
    x = x * w["batch_norm1.weight"].reshape(shape) + w["batch_norm1.bias"].reshape(shape)
    x = (np.tanh(x) if name == "images" else x).reshape(len(x), -1)
    k = w["dense1.weight"].shape[-1]
    return (
        np.einsum("bgi,goi->bgo", x[:, : 10 * k].reshape(-1, 10, k), w["dense1.weight"]).reshape(-1, 10)
        + w["dense1.bias"]
    )
