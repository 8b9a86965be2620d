"""Trainings whose private layers go by tiles of classes: those of all classes at once, on any ranks."""

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
    """tiles(n): tiles of n classes from now on; the number of tiles computed so far."""
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
    alone = serial(*SHORT, *(word for word in more if word not in (*OWN, *SPLIT, "--replicas", "--masters", "2")))
    count = tiles(2)
    many = train(ranks, *SHORT, *more)
    assert count and distance(alone.tensors(), many.tensors()) <= 1e-9
    for key in ("train_loss", "test_loss", "test_accuracy"):
        assert many.rows[-1][key] == pytest.approx(alone.rows[-1][key], rel=1e-9)


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if loss.immediate])
def test_weights_that_are_stepped_in_their_tiles_step_as_others(serial, train, tiles, monkeypatch, loss):
    options = (*SHORT, "--loss", loss, "--clip", "0", "--weight-decay", "0.01")
    whole, pieces = serial(*options), []
    step_piece = FirstOrder.step_piece

    def counted(self, w, g, lr, at):
        pieces.append(at.stop - at.start)
        step_piece(self, w, g, lr, at)

    monkeypatch.setattr(FirstOrder, "step_piece", counted)
    tiles(3)
    for ranks, more, seen in ((1, (), True), (2, OWN, True), (3, (), False), (1, ("--on-nan", "skip"), False)):
        pieces.clear()
        assert same_run(whole, train(ranks, *options, *more)) and bool(pieces) == seen
    assert not pieces


@pytest.mark.parametrize("size", [2, 100])
@pytest.mark.parametrize("more", [(), ("--batch-norm",), ("--batch-norm", "--backend", "numpy")], ids=str)
def test_a_rank_s_gradient_is_made_again(train, tiles, monkeypatch, more, size):
    """As it is where a sum of ranks' gradients is no number, to find whose it comes from."""
    tiles(size)
    losses, seen = ElementWorker.element_losses, []

    def twice(self, batch, own=None):
        value = losses(self, batch, own)
        before = self.g_part.copy()
        self.g_part.fill(np.nan)
        seen.append(abs(self.own_gradient() - before).max() / abs(before).max())
        return value

    monkeypatch.setattr(ElementWorker, "element_losses", twice)
    train(1, *SHORT, *more)
    assert len(seen) == 6 and max(seen) <= 1e-12


def test_bytes_are_those_of_all_classes_at_once(tmp_path, tiles):
    assert tiles(2) == []
    for more in (OWN, (*OWN, *SPLIT), ("--loss", "nll")):
        counters_equal_messages(Case("psl", tmp_path / more[-1], more))


def test_predictions_of_the_largest_scores_are_the_same(train, tiles, tmp_path):
    found, told = train(1, *SHORT), []
    for size, ranks in ((100, 1), (2, 1), (2, 2)):
        count = tiles(size)
        status, out, err = run(ranks, "-m", "psmpi.predict", found.out, "--json", cwd=tmp_path)
        assert status == 0 and bool(count) == (size == 2), out + err
        told.append(json.loads(out))
    assert told[0] == told[1] == told[2]


def test_statistics_that_are_fixed_are_those_of_all_classes(train, tiles, tmp_path):
    """Predictions of a network with batch normalization do not go by tiles, whose statistics would be their own."""
    found, told = train(1, *SHORT, "--batch-norm"), []
    for size in (100, 2):
        count = tiles(size)
        count.clear()
        words = (found.out, "--json", "--calibrate", "1000")
        status, out, err = run(1, "-m", "psmpi.predict", *words, cwd=tmp_path)
        assert status == 0 and not count, out + err
        told.append(json.loads(out))
    assert told[0] == told[1]


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
    """Activations and buffers within a tenth of what is said before, and less than those of all classes."""
    rng, found = np.random.default_rng(0), {}
    x, y = rng.integers(0, 255, (600, 1, 28, 28), np.uint8), np.arange(600) % 200
    np.savez(tmp_path / "images.npz", x=x, y=y, x_test=x, y_test=y)
    for size in (200, 12):
        tiles(size)
        options = ("--dataset", tmp_path / "images.npz", "--batch-size", "100", "--threads", "1", *more, "--json")
        status, out, err = run(1, "-m", "psmpi.bench", "memory", *options)
        assert status == 0, err
        (found[size],) = json.loads(out)
        for what in ("activations", "buffers"):
            held, needed = found[size]["held"][what], found[size]["needed"][what]
            assert needed > 1e6 and 0.9 * needed <= held <= 1.1 * needed, (what, size, held, needed)
    held = [found[size]["held"]["activations"] + found[size]["held"]["buffers"] for size in (200, 12)]
    assert held[1] < 0.65 * held[0]
