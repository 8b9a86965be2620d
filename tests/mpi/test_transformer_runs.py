"""Trainings of transformers: equal on any ranks, resumed, predictions, exports, and error messages."""

import json

import numpy as np
import pytest
from helpers.runs import distance, run

SMALL = ("--model", "transformer", "--widths", "8", "12", "--heads", "2", "--blocks", "1", "--dtype", "float64")
FEW = (*SMALL, "--max-steps", "12", "--epochs", "1", "--batch-size", "30")
RAGGED = ("--dataset", "repeat_copy:2", "--loss", "nll")


def refused(*options, ranks=1):
    status, _, err = run(ranks, "-m", "psmpi.train", *options)
    assert status == 1 and "Traceback" not in err and err.count("error: ") == 1, err
    return " ".join(err.split())


def test_ragged_sequences_train_the_same_on_any_ranks_and_after_a_resume(train, tmp_path):
    one_rank, three_ranks = (train(ranks, *RAGGED, *FEW, "--method", "data_parallel") for ranks in (1, 3))
    assert distance(one_rank.tensors(), three_ranks.tensors()) <= 1e-10
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert one_rank.rows[-1][name] == pytest.approx(three_ranks.rows[-1][name], rel=1e-10)
    train(1, *RAGGED, *FEW, "--method", "data_parallel", "--max-steps", "5", out=tmp_path / "cut")
    resumed = train(1, "--resume", "auto", "--max-steps", "12", out=tmp_path / "cut")
    assert distance(one_rank.tensors(), resumed.tensors()) == 0


def test_methods_train_alike_on_tokens_up_to_the_end_of_each_sequence(train, tmp_path):
    """The label says whether a ragged sequence ends with its first token."""
    rng = np.random.default_rng(0)
    lengths, x = rng.integers(1, 7, 90), rng.integers(0, 5, (90, 6))
    y = (x[:, 0] == x[np.arange(90), lengths - 1]).astype(int)
    np.savez(tmp_path / "own.npz", x=x, y=y, lengths=lengths)
    options = (
        "--dataset",
        tmp_path / "own.npz",
        "--vocabulary",
        "5",
        *FEW,
        "--loss",
        "nll",
        "--optimizer",
        "sgd",
        "--clip",
        "0",
    )
    psl_run = train(1, *options, "--method", "psl")
    for method in (("data_parallel",), ("local_sgd", "--local-steps", "1")):
        other_run = train(2, *options, "--method", *method)
        first, second = (
            {k: v for k, v in trained.tensors().items() if k.startswith("weights/")} for trained in (psl_run, other_run)
        )
        assert distance(first, second) <= 1e-10
    message = refused(*options[:2], *FEW, "--method", "data_parallel")
    assert "add --vocabulary 5 to --model rnn, gru, lstm or transformer" in message


TRUNK = """
[model]
model = "head"
layers = [
    {type = "dense", units = 6}, {type = "positions"},
    {type = "residual", layers = [{type = "layer_norm"}, {type = "dense", units = 18},
                                  {type = "attention", heads = 2, causal = false}, {type = "dense", units = 6}]},
    {type = "residual", layers = [{type = "layer_norm"}, {type = "gelu"}, {type = "dense", units = 6}]},
    {type = "last"},
]
"""


@pytest.mark.parametrize("options", [("--partition", "pairs"), ("--trunk", "split"), ("--placement", "owner")])
def test_classes_over_ranks_share_attention(train, tmp_path, options):
    """Sequences are ragged, and the layer `last` takes each one's own last step."""
    (tmp_path / "trunk.toml").write_text(TRUNK)
    rng = np.random.default_rng(0)
    x, lengths = rng.standard_normal((120, 6, 3)), rng.integers(1, 7, 120)
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(120) % 5, lengths=lengths)
    fixed = ("--config", tmp_path / "trunk.toml", "--dataset", tmp_path / "own.npz", "--dtype", "float64")
    fixed = (*fixed, "--max-steps", "12", "--epochs", "6")
    one_rank, three_ranks = (train(ranks, *fixed, *(options if ranks > 1 else ())) for ranks in (1, 3))
    assert distance(one_rank.tensors(), three_ranks.tensors()) <= 1e-8
    assert one_rank.rows[-1]["test_loss"] == pytest.approx(three_ranks.rows[-1]["test_loss"], rel=1e-9)


def test_a_transformer_predicts_shorter_sequences_and_is_exported(train, tmp_path):
    trained = train(1, *RAGGED, *FEW, "--method", "data_parallel")
    for name, accuracy in (("repeat_copy:2", trained.rows[-1]["test_accuracy"]), ("repeat_copy:1", None)):
        status, out, err = run(2, "-m", "psmpi.predict", trained.out, "--dataset", name, "--json")
        assert status == 0, err
        assert accuracy is None or json.loads(out)["accuracy"] == accuracy
    status, _, err = run(1, "-m", "psmpi.predict", trained.out, "--dataset", "repeat_copy:3", "--json")
    assert status == 1 and "positions1 has positions for 10 steps, but the sequences have 14" in " ".join(err.split())
    pytest.importorskip("onnxruntime")
    status, out, err = run(1, "-m", "psmpi.inspect", "export", trained.out, "--out", tmp_path / "net.onnx")
    assert status == 0 and "onnxruntime's scores differ" in out, err


@pytest.mark.slow
def test_a_transformer_learns_to_copy(train):
    """150 steps of training are enough to copy ten symbols after a delay of five steps."""
    options = ("--dataset", "copying:5", "--model", "transformer", "--loss", "nll", "--max-steps", "150")
    trained = train(2, *options, "--method", "data_parallel", "--threads", "1")
    assert trained.rows[-1]["test_accuracy"] > 0.99


def test_what_does_not_fit_transformers_is_said(tmp_path):
    rows = ("--dataset", "digits:rows", "--method", "data_parallel")
    for options, message in (
        (("--model", "transformer", "--heads", "3"), "--heads 3 does not divide the width of --model transformer, 64"),
        (("--model", "transformer", "--widths", "6"), "--widths 8, or other --heads"),
        (("--model", "transformer", "--widths", "8", "8", "8"), "takes a width, optionally a hidden width"),
        (("--model", "transformer", "--blocks", "2", "2"), "and one number of blocks"),
        (("--model", "transformer", "--batch-norm"), "would mix the steps of sequences"),
        (("--model", "lstm", "--heads", "2"), "--heads is for --model transformer, but the model is lstm"),
    ):
        assert message in refused(*rows, *options)
    assert "not made for samples of shape (1, 8, 8): make sequences of images" in refused("--model", "transformer")
    (tmp_path / "both.toml").write_text(
        '[model]\nmodel = "custom"\nlayers = [{type = "lstm", units = 6}, {type = "dense", units = 18}, '
        '{type = "residual", layers = [{type = "attention", heads = 2}, {type = "dense", units = 18}]}, '
        '{type = "last"}, {type = "dense", units = 10}]'
    )
    for method in ("wavefront", "bptt"):
        assert "use --model rnn, gru or lstm" in refused(*rows[:2], "--model", "transformer", "--method", method)
        message = refused(*rows[:2], "--config", tmp_path / "both.toml", "--method", method, ranks=2)
        assert "attention1" in message and f"needs whole sequences, and --method {method} takes them apart" in message
