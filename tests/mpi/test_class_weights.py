"""Class weights: training with them against training on repeated samples."""

import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from helpers.runs import distance, run

from psmpi.backend import CompiledOps, NumpyOps
from psmpi.config import Config, without_unused
from psmpi.data import open_dataset
from psmpi.nn.losses import make_loss
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.objective import Objective
from psmpi.training.class_weights import class_weights

F64 = np.dtype(np.float64)
# Samples of each class, and the weight of each class: how often its samples are repeated.
COUNTS, WEIGHTS = (3, 7, 2, 4, 5, 3), (1, 2, 3, 1, 2, 1)
GIVEN = ("--class-weights", ",".join(map(str, WEIGHTS)))
LR = 0.01
PLAIN = ("--dtype", "float64", "--optimizer", "sgd", "--clip", "0", "--epochs", "3")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Options of two full-batch trainings: one on a data set, one on the same set with each sample repeated as often as
    its class weighs.

    The gradient is a mean over samples, so the second rate is larger by the ratio of their numbers.
    """
    folder, rng = tmp_path_factory.mktemp("several"), np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(6), COUNTS))
    x = rng.normal(size=(len(y), 12))
    option_sets = []
    for name, times in (("once", np.ones(6, int)), ("several", np.array(WEIGHTS))):
        ids = np.repeat(np.arange(len(y)), times[y])
        np.savez(folder / f"{name}.npz", x=x[ids], y=y[ids], x_test=x, y_test=y)
        rate = LR * len(ids) / len(y)
        option_sets.append(("--dataset", folder / f"{name}.npz", "--batch-size", len(ids), "--lr", repr(rate), *PLAIN))
    return option_sets


def both(several, train, ranks, *options, spread=()):
    """Return the distance between the weights of class-weighted training on `ranks` ranks and of repeated samples on
    one rank."""
    once, repeated = several
    expected, weighted = train(1, *repeated, *options), train(ranks, *once, *GIVEN, *options, *spread)
    return distance(expected.tensors(), weighted.tensors())


COLOCATED, ROWS = ("--colocate",), ("--colocate", "--replicas", "2")


@pytest.mark.parametrize(
    ("ranks", "options", "spread"),
    [
        (1, "", ()),
        (2, "", COLOCATED),
        (3, "", COLOCATED),
        (3, "", ()),
        (2, "", ROWS),
        (4, "", ROWS),
        (3, "", ("--colocate", "--partition", "pairs")),
        (3, "--psl-weights current", COLOCATED),
        *((3, f"--loss {loss}", COLOCATED) for loss in ("nll", "bce", "squared", "hinge", "logistic")),
        (2, "--backend numpy", COLOCATED),
        (2, "--model head --widths 9 --scale 8 --margin 0.3 --loss nll", COLOCATED),
        (1, "--method data_parallel", ()),
        (3, "--method data_parallel", ()),
        (2, "--method local_sgd --local-steps 1", ()),
        (1, "--method ist --model mlp --widths 8 6", ()),
        (2, "--method tensor --model mlp --widths 8 6", ()),
        (4, "--method tensor --model mlp --widths 8 6 --loss nll", ()),
        (2, "--method spann --model slabs --widths 8 8", ()),
    ],
)
def test_a_weight_counts_a_sample_so_many_times(ranks, options, spread, several, train):
    assert both(several, train, ranks, *options.split(), spread=spread) <= 1e-12


def test_sequences_with_one_label_each_are_weighed(several, train, tmp_path):
    rows = []
    for options in several:
        path = tmp_path / options[1].name
        with np.load(options[1]) as file:
            arrays = {key: file[key].reshape(-1, 4, 3) if key[0] == "x" else file[key] for key in file}
        lengths = {f"lengths{end}": np.full(len(arrays[f"x{end}"]), 4) for end in ("", "_test")}
        np.savez(path, **arrays, **lengths)
        rows.append(("--dataset", path, *options[2:]))
    options = ("--model", "rnn", "--widths", "5", "--method", "data_parallel", "--loss", "nll")
    assert both(rows, train, 2, *options) <= 1e-12


def test_what_psl_remembers_is_of_the_loss_without_weights(several, train):
    once, repeated = several
    psl_options = ("--psl-weights", "remembered", "--colocate")
    expected, weighted = train(1, *repeated, *psl_options).tensors(), train(3, *once, *GIVEN, *psl_options).tensors()
    weights = [name for name in weighted if name.startswith("weights/")]
    assert distance({n: expected[n] for n in weights}, {n: weighted[n] for n in weights}) <= 1e-12


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("weights", ["none", "current"])
def test_a_device_weighs_as_the_host_does(weights, ranks, several, train, stand_in):
    """The weights multiply derivatives in a kernel on the device, or in host memory by NumPy."""
    options = ("--backend", "cupy", "--psl-weights", weights)
    assert both(several, train, ranks, *options, spread=COLOCATED) <= 1e-12


def test_weighed_classes_have_all_scores_where_others_have_tiles_of_them(several, train, monkeypatch):
    monkeypatch.setattr("psmpi.nn.tail.tile_size", lambda batch: 2)
    assert both(several, train, 2, "--colocate", "--model", "head", "--widths", "9") <= 1e-12


@pytest.mark.parametrize("backend", [NumpyOps, CompiledOps])
def test_the_backward_pass_hears_of_derivatives_as_large_as_weights_make_them(backend):
    ops, loss = backend(), make_loss("psl", F64)
    loss.class_weights = np.array([1.0, 1e5, 2.0])
    network = build("custom", (3,), [{"type": "dense", "units": 3}], 3)
    layout = network.layout()
    objective = Objective(loss, Model(network, layout, *np.zeros((2, layout.size)), ops))
    objective.reserve(3, 2)
    labels, scores = np.array([1, 0]), np.random.default_rng(0).normal(size=(3, 2))
    objective.bring(labels, loss.sample_weights(labels))
    weighted, plain = objective.losses(scores, objective.targets(2), 0.5), np.empty((3, 2))
    make_loss("psl", F64)(scores, labels, 0.5, plain)
    np.testing.assert_allclose(weighted, plain * [1e5, 1], rtol=1e-12)
    assert objective.report.host[3] >= abs(weighted).max()


def test_losses_that_are_printed_are_without_weights(several, train):
    once, _ = several
    plain, weighed = train(1, *once, "--epochs", "1"), train(2, *once, *GIVEN, "--epochs", "1", "--colocate")
    assert weighed.rows[-1]["train_loss"] == pytest.approx(plain.rows[-1]["train_loss"], rel=1e-12)
    assert weighed.rows[-1]["test_loss"] != pytest.approx(plain.rows[-1]["test_loss"], rel=1e-6)


def dataset_of(several):
    return open_dataset(str(several[0][1]), *Config().data.source[1:])


def test_balanced_classes_weigh_the_same_together(several):
    """The expected numbers are those of scikit-learn 1.5's compute_class_weight for these labels."""
    weights = class_weights("balanced", dataset_of(several))
    np.testing.assert_allclose(weights, [4 / 3, 4 / 7, 2, 1, 0.8, 4 / 3], rtol=1e-15)
    np.testing.assert_allclose(weights * COUNTS, 4)


def test_classes_without_training_samples_are_not_counted(tmp_path):
    y = np.array([0, 2, 2, 2])
    np.savez(tmp_path / "gap.npz", x=np.ones((4, 2)), y=y, x_test=np.ones((3, 2)), y_test=np.arange(3))
    weights = class_weights("balanced", open_dataset(str(tmp_path / "gap.npz"), *Config().data.source[1:]))
    np.testing.assert_allclose(weights, [2, 1, 2 / 3])


def test_names_of_classes_have_weights_in_their_order(tmp_path, several, train):
    once, _ = several
    with np.load(once[1]) as file:
        arrays = {key: np.array(list("abcdef"))[file[key]] if key[0] == "y" else file[key] for key in file}
    np.savez(tmp_path / "named.npz", **arrays)
    named, fewer = ("--dataset", tmp_path / "named.npz", *once[2:]), ("--class-weights", "1,2")
    assert distance(train(1, *once, *GIVEN).tensors(), train(1, *named, *GIVEN).tensors()) == 0
    assert "give one for each, in the order a, b, c, d, e and f, or balanced" in refused(*named[:2], *fewer)


@pytest.mark.parametrize(("method", "goes_on"), [("data_parallel", "balanced"), ("dfa", "")])
def test_a_run_goes_on_with_its_weights_where_the_method_has_them(method, goes_on):
    base = replace(Config(), objective=replace(Config().objective, class_weights="balanced"))
    with_method = replace(base, parallel=replace(base.parallel, method=method))
    assert without_unused(with_method, base, ()).objective.class_weights == goes_on
    assert without_unused(with_method, base, {"class_weights"}).objective.class_weights == "balanced"


def refused(*words):
    """Return the error message of a training that is refused."""
    status, _, err = run(1, "-m", "psmpi.train", *words)
    assert status == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--class-weights 1,2,3", "there are 3 numbers, and digits has 10 classes: give one for each"),
        ("--class-weights 1,1,1,1,0,1,1,1,1,1", "a number above 0 and up to 1e+06"),
        ("--class-weights=-1,1,1,1,1,1,1,1,1,1", "a number above 0"),
        ("--class-weights nan,1,1,1,1,1,1,1,1,1", "a number above 0"),
        ("--class-weights inf,1,1,1,1,1,1,1,1,1", "a number above 0"),
        ("--class-weights equal", "--class-weights equal: expected balanced, or for each class a number"),
        ("--class-weights 1,,1", "expected balanced, or for each class a number"),
        ("--class-weights balanced --optimizer lbfgs", "--optimizer lbfgs compares values: use a first-order one"),
        ("--class-weights balanced --optimizer plbfgs --partition pairs", "--optimizer plbfgs compares values"),
        ("--class-weights balanced --method dfa --model mlp", "and the method here is dfa: leave it out"),
        ("--class-weights balanced --method hogwild --model mlp", "and the method here is hogwild: leave it out"),
        ("--class-weights balanced --dataset adding:10 --model rnn --loss squared --method data_parallel",
         "--class-weights is for classes, and adding:10"),
        ("--class-weights balanced --dataset copying:10 --model rnn --method data_parallel --loss nll",
         "have one at each step: leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(words, says):
    assert says in re.sub(r"\s+", " ", refused(*words.split()))
