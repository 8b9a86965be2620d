"""Batch normalization and residual blocks in whole runs: on several ranks, in predictions and in exports."""

import json

import numpy as np
import pytest
from conftest import distance, run

from psmpi.inspect.export import make_model
from psmpi.inspect.opened import Opened

PSNET = ("--batch-norm", "--dtype", "float64", "--max-steps", "20", "--epochs", "2", "--optimizer", "momentum")


def test_workers_of_a_row_normalize_alike(train):
    alone = train(1, *PSNET)
    for ranks, more in ((3, ()), (4, ("--colocate", "--placement", "owner"))):
        many = train(ranks, *PSNET, *more)
        assert distance(alone.tensors(), many.tensors()) <= 1e-9
        assert many.rows[-1]["test_loss"] == pytest.approx(alone.rows[-1]["test_loss"], rel=1e-9)
    # The normalized scores have no parameters.
    assert "weights/batch_norm3.weight" in alone.tensors() and "weights/batch_norm4.weight" not in alone.tensors()


def test_where_workers_would_normalize_otherwise_it_is_said(train):
    for options in (("--replicas", "2", "--colocate"), ("--partition", "pairs", "--colocate")):
        status, _, err = run(4, "-m", "psmpi.train", *PSNET, *options)
        assert status == 1 and "whole minibatches" in err, err
    found = train(2, *PSNET, "--method", "data_parallel")
    assert "each rank's own slice" in " ".join(found.stdout.split())


def test_predictions_and_exports_of_a_residual_network(train, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    found = train(1, "--model", "resnet", "--widths", "4", "6", "--blocks", "1", "2", "--loss", "nll", "--epochs", "4",
                  "--lr", "0.01")  # fmt: skip
    for ranks in (1, 3):
        status, out, err = run(ranks, "-m", "psmpi.predict", found.out, "--json", "--out", tmp_path / f"{ranks}.npz")
        assert status == 0, err
        assert json.loads(out)["accuracy"] == found.rows[-1]["test_accuracy"] > 0.5
    one, three = (np.load(tmp_path / f"{ranks}.npz")["scores"] for ranks in (1, 3))
    assert abs(one - three).max() <= 1e-5 * abs(one).max()

    status, out, err = run(1, "-m", "psmpi.inspect", "export", found.out, "--out", tmp_path / "net.onnx")
    assert status == 0 and "differ from psmpi's by" in out, err
    x = np.random.default_rng(0).random((9, 1, 8, 8), np.float32)
    ours = make_model(Opened(found.out), np.dtype(np.float32)).forward(np.ascontiguousarray(x.reshape(9, -1).T)).T
    theirs = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"x": x})[0]
    assert abs(theirs - ours).max() <= 1e-5 * abs(ours).max()
