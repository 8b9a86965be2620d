"""Trainings of sparse networks: the same on any ranks, and resumed from checkpoints that carry patterns."""

import numpy as np
import pytest
from helpers.runs import Trained, distance, run
from scipy import sparse

from psmpi.config import read_file

CONFIG = """
[model]
model = "custom"
[[model.layers]]
type = "flatten"
[[model.layers]]
type = "sparse"
units = 40
pattern = "{}"
[[model.layers]]
type = "tanh"
[[model.layers]]
type = "sparse"
units = 30
pattern = "random"
fan_in = 5
[[model.layers]]
type = "relu"
[[model.layers]]
type = "dense"
units = 10
"""


OPTIONS = ("--method", "data_parallel", "--dataset", "digits", "--loss", "nll", "--threads", "1")


@pytest.fixture
def custom(tmp_path):
    """The paths of a configuration and of the pattern file that it names."""
    path, file = tmp_path / "pattern.npz", tmp_path / "net.toml"
    sparse.save_npz(path, sparse.random_array((40, 64), density=0.1, format="csr", rng=np.random.default_rng(0)))
    file.write_text(CONFIG.format(path))
    return file, path


def output_of(status, out, err):
    assert status == 0, err
    return " ".join((out + err).split())


def test_a_checkpoint_carries_the_pattern_of_a_file(custom, train, tmp_path):
    """Without the file a run is resumed, predicts, is shown and exported."""
    file, path = custom
    words = ("--config", str(file), *OPTIONS)
    full_run = train(1, *words, "--epochs", "2")
    first = train(1, *words, "--epochs", "2", "--max-steps", "50")
    path.unlink()
    file.unlink()
    resumed = output_of(*run(2, "-m", "psmpi.train", "--resume", "auto", "--out", first.out))
    assert "layers is" not in resumed
    assert distance(Trained(first.out, "").tensors(), full_run.tensors()) < 1e-5
    predicted = output_of(*run(1, "-m", "psmpi.predict", first.out))
    assert "accuracy" in predicted
    listing = output_of(*run(1, "-m", "psmpi.inspect", "show", first.out))
    assert "csr:40:64:256:sha256" in listing.replace(" ", "")
    out = tmp_path / "net.npz"
    output_of(*run(1, "-m", "psmpi.inspect", "export", first.out, "--out", out))
    with np.load(out) as tensors:
        assert tensors["sparse1.weight"].shape == (256,) and tensors["sparse2.weight"].shape == (150,)
    assert read_file(str(first.out / "config.toml")).model.layers[1]["pattern"].startswith("csr:40:64:256:")


def test_another_pattern_is_told_in_brief(custom, train, tmp_path):
    file, path = custom
    words = ("--config", str(file), *OPTIONS)
    first = train(1, *words, "--epochs", "1")
    sparse.save_npz(path, sparse.random_array((40, 64), density=0.1, format="csr", rng=np.random.default_rng(1)))
    resumed = output_of(*run(1, "-m", "psmpi.train", *words, "--epochs", "2", "--resume", "auto", "--out", first.out))
    assert "note: layers is" in resumed and "sha256" in resumed and len(resumed) < 5000


def test_a_file_without_a_pattern_ends_the_run_before_it_begins(custom, tmp_path):
    file, path = custom
    path.write_bytes(b"nothing")
    status, _, err = run(2, "-m", "psmpi.train", "--config", file, *OPTIONS, "--out", tmp_path / "run")
    assert status == 1 and "Traceback" not in err and err.count("error: ") == 1 and str(path) in "".join(err.split())


@pytest.mark.parametrize("ranks", [2, 3])
def test_networks_of_sparse_layers_train_the_same_on_any_ranks(ranks, train, serial):
    words = (*OPTIONS, "--model", "radix", "--widths", "64", "--depth", "3", "--epochs", "1", "--dtype", "float64")
    one_rank, many_ranks = serial(*words), train(ranks, *words)
    assert distance(one_rank.tensors(), many_ranks.tensors()) < 1e-9
