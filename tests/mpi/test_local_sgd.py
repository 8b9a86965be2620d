"""Local SGD and its outer optimizer against copies that one process trains, and against data parallelism."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.runs import distance, run, usual_config

from psmpi.backend import NumpyOps
from psmpi.data import Batch, Minibatches, open_dataset
from psmpi.nn.zoo import make_network
from psmpi.registry import find_method
from psmpi.training.context import Context

LOCAL = ("--method", "local_sgd", "--dtype", "float64", "--epochs", "10")


class Alone:
    rank, size = 0, 1


def copies(ranks, steps, every, *, optimizer="sgd", lr=0.05, batch=64, outer_lr=1.0, beta=0.0):
    """Return the weights after local SGD, and their layout, from `ranks` models of the method psl and the formula of
    the outer step."""
    base = usual_config()
    config = replace(
        base,
        model=replace(base.model, dtype="float64"),
        data=replace(base.data, batch_size=batch),
        optimization=replace(base.optimization, optimizer=optimizer, lr=lr),
    )
    dataset = open_dataset("digits", "")
    network = make_network("psnet", dataset.shape, dataset.outputs)
    models = [find_method("psl")(Context(Alone(), network, dataset, config, NumpyOps())) for _ in range(ranks)]
    batches = Minibatches(dataset.train.n, batch, 0, True)
    anchor, momentum = models[0].w.copy(), np.zeros_like(models[0].w)
    for step in range(steps):
        ids = batches.ids(*divmod(step, batches.steps_per_epoch))
        slices = np.array_split(ids, ranks)
        for model, own_ids in zip(models, slices, strict=True):
            model.step(Batch(own_ids if len(own_ids) else ids), lr)
        if (step + 1) % every == 0:
            change = anchor - np.mean([model.w for model in models], axis=0)
            momentum = beta * momentum + change
            anchor = anchor - outer_lr * (change + beta * momentum)
            for model in models:
                model.w[...] = anchor
    return np.mean([model.w for model in models], axis=0), network.layout()


def flat(result, layout):
    tensors = result.tensors()
    vector = np.empty(layout.size)
    for piece in layout.pieces():
        parameter = layout.parameters[piece.parameter]
        rows = tensors[f"weights/{parameter.name}"].reshape(parameter.units, -1)[piece.first : piece.last]
        vector[piece.offset : piece.offset + rows.size] = rows.reshape(-1)
    return vector


@pytest.mark.parametrize(
    ("ranks", "every", "optimizer", "outer"),
    [
        (1, 3, "sgd", (1.0, 0.0)),
        (3, 4, "sgd", (1.0, 0.0)),
        (3, 4, "adam", (1.0, 0.0)),
        (2, 5, "momentum", (0.7, 0.9)),
        (4, 3, "adam", (0.7, 0.9)),
    ],
)
def test_weights_are_those_of_copies_that_are_averaged(train, ranks, every, optimizer, outer):
    # The last round is cut short, and the checkpoint has the mean.
    options = (
        "--local-steps",
        every,
        "--max-steps",
        "26",
        "--batch-size",
        "64",
        "--optimizer",
        optimizer,
        "--lr",
        "0.05",
    )
    result = train(ranks, *LOCAL, *options, "--outer-lr", outer[0], "--outer-momentum", outer[1])
    expected, layout = copies(ranks, 26, every, optimizer=optimizer, outer_lr=outer[0], beta=outer[1])
    assert abs(flat(result, layout) - expected).max() <= 1e-12 * abs(expected).max()


def test_a_last_minibatch_with_fewer_samples_than_ranks(train):
    # 1,437 samples: four minibatches of 359 and one of a single sample.
    options = ("--local-steps", "2", "--max-steps", "11", "--batch-size", "359", "--optimizer", "adam", "--lr", "0.05")
    expected, layout = copies(3, 11, 2, optimizer="adam", batch=359)
    result = train(3, *LOCAL, *options)
    assert abs(flat(result, layout) - expected).max() <= 1e-12 * abs(expected).max()


def test_averages_after_each_step_of_sgd_are_data_parallelism(train):
    options = ("--dtype", "float64", "--epochs", "10", "--max-steps", "20", "--batch-size", "64", "--optimizer", "sgd",
               "--clip", "0")  # fmt: skip
    by_method = [
        {k: v for k, v in train(4, "--method", *method, *options).tensors().items() if k.startswith("weights/")}
        for method in (("local_sgd", "--local-steps", "1", "--allreduce", "ring"), ("data_parallel",))
    ]
    assert distance(*by_method) <= 1e-12


def test_an_outer_optimizer_with_rate_one_and_no_momentum_is_the_mean(train):
    options = ("--local-steps", "4", "--max-steps", "16", "--batch-size", "64")
    plain, outer = (train(3, *LOCAL, *options, "--outer-momentum", beta).tensors() for beta in ("0", "1e-300"))
    names = [name for name in plain if name.startswith("weights/")]
    assert distance({n: plain[n] for n in names}, {n: outer[n] for n in names}) <= 1e-14


def test_the_outer_step_is_nesterov_s_look_ahead_sequence():
    rng = np.random.default_rng(0)
    gradients, lr, beta = rng.normal(size=(9, 5)), 0.7, 0.9
    w, m = np.ones(5), np.zeros(5)
    # Sutskever et al. 2013: add the velocity first, and take the gradient at the point ahead.
    x, v = np.ones(5), np.zeros(5)
    for d in gradients:
        m = beta * m + d
        w = w - lr * (d + beta * m)
        before = v
        v = beta * v - lr * d
        x = x - beta * before + (1 + beta) * v
        assert abs(w - x).max() <= 1e-14


def test_a_round_sends_one_sum(train):
    result = train(4, *LOCAL, "--dtype", "float32", "--local-steps", "5", "--max-steps", "22")
    size = sum(np.prod(t.shape, dtype=int) for name, t in result.tensors().items() if name.startswith("weights/"))
    for sent in result.rows[-1]["bytes_sent_by_rank"]:
        assert sent == 4 * (2 * 3 * 4 * size // 4)


def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_round(train, tmp_path):
    options = (*LOCAL, "--local-steps", "5", "--batch-size", "64", "--outer-lr", "0.7", "--outer-momentum", "0.9")
    out = tmp_path / "begun"
    train(3, *options, "--max-steps", "13", out=out)
    result = train(3, *options, "--max-steps", "21", "--resume", "auto", out=out)
    assert distance(train(3, *options, "--max-steps", "21").tensors(), result.tensors()) == 0
    assert "does not hold" not in result.stdout


def test_on_another_number_of_ranks_a_run_goes_on_from_the_mean(train, tmp_path):
    options = (*LOCAL, "--local-steps", "5", "--batch-size", "64")
    out = tmp_path / "begun"
    first_run = train(3, *options, "--max-steps", "13", out=out)
    result = train(2, *options, "--max-steps", "14", "--resume", "auto", out=out)
    assert "does not hold the copies of this many ranks: all of them start from the mean" in result.stdout
    # One step of Adam moves each weight by the learning rate at most.
    before, after = first_run.tensors(), result.tensors()
    moved = max(abs(after[n] - before[n]).max() for n in before if n.startswith("weights/"))
    assert 0 < moved <= 1.1e-2


def test_an_outer_optimizer_begins_where_another_method_s_checkpoint_is(train, tmp_path):
    options = ("--epochs", "40", "--batch-size", "64")
    out = tmp_path / "begun"
    first = train(3, "--method", "data_parallel", *options, "--lr", "0.01", "--max-steps", "400", out=out)
    first_loss = first.rows[-1]["test_loss"]
    outer = ("--method", "local_sgd", "--local-steps", "5", "--outer-lr", "0.7", "--outer-momentum", "0.9")
    result = train(3, *outer, *options, "--lr", "0.001", "--max-steps", "460", "--resume", "auto", out=out)
    assert "the checkpoint has no anchor outer: these start afresh" in result.stdout
    assert "the optimizer starts afresh" not in result.stdout
    # At the initial weights the loss is above 9.
    assert result.rows[-1]["test_loss"] <= 1.2 * first_loss


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--local-steps", "0"), "expected 1 or more steps"),
        (("--outer-lr", "0"), "expected a number above 0"),
        (("--outer-momentum", "1"), "up to, not including, 1"),
        (("--optimizer", "lbfgs"), "use a first-order one"),
        (("--replicas", "2"), "--replicas is of --method psl"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, options, says):
    status, _, err = run(2, "-m", "psmpi.train", "--out", tmp_path / "run", *LOCAL, *options)
    assert status != 0 and err.count(says) == 1 and "Traceback" not in err, err
