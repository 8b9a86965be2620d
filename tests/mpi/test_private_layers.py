"""Trainings that compute private layers by tiles of classes, against trainings of all classes at once, on any ranks."""

import json

import numpy as np
import pytest

pytest.importorskip("mpi4py.MPI")

from helpers.runs import distance, run, same_run

from psmpi.nn import private_layers, tail
from psmpi.nn.losses import LOSSES
from psmpi.nn.private_layers import PrivateLayers
from psmpi.optim.first_order import FirstOrder
from psmpi.testing.conformance import Case, counters_equal_messages
from psmpi.training.element_worker import ElementWorker

SHORT = ("--dtype", "float64", "--max-steps", "6", "--batch-size", "60", "--epochs", "1")
OWN = ("--colocate", "--placement", "owner")
SPLIT = ("--trunk", "split")


@pytest.fixture
def tiles(monkeypatch):
    """tiles(n): let tiles have n classes; the returned list grows by each computed tile."""
    count = []
    scores = PrivateLayers.scores

    def counted(self, features, first, out):
        count.append(first)
        return scores(self, features, first, out)

    monkeypatch.setattr(PrivateLayers, "scores", counted)

    def begin(size):
        monkeypatch.setattr(tail, "tile_size", lambda numbers: size)
        monkeypatch.setattr(private_layers, "SPILL", 0)
        return count

    return begin


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        *((1, ("--loss", name)) for name in LOSSES),
        (1, ("--batch-norm",)),
        (1, ("--batch-norm", "--loss", "nll")),
        (1, ("--optimizer", "lbfgs", "--lr", "1")),
        (2, OWN),
        (3, ()),
        (4, (*OWN, "--replicas", "2")),
        (4, ("--loss", "nll", "--masters", "2")),
        (2, (*OWN, *SPLIT)),
        (3, (*OWN, *SPLIT, "--batch-norm")),
        (3, (*OWN, *SPLIT, "--loss", "bce")),
        (2, (*OWN, "--loss", "logistic", "--on-nan", "skip")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_weights_and_tests_are_those_of_all_classes_at_once(serial, train, tiles, ranks, more):
    one_rank = serial(*SHORT, *(word for word in more if word not in (*OWN, *SPLIT, "--replicas", "--masters", "2")))
    count = tiles(2)
    many_ranks = train(ranks, *SHORT, *more)
    assert count and distance(one_rank.tensors(), many_ranks.tensors()) <= 1e-9
    for key in ("train_loss", "test_loss", "test_accuracy"):
        assert many_ranks.rows[-1][key] == pytest.approx(one_rank.rows[-1][key], rel=1e-9)


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if loss.immediate])
def test_weights_that_are_stepped_in_their_tiles_step_as_others(serial, train, tiles, monkeypatch, loss):
    options = (*SHORT, "--loss", loss, "--clip", "0", "--weight-decay", "0.01")
    untiled, pieces = serial(*options), []
    step_piece = FirstOrder.step_piece

    def counted(self, w, g, lr, at):
        pieces.append(at.stop - at.start)
        step_piece(self, w, g, lr, at)

    monkeypatch.setattr(FirstOrder, "step_piece", counted)
    tiles(3)
    for ranks, more, by_tile in ((1, (), True), (2, OWN, True), (3, (), False), (1, ("--on-nan", "skip"), False)):
        pieces.clear()
        assert same_run(untiled, train(ranks, *options, *more)) and bool(pieces) == by_tile
    assert not pieces


@pytest.mark.parametrize("size", [2, 100])
@pytest.mark.parametrize("more", [(), ("--batch-norm",), ("--batch-norm", "--backend", "numpy")], ids=str)
def test_a_rank_s_gradient_is_made_again(train, tiles, monkeypatch, more, size):
    """Where the sum of the ranks' gradients is not finite, each rank computes its own again to find the cause."""
    tiles(size)
    losses, errors = ElementWorker.element_losses, []

    def twice(self, batch, own=None):
        value = losses(self, batch, own)
        before = self.g_part.copy()
        self.g_part.fill(np.nan)
        errors.append(abs(self.own_gradient() - before).max() / abs(before).max())
        return value

    monkeypatch.setattr(ElementWorker, "element_losses", twice)
    train(1, *SHORT, *more)
    assert len(errors) == 6 and max(errors) <= 1e-12


def test_bytes_are_those_of_all_classes_at_once(tmp_path, tiles):
    assert tiles(2) == []
    for more in (OWN, (*OWN, *SPLIT), ("--loss", "nll")):
        counters_equal_messages(Case("psl", tmp_path / more[-1], more))


def test_predictions_of_the_largest_scores_are_the_same(train, tiles, tmp_path):
    trained, reports = train(1, *SHORT), []
    for size, ranks in ((100, 1), (2, 1), (2, 2)):
        count = tiles(size)
        status, out, err = run(ranks, "-m", "psmpi.predict", trained.out, "--json", cwd=tmp_path)
        assert status == 0 and bool(count) == (size == 2), out + err
        reports.append(json.loads(out))
    assert reports[0] == reports[1] == reports[2]


def test_statistics_that_are_fixed_are_those_of_all_classes(train, tiles, tmp_path):
    """Predictions of a network with batch normalization use no tiles, which would have statistics of their own."""
    trained, reports = train(1, *SHORT, "--batch-norm"), []
    for size in (100, 2):
        count = tiles(size)
        count.clear()
        words = (trained.out, "--json", "--calibrate", "1000")
        status, out, err = run(1, "-m", "psmpi.predict", *words, cwd=tmp_path)
        assert status == 0 and not count, out + err
        reports.append(json.loads(out))
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "more",
    [
        ("--loss", "psl"),
        ("--loss", "nll", "--clip", "0"),
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in (("--loss", "bce"), ("--backend", "numpy", "--loss", "nll"))
        ),
    ],
    ids=str,
)
def test_memory_is_that_of_a_tile(tmp_path, tiles, more):
    """Activations and buffers are within a tenth of the predicted need, and smaller than those of all classes."""
    rng, by_size = np.random.default_rng(0), {}
    x, y = rng.integers(0, 255, (600, 1, 28, 28), np.uint8), np.arange(600) % 200
    np.savez(tmp_path / "images.npz", x=x, y=y, x_test=x, y_test=y)
    for size in (200, 12):
        tiles(size)
        options = ("--dataset", tmp_path / "images.npz", "--batch-size", "100", "--threads", "1", *more, "--json")
        status, out, err = run(1, "-m", "psmpi.bench", "memory", *options)
        assert status == 0, err
        (by_size[size],) = json.loads(out)
        for what in ("activations", "buffers"):
            held, needed = by_size[size]["held"][what], by_size[size]["needed"][what]
            assert needed > 1e6 and 0.9 * needed <= held <= 1.1 * needed, (what, size, held, needed)
    held = [by_size[size]["held"]["activations"] + by_size[size]["held"]["buffers"] for size in (200, 12)]
    assert held[1] < 0.65 * held[0]
