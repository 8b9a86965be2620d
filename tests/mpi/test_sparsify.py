"""Networks pruned by magnitude: equal to dense networks with a mask, trained on, predicting and exported."""

import json

import numpy as np
import pytest
from helpers.runs import Trained, run

from psmpi.inspect.export import make_model
from psmpi.inspect.opened import Opened

OPTIONS = ("--method", "data_parallel", "--dataset", "digits", "--loss", "nll", "--threads", "1")


def output_of(module, *options, ranks=1):
    status, out, err = run(ranks, "-m", module, *options)
    assert status == 0, err
    return out + err


def refused(*options):
    status, _, err = run(1, "-m", "psmpi.inspect", "sparsify", *options)
    assert status == 1 and "Traceback" not in err and err.count("error: ") == 1, err
    return " ".join(err.split())


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    out = tmp_path_factory.mktemp("dense") / "run"
    output_of("psmpi.train", *OPTIONS, "--model", "mlp", "--widths", "40", "30", "--epochs", "2", "--out", out)
    return Trained(out, "")


def masked(weights, sparsity, together):
    """Return the weights without those of least magnitude, of all hidden layers together or of each."""
    names = ("weights/dense1.weight", "weights/dense2.weight")
    all_magnitudes = np.sort(np.concatenate([abs(weights[name]).ravel() for name in names]))
    kept = dict(weights)
    for name in names:
        magnitudes = all_magnitudes if together else np.sort(abs(weights[name]).ravel())
        kept[name] = weights[name] * (
            abs(weights[name]) >= magnitudes[len(magnitudes) - round((1 - sparsity) * len(magnitudes))]
        )
    return kept


def scores(weights, x):
    for name in ("dense1", "dense2", "dense3"):
        x = weights[f"weights/{name}.weight"] @ x + weights[f"weights/{name}.bias"][:, None]
        x = x if name == "dense3" else np.maximum(x, 0)
    return x


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_pruned_network_is_the_dense_one_with_a_mask(scope, dense, tmp_path):
    out = tmp_path / "pruned.h5"
    output_of("psmpi.inspect", "sparsify", dense.out, "--sparsity", "0.9", "--scope", scope, "--out", out)
    opened, x = Opened(out), np.random.default_rng(0).random((64, 20))
    shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
    total = sum(shapes[f"sparse{k}.weight"][0] for k in (1, 2))
    assert total == pytest.approx(0.1 * (64 * 40 + 40 * 30), abs=1) and shapes["dense1.weight"] == (10, 30)
    if scope == "layer":
        assert (shapes["sparse1.weight"], shapes["sparse2.weight"]) == ((256,), (120,))
    own_scores = make_model(opened, np.dtype(np.float64)).forward(x).scores
    weights = {name: values.astype(float) for name, values in dense.tensors().items()}
    assert np.allclose(own_scores, scores(masked(weights, 0.9, scope == "global"), x), rtol=1e-12, atol=1e-12)


def test_a_pruned_network_trains_on_predicts_and_exports(dense, tmp_path):
    pruned, out = tmp_path / "pruned.h5", tmp_path / "run"
    output_of("psmpi.inspect", "sparsify", dense.out, "--sparsity", "0.8", "-o", pruned)
    before = json.loads(output_of("psmpi.predict", pruned, "--json"))
    output_of("psmpi.train", "--resume", pruned, "--epochs", "6", "--out", out, ranks=2)
    after = Trained(out, "")
    assert after.rows[-1]["epoch"] == 6 and after.rows[-1]["test_accuracy"] > before["accuracy"]
    assert after.tensors()["weights/sparse1.weight"].shape == Opened(pruned).tensors["sparse1.weight"].shape
    listing = " ".join(output_of("psmpi.inspect", "show", pruned).split())
    assert "sparsity: 0.8 (global)" in listing and "sha256" in listing and len(listing) < 6000
    pytest.importorskip("onnxruntime")
    assert "differ" in output_of("psmpi.inspect", "export", out, "--out", tmp_path / "net.onnx")


def test_what_cannot_be_pruned_is_refused(dense, train, tmp_path):
    out = ("--out", tmp_path / "a.h5")
    for sparsity in ("0", "1", "-0.5", "nan"):
        assert "above 0 and below 1" in refused(dense.out, "--sparsity", sparsity, *out)
    assert "choose among dense1, dense2, dense3" in refused(dense.out, "--sparsity", "0.9", "--layers", "conv1", *out)
    least = "none of the 2,560 weights of dense1: use less"
    assert f"{least}, or --scope layer" in refused(dense.out, "--sparsity", "0.999", *out)
    # Pruned alone, the layer would keep no weight either.
    for scope in ("global", "layer"):
        message = refused(dense.out, "--sparsity", "0.99999999", "--layers", "dense1", "--scope", scope, *out)
        assert f"--sparsity 0.99999999 would leave {least}" in message and "--scope" not in message
    output_of("psmpi.inspect", "sparsify", dense.out, "--sparsity", "0.5", "--layers", "dense3", *out)
    assert Opened(out[1]).tensors["sparse1.weight"].shape == (150,)
    assert "is there already" in refused(dense.out, "--sparsity", "0.5", *out)
    psnet_run = train(1, "--dataset", "digits", "--epochs", "1")
    output_of("psmpi.inspect", "cut", psnet_run.out, "--classes", "3", "--out", tmp_path / "part.h5")
    assert "is a part of a network" in refused(tmp_path / "part.h5", "--sparsity", "0.5", "--out", tmp_path / "b.h5")
    assert "has no dense layer to prune" in refused(psnet_run.out, "--sparsity", "0.5", "--out", tmp_path / "b.h5")
