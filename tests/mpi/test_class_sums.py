"""Losses and tests of scores that are split by class over ranks: the exchanged sums, derivatives and test scores."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from helpers.runs import distance, same_run, save_many
from scipy.special import expit, softmax

from psmpi.backend import NumpyOps
from psmpi.comm.group import Counter, Group
from psmpi.comm.transfers import Step, totals
from psmpi.layout import Runs
from psmpi.nn.init import initial_weights
from psmpi.nn.losses import LOSSES, make_loss
from psmpi.nn.metric import Metric, ScorePart
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.objective import GRADIENT_LIMIT, Objective
from psmpi.nn.tiles import TiledObjective
from psmpi.optim.first_order import FirstOrder
from psmpi.testing import run_ranks
from psmpi.training.class_sums import ClassSums

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
# Float32 words a sample in the exchanged sums, a float64 counting two, for three or more classes a rank.
WORDS = {"psl": 3, "logistic": 3, "hinge": 3, "nll": 3, "squared": 0, "bce": 0}


class Scores:
    """Stand-in for a model without weights, enough for derivatives of scores."""

    def __init__(self, classes, dtype):
        self.ops, self.size, self.steps, self.dtype, self.w, self.g = NumpyOps(), classes, 0, dtype, None, None


def spread(world, classes):
    """Return the number of classes of each rank, and the first class of this rank."""
    counts = [len(part) for part in np.array_split(np.arange(classes), world.size)]
    return counts, sum(counts[: world.rank])


def derivatives(world, name, scores, labels, lenient=False):
    """Return the value, the derivatives of this rank's scores, (bytes sent, received), and the bytes that the sums
    declare; or an error message and None."""
    counts, first = spread(world, len(scores))
    counter, loss = Counter(), make_loss(name, scores.dtype, outputs=len(scores))
    loss.lenient = lenient
    sums = ClassSums(Group(world, range(world.size), counter), loss, counts, scores.dtype, NumpyOps())
    objective = Objective(loss, Scores(counts[world.rank], scores.dtype), sums if world.size > 1 else None)
    objective.reserve(counts[world.rank], scores.shape[1])
    own_scores = scores[first : first + counts[world.rank]].copy()
    try:
        with np.errstate(all="ignore"):
            grad = objective.losses(own_scores, labels - first, 0.25).copy()
            value = objective.value()
    except FloatingPointError as error:
        return str(error), None, None, None
    declared = totals(sums.messages(Step(len(labels))), world.rank)
    return value, grad, (counter.sent, counter.received), declared


def problem(classes, batch=30, dtype=F64, levels=0):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(classes, batch)) if not levels else rng.integers(0, levels, (classes, batch))
    return scores.astype(dtype), rng.integers(0, classes, batch)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_are_those_of_all_scores_at_once(name, ranks):
    scores, labels = problem(7)
    full_derivatives = np.empty(scores.shape)
    value = make_loss(name, F64)(scores, labels, 0.25, full_derivatives)
    by_rank = run_ranks(ranks, lambda world: derivatives(world, name, scores, labels))
    assert sum(result[0] for result in by_rank) == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(
        np.concatenate([result[1] for result in by_rank]), full_derivatives, rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("name", LOSSES)
def test_what_ranks_tell_each_other_does_not_grow_with_the_classes(name):
    batch, size = 30, 3
    for classes in (7, 60, 3000):
        scores, labels = problem(classes, batch, F32)
        by_rank = run_ranks(size, partial(derivatives, name=name, scores=scores, labels=labels))
        assert all(sent == declared for _, _, sent, declared in by_rank)
        # A ring all-reduce moves 2 (n - 1) / n of the words, an all-gather receives n - 1 times a rank's words.
        share = 2 * (size - 1) / size if not LOSSES[name].gathers else size - 1
        words = WORDS[name] * (classes > 7 or not LOSSES[name].gathers)
        assert words == 0 or all(result[2][1] == 4 * words * share * batch for result in by_rank)
        if classes == 7 and LOSSES[name].gathers:
            # Ranks with fewer than three classes send their scores: 3, 2 and 2 words a sample.
            assert [result[2][1] for result in by_rank] == [4 * n * batch for n in (4, 5, 5)]


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["label", "other"])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.sums])
def test_all_ranks_learn_of_a_score_that_is_no_number(name, where, bad, lenient):
    """Every rank gets the same error, or NaN if the loss is lenient, so all ranks take the same branch."""
    scores, labels = problem(9)
    scores[labels[4] if where == "label" else (labels[4] + 1) % 9, 4] = bad
    by_rank = run_ranks(3, lambda world: derivatives(world, name, scores, labels, lenient))
    failed = [isinstance(result[0], str) if not lenient else not np.isfinite(result[0]) for result in by_rank]
    # An infinite score of the label is an error for psl and nll, not for logistic and hinge.
    fine = bad == np.inf and where == "label" and name in ("logistic", "hinge")
    assert failed == [not fine] * 3


def test_all_ranks_say_that_clipping_is_off():
    scores, labels = problem(9)
    scores[(labels[4] + 1) % 9, 4] = 800.0

    def work(world):
        loss = make_loss("psl", F64, exp_clip="off")
        counts, first = spread(world, 9)
        sums = ClassSums(Group(world, range(3), Counter()), loss, counts, F64, NumpyOps())
        objective = Objective(loss, Scores(3, F64), sums)
        objective.reserve(3, len(labels))
        with pytest.raises(FloatingPointError, match="--exp-clip is off"):
            objective.losses(scores[first : first + 3], labels - first, 1.0)
        return objective.finite

    assert run_ranks(3, work) == [False] * 3


@pytest.mark.parametrize(("dtype", "bias"), [(F32, 40.0), (F32, 80.0), (F32, 100.0), (F64, 640.0)])
def test_large_terms_of_another_rank_scale_the_gradient_of_the_label_down(dtype, bias, monkeypatch):
    """One rank has all labels and the other the large scores; the gradient is limited as on one rank."""
    monkeypatch.setattr("psmpi.nn.tail.tile_size", lambda batch: 4)
    network = build("head", (5,), [{"type": "dense", "units": 12}], 12)
    layout, rng = network.layout(), np.random.default_rng(0)
    w, x = rng.normal(size=layout.size).astype(dtype), rng.normal(size=(5, 8)).astype(dtype)
    labels = rng.integers(0, 6, 8)
    Model(network, layout, w, None, NumpyOps()).parts[-1].w[0][1][0][9] = bias

    def gradient(world, tiled):
        counts, first = spread(world, 12)
        part = layout.part(range(first, first + counts[world.rank]))
        own_weights = np.concatenate([w[a:b] for a, b in part.intervals])
        model = Model(
            network,
            layout,
            own_weights,
            np.empty_like(own_weights),
            NumpyOps(),
            range(first, first + len(own_weights) // 6),
            tiled=tiled,
        )
        loss = make_loss("psl", dtype)
        sums = ClassSums(Group(world, range(world.size), Counter()), loss, counts, dtype, NumpyOps())
        objective = (TiledObjective if tiled else Objective)(loss, model, sums if world.size > 1 else None)
        objective.reserve(counts[world.rank], 8)
        tape = model.forward(x)
        objective.losses(tape.scores, labels - first, 0.125)
        objective.backward(tape)
        return model.g

    full_gradient = gradient(run_ranks(1, lambda world: world)[0], False)
    split_gradient = np.concatenate(run_ranks(2, lambda world: gradient(world, True)))
    assert (
        abs(split_gradient - full_gradient).max() <= 1e-4 * abs(full_gradient).max()
        and abs(split_gradient).max() <= GRADIENT_LIMIT[dtype]
    )


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_test_as_one_that_has_all_scores(name, ranks, levels):
    """The integer scores include ties between ranks."""
    scores, labels = problem(12, 100, F32, levels)

    def share(world):
        counts, first = spread(world, 12)
        metric = Metric(make_loss(name, F32, outputs=12), 12)
        sums = ClassSums(Group(world, range(ranks), Counter()), metric.loss, counts, F32, NumpyOps())
        classes = np.arange(first, first + counts[world.rank])
        part = ScorePart(classes, np.arange(12) - first, sums, world.rank == 0)
        return metric.sums(scores[classes], labels, part)

    summed, expected = sum(run_ranks(ranks, share)), Metric(make_loss(name, F32), 12).sums(scores, labels)
    assert np.array_equal(summed[1:], expected[1:]) and summed[0] == pytest.approx(expected[0], rel=1e-6)


@pytest.mark.parametrize("name", ["bce", "nll", "squared"])
def test_weights_do_not_depend_on_the_ranks_but_through_rounding(name, train):
    options = ("--dtype", "float64", "--loss", name, "--max-steps", "10", "--batch-size", "20", "--placement", "owner")
    runs = [train(ranks, "--colocate", *options) for ranks in (1, 2, 4, 7)]
    for other_run in runs[1:]:
        assert distance(runs[0].tensors(), other_run.tensors()) <= 1e-10
        for key in ("train_loss", "test_loss", "test_accuracy", "test_top5"):
            assert other_run.rows[-1][key] == pytest.approx(runs[0].rows[-1][key], rel=1e-10)


# Derivatives of the mean loss with respect to scores (b, classes), of targets (b, classes) of ones and zeros.
SLOPES = {
    "nll": lambda c, t: softmax(c, axis=1) - t,
    "bce": lambda c, t: expit(c - np.log(c.shape[1] - 1)) - t,
}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", SLOPES)
def test_a_linear_network_steps_as_regression_does(name, ranks, train, tmp_path):
    """Compare 20 full-batch steps of Adam with its formulas, on SciPy's softmax and logistic function."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), np.arange(50) % 5
    np.savez(tmp_path / "data.npz", x=x, y=y, x_test=x[:5], y_test=y[:5])
    (tmp_path / "linear.toml").write_text(
        '[model]\nmodel = "custom"\ndtype = "float64"\n[[model.layers]]\ntype = "dense"\nunits = 5\n'
        f'[data]\nbatch_size = 50\n[optimization]\nlr = 0.01\nclip = 0.0\n[objective]\nloss = "{name}"\n'
    )
    options = ("--dataset", tmp_path / "data.npz", "--config", tmp_path / "linear.toml", "--colocate")
    first = train(ranks, *options, "--epochs", "1").tensors()
    last = train(ranks, *options, "--epochs", "20").tensors()
    network = build("custom", (6,), [{"type": "dense", "units": 5}], 5)
    layout = network.layout()
    start = np.empty(layout.size)
    initial_weights(network, layout, Runs(((0, layout.size),)), start, seed=0)
    w, b = (np.empty(p.shape) for p in layout.parameters)
    for piece in layout.pieces():
        into = (w, b)[piece.parameter].reshape(5, -1)[piece.first : piece.last]
        into[...] = start[piece.offset : piece.offset + into.size].reshape(into.shape)
    moments = [np.zeros_like(a) for a in (w, b, w, b)]
    for step in range(1, 21):
        slope = SLOPES[name](x @ w.T + b, np.eye(5)[y]) / 50
        for k, (values, g) in enumerate(((w, slope.T @ x), (b, slope.sum(axis=0)))):
            moments[k] += 0.1 * (g - moments[k])
            moments[2 + k] += 0.001 * (g * g - moments[2 + k])
            rate = 0.01 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            values -= rate * moments[k] / (np.sqrt(moments[2 + k]) + 1e-8 * np.sqrt(1 - 0.999**step))
        tensors = {1: first, 20: last}.get(step)
        if tensors is not None:
            for key, values in ((layout.parameters[0].name, w), (layout.parameters[1].name, b)):
                np.testing.assert_allclose(tensors[f"weights/{key}"], values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_tiles_of_classes_on_any_ranks_make_the_steps_of_all_scores_on_one(name, train, tmp_path, monkeypatch):
    """Train and test a head of 37 classes whose hidden layer every rank computes."""
    options = (*save_many(tmp_path), "--loss", name)
    untiled = train(1, *options)
    monkeypatch.setattr("psmpi.nn.tail.tile_size", lambda batch: 5)
    for ranks in (1, 3, 4):
        tiled = train(ranks, *options, "--colocate", *(("--placement", "owner") if ranks > 3 else ()))
        assert same_run(untiled, tiled)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.immediate])
def test_rows_that_are_stepped_in_their_tiles_step_as_others(name, optimizer, train, tmp_path, monkeypatch):
    options = (*save_many(tmp_path), "--loss", name, "--clip", "0", "--optimizer", optimizer, "--weight-decay", "0.01")
    untiled, pieces = train(1, *options), []
    step_piece = FirstOrder.step_piece

    def counted(self, w, g, lr, at):
        pieces.append(at)
        step_piece(self, w, g, lr, at)

    monkeypatch.setattr(FirstOrder, "step_piece", counted)
    monkeypatch.setattr("psmpi.nn.tail.tile_size", lambda batch: 5)
    for arguments, by_tile in (
        ((1,), True),
        ((3, "--placement", "owner"), True),
        ((3,), False),
        ((1, "--on-nan", "skip"), False),
    ):
        pieces.clear()
        assert (
            same_run(untiled, train(arguments[0], *options, "--colocate", *arguments[1:])) and bool(pieces) == by_tile
        )
