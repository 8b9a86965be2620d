"""Layers that all classes share, computed on slices of the minibatch: training equals that of one process."""

import json
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from helpers.runs import distance, launch, run, usual_config

from psmpi.layout import assign_roles
from psmpi.methods.psl.arrangement import Arrangement, cost
from psmpi.methods.psl.plan import Settings, make_plan
from psmpi.nn import tail
from psmpi.nn.cut import trunk_length
from psmpi.nn.objective import Objective
from psmpi.nn.zoo import make_network
from psmpi.testing.conformance import Case, counters_equal_messages
from psmpi.training import trunk
from psmpi.training.element_worker import ElementWorker

SHORT = ("--dtype", "float64", "--max-steps", "10", "--batch-size", "60", "--epochs", "2")
OWN = ("--colocate", "--placement", "owner")
SPLIT = ("--trunk", "split")


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, OWN),
        (3, ()),
        (6, (*OWN, "--replicas", "2")),
        (7, (*OWN, "--optimizer", "momentum")),
        (3, (*OWN, "--loss", "bce")),
        (4, ("--loss", "nll", "--masters", "2")),
        (3, (*OWN, "--optimizer", "lbfgs", "--lr", "1")),
        (3, (*OWN, "--batch-norm")),
        (3, ("--model", "head", "--widths", "20", "12", "--loss", "squared")),
        (5, (*OWN, "--model", "head", "--widths", "20", "12", "--batch-norm", "--loss", "nll")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_weights_and_tests_are_those_of_one_process(serial, train, ranks, more):
    one_rank = serial(*SHORT, *(word for word in more if word not in (*OWN, "--replicas", "--masters", "2")))
    many_ranks = train(ranks, *SHORT, *more, *SPLIT)
    assert distance(one_rank.tensors(), many_ranks.tensors()) <= 1e-9
    for key in ("train_loss", "test_loss", "test_accuracy"):
        assert many_ranks.rows[-1][key] == pytest.approx(one_rank.rows[-1][key], rel=1e-9)


@pytest.mark.parametrize(("loss", "kappa"), [("psl", "1"), ("psl", "40"), ("nll", "1")])
def test_tiles_of_classes_behind_a_split_trunk_train_as_one_process(train, monkeypatch, loss, kappa):
    """With --kappa 40 each rank scales its derivatives by another power of two."""
    monkeypatch.setattr(tail, "tile_size", lambda batch: 2)
    options = (*SHORT, "--model", "head", "--widths", "20", "12", "--loss", loss, "--optimizer", "sgd", "--lr", "1e-6")
    options = (*options, "--kappa", kappa) if loss == "psl" else options
    one_rank, many_ranks = train(1, *options, *OWN), train(3, *options, *OWN, *SPLIT)
    assert distance(one_rank.tensors(), many_ranks.tensors()) <= 1e-12


def test_gradients_of_the_trunk_are_bounded(train, monkeypatch):
    """The bound is 1e-6 for the components of one rank's gradient, so the step of two ranks is 2e-6 at most."""
    monkeypatch.setattr(trunk, "GRADIENT_LIMIT", dict.fromkeys(trunk.GRADIENT_LIMIT, 1e-6))
    options = (*OWN, *SPLIT, "--dtype", "float64", "--optimizer", "sgd", "--lr", "1", "--clip", "0", "--epochs", "1")
    first, second = (train(2, *options, "--max-steps", steps).tensors()["weights/conv1.weight"] for steps in ("1", "2"))
    moved = abs(second - first)
    assert 1e-6 <= moved.max() <= 2e-6 * (1 + 1e-9)


@pytest.mark.parametrize("more", [(), ("--batch-norm",)], ids=str)
def test_a_minibatch_of_fewer_samples_than_ranks_is_computed_by_each(serial, train, more):
    """The last minibatch of an epoch has 2 of the 1,438 samples."""
    options = ("--dtype", "float64", "--batch-size", "359", "--epochs", "2", *more)
    one_rank, many_ranks = serial(*options), train(5, *options, *OWN, *SPLIT)
    assert distance(one_rank.tensors(), many_ranks.tensors()) <= 1e-9


@pytest.mark.parametrize(
    "more", [(), ("--batch-norm",), ("--model", "head", "--widths", "20", "--loss", "bce")], ids=str
)
def test_bytes_are_those_that_are_said(tmp_path, more):
    counters_equal_messages(Case("psl", tmp_path, (*OWN, *SPLIT, *more)))


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_memory_is_what_slices_need(tmp_path, ranks):
    """Activations, buffers and samples on each rank are within a tenth of the predicted need."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (600, 1, 28, 28), np.uint8), np.arange(600) % 10
    np.savez(tmp_path / "images.npz", x=x, y=y, x_test=x, y_test=y)
    options = ("--dataset", tmp_path / "images.npz", "--batch-size", "300", *OWN, *SPLIT, "--json")
    status, out, err = launch(ranks, "-m", "psmpi.bench", "memory", *options)
    assert status == 0, err
    for row in json.loads(out):
        for what in ("activations", "buffers", "samples"):
            assert row["needed"][what] > 5e5
            assert 0.9 * row["needed"][what] <= row["held"][what] <= 1.1 * row["needed"][what], (what, row)


def test_a_sample_s_features_go_out_and_their_gradients_come_back(train):
    """A sample has 12 x 6 x 6 float32 features, of which half go each way, and 12 bytes of psl's sums."""
    sent = {}
    for batch in ("40", "80"):
        row = train(2, *OWN, *SPLIT, "--batch-size", batch, "--max-steps", "1", "--epochs", "1").rows[-1]
        sent[batch] = np.array(row["bytes_sent_by_rank"])
    assert (sent["80"] - sent["40"]).tolist() == [40 * (2 * 432 * 4 // 2 + 12)] * 2


def test_the_trunk_ends_where_classes_part():
    lengths = {
        ("psnet", (1, 28, 28)): 3, ("psnet", (3, 32, 32)): 3, ("head", (20,)): 4, ("mlp", (20,)): 4,
        ("resnet", (1, 8, 8)): 15,
    }  # fmt: skip
    for (name, shape), length in lengths.items():
        assert trunk_length(make_network(name, shape, 10)) == length, name


@pytest.mark.parametrize(
    ("ranks", "options", "says"),
    [
        (3, ("--partition", "pairs"), "sees the samples of its own classes only"),
        (3, ("--batch-size", "1"), "use --batch-size 2 or more, or --trunk replicated"),
        (5, ("--batch-size", "2", "--replicas", "2"), "use --batch-size 4 or more"),
        (3, ("--config", "apart.toml"), "no layers with weights that all classes share"),
        (3, ("--method", "data_parallel"), "--trunk"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, ranks, options, says):
    tables = "".join(f'[[model.layers]]\ntype = "{kind}"\n{more}\n' for kind, more in [
        ("flatten", ""), ("separable_dense", "units = 10\ngroups = 10"),
    ])  # fmt: skip
    (tmp_path / "apart.toml").write_text(f'[model]\nmodel = "custom"\n{tables}')
    status, _, err = run(ranks, "-m", "psmpi.train", "--epochs", "1", *SPLIT, *options, cwd=tmp_path)
    assert status == 1 and says in " ".join(err.split())


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("whose", ["weights", "features", "loss"])
def test_the_rank_is_named_whose_layers_are_wrong(tmp_path, mode, whose):
    """Rank 2's weights or its slice of features become NaN, and the message names rank 2; or the loss diverges."""
    losses, calls = ElementWorker.element_losses, []

    def losses_gone_wrong(self, batch, own=None):
        if 9 in self.place.classes:
            calls.append(1)
            if len(calls) == 3 and whose == "weights":
                self.model.w[-1] = np.nan
            elif len(calls) == 3 and whose == "features":
                forward = self.trunk.forward_pass

                def spoiled(n):
                    tape = forward(n)
                    self.trunk.model.parts[0].w[0][0][...] = np.inf
                    tape.scores[...] = np.nan
                    return tape

                self.trunk.forward_pass = spoiled
        return losses(self, batch, own)

    diverges = ("--loss", "squared", "--lr", "1e38", "--clip", "0", "--optimizer", "sgd")
    with mock.patch.object(ElementWorker, "element_losses", losses_gone_wrong):
        status, _, err = run(
            3,
            "-m",
            "psmpi.train",
            "--out",
            tmp_path / "run",
            "--epochs",
            "1",
            "--on-nan",
            mode,
            *SPLIT,
            *(diverges if whose == "loss" else ()),
        )
    message = " ".join(err.split())
    assert status == 1 and "Traceback" not in err
    if whose == "weights":
        assert "on rank 2 the update of step 2 left weights that are not finite: dense2.bias, unit 9" in message
    elif whose == "features":
        assert "step 3 of epoch 1" in message and "rank 2" in message and "conv1" in message


def test_a_rank_whose_trial_is_too_far_keeps_no_other_waiting(train):
    """Ranks compute bce by themselves; in a line search one of them finds an infinite loss."""
    losses, calls = Objective.losses, []

    def too_far(self, *arguments, **options):
        if 9 in self.model.classes:
            calls.append(1)
            if len(calls) == 2:
                raise FloatingPointError("too far")
        return losses(self, *arguments, **options)

    with mock.patch.object(Objective, "losses", too_far):
        trained = train(3, "--loss", "bce", "--optimizer", "lbfgs", "--lr", "1", *SPLIT, "--max-steps", "4", timeout=60)
    assert len(calls) > 4 and np.isfinite(trained.rows[-1]["train_loss"])


@pytest.mark.parametrize("loss", ["psl", "squared"])
def test_the_sample_is_named_that_another_rank_has_computed(tmp_path, loss):
    """Only one rank reads sample 200; the others get its features."""
    rng = np.random.default_rng(0)
    x, y = rng.random((300, 7)).astype(np.float32), np.arange(300) % 10
    x[200] = 3e38
    np.savez(tmp_path / "huge.npz", x=x, y=y, x_test=x[:60], y_test=y[:60])
    options = ("--dataset", tmp_path / "huge.npz", "--model", "head", "--widths", "20", "12", "--batch-size", "60")
    # An error of one thread ends the others; processes end with the first rank that prints its error.
    run_ranks = launch if loss == "squared" else run
    status, _, err = run_ranks(
        3, "-m", "psmpi.train", *options, "--loss", loss, "--lr", "1e-6", *OWN, *SPLIT, cwd=tmp_path
    )
    message = " ".join(err.split())
    assert (
        status == 1
        and "layer dense1" in message
        and "(sample 200 of" in message
        and message.count("is not a finite number") == 1
    )


def test_batch_normalization_takes_slices_of_one_sample(serial, train):
    """Statistics are those of the whole minibatch."""
    options = ("--dtype", "float64", "--batch-norm", "--batch-size", "4", "--max-steps", "8", "--epochs", "1")
    assert distance(serial(*options).tensors(), train(4, *options, *OWN, *SPLIT).tensors()) <= 1e-9


def chosen(network, size, batch=100, **changes):
    config = usual_config().changed(Settings, trunk="auto", **changes)
    config = replace(config, data=replace(config.data, batch_size=batch))
    plan = make_plan(network, size, config)
    assert [cost.time for _, cost in plan.costs] == sorted(cost.time for _, cost in plan.costs)
    return plan


def test_auto_takes_what_costs_least():
    psnet, wide = make_network("psnet", (3, 32, 32), 10), make_network("head", (64,), 20_000, widths=(2048, 2048, 16))
    # Few weights and large features: replicas. Many weights of few features: slices.
    assert chosen(psnet, 3).costs[0][0] == Arrangement(2, False)
    assert chosen(wide, 3).costs[0][0] == Arrangement(1, True) and chosen(wide, 3).trunk == 6
    assert chosen(psnet, 3, replicas=1).costs[0][0].rows == 1
    assert chosen(make_network("psnet", (1, 8, 8), 10, batch_norm=True), 3).roles.rows == 1
    assert chosen(psnet, 4, partition="pairs").trunk == 0
    # No more rows than samples, no slice without a sample, no columns of a network that is not cut by classes.
    assert all(arrangement.rows <= 2 and not arrangement.split for arrangement, _ in chosen(wide, 4, batch=2).costs)
    assert all(arrangement.rows == 5 for arrangement, _ in chosen(make_network("mlp", (64,), 10), 6).costs)


def test_layers_that_are_computed_by_all_limit_the_speed_up():
    """Compare the multiplications of one process with those of the busiest of two and of ten, counted from the sizes of
    layers."""
    # Multiplications a sample: the first convolution, the second, and the dense layers of all classes.
    sizes = {
        (1, 28, 28): (24**2 * 40 * 25, 8**2 * 30 * 40 * 25, (24 * 48 + 15 * 24 + 15) * 10),
        (3, 32, 32): (28**2 * 60 * 75, 10**2 * 30 * 60 * 25, (35 * 75 + 15 * 35 + 15) * 10),
    }
    limits = {(1, 28, 28): (1.72, 4.02), (3, 32, 32): (1.49, 2.45)}
    for shape, (first, *rest) in sizes.items():
        network, all_macs = make_network("psnet", shape, 10), 2 * first + 3 * sum(rest)
        for ranks, limit in zip((2, 10), limits[shape], strict=True):
            for split, expected in ((False, all_macs / (2 * first + 3 * sum(rest) / ranks)), (True, ranks)):
                costs = [
                    cost(network, assign_roles(network.layout(), n, colocate=True), split and n > 1, 100, 4).macs
                    for n in (1, ranks)
                ]
                assert costs[0] == 100 * all_macs and costs[0] / costs[1] == pytest.approx(expected)
                assert split or costs[0] / costs[1] == pytest.approx(limit, abs=5e-3)


def test_the_choice_is_told_and_is_one_that_trains(train):
    trained = train(3, "--trunk", "auto", "--max-steps", "3")
    assert "--trunk auto takes replicated in" in trained.stdout
    for options, note in (
        (("--trunk", "auto", "--partition", "pairs"), "--trunk auto changes nothing"),
        (("--trunk", "split", "--replicas", "2"), "--trunk split changes nothing"),
    ):
        assert note in " ".join(train(3, *options, "--max-steps", "1").stdout.split())


def test_what_a_rank_does_at_most_is_told_of_different_ranks():
    """The master computes nothing and sends most; the multiplications are those of a worker."""
    network = make_network("psnet", (1, 8, 8), 10)
    plan = chosen(network, 16, batch=256)
    assert all(spent.macs > 1e6 for _, spent in plan.costs)
    (_, replicated), (_, split) = (
        next(entry for entry in plan.costs if entry[0] == Arrangement(3, split)) for split in (False, True)
    )
    assert split.macs < replicated.macs and plan.costs[0][1].time <= split.time
