"""Metrics of tests: sums over any ranks and samples, against counts by brute force."""

import numpy as np
import pytest

from psmpi.metrics import describe
from psmpi.nn.losses import make_loss
from psmpi.nn.metric import Metric, count_above, largest

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def problem(classes, batch=200, levels=1000, seed=0):
    """Scores of few levels, so that many are equal, and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, levels, (classes, batch)).astype(F32), rng.integers(0, classes, batch)


def in_order(scores):
    """Classes by descending score; of equal scores the lowest class first."""
    return sorted(range(len(scores)), key=lambda k: (-scores[k], k))


@pytest.mark.parametrize("levels", [3, 1000])
@pytest.mark.parametrize("classes", [6, 10, 40])
def test_accuracy_and_top_5_are_those_of_a_count(classes, levels):
    scores, labels = problem(classes, levels=levels)
    orders = [in_order(scores[:, b]) for b in range(len(labels))]
    metric = Metric(make_loss("nll", F32), classes)
    measured = metric.scores(metric.sums(scores, labels))
    assert list(measured) == ["loss", "accuracy", "top5"]
    assert measured["accuracy"] == np.mean([order[0] == y for order, y in zip(orders, labels, strict=True)])
    assert measured["top5"] == np.mean([y in order[:5] for order, y in zip(orders, labels, strict=True)])
    assert measured["loss"] == pytest.approx(make_loss("nll", F32)(scores, labels, 1 / len(labels)))
    assert count_above(scores, labels).tolist() == [o.index(y) for o, y in zip(orders, labels, strict=True)]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("cuts", [[], [3, 4, 30], [20]])
def test_the_largest_scores_are_those_of_a_sort_whoever_finds_them(cuts, dtype):
    """The largest are taken of all classes at once, or of several runs of classes in turn."""
    scores, _ = problem(40, levels=12)
    scores = scores.astype(dtype)
    scores[[5, 30], 0], scores[:, 1], scores[7, 2] = np.nan, -np.inf, np.inf
    expected = [sorted(range(40), key=lambda k: (-np.nan_to_num(column[k], nan=np.inf), k))[:5] for column in scores.T]
    parts = [largest(part, 5) for part in np.split(scores, cuts)]
    numbers = [first + positions for first, (_, positions) in zip([0, *cuts], parts, strict=True)]
    values, classes = largest(np.concatenate([part_values for part_values, _ in parts]), 5, np.concatenate(numbers))
    assert classes.T.tolist() == expected and values.dtype == dtype
    assert np.array_equal(values, np.take_along_axis(scores, np.array(expected).T, axis=0), equal_nan=True)
    assert largest(scores[:3], 5)[1].shape == (3, 200)


def test_five_classes_have_no_top_5():
    metric = Metric(make_loss("psl", F32), 5)
    assert metric.names == ("loss", "accuracy") and metric.zeros().shape == (3,)


def test_sums_over_samples_add_up_whoever_makes_them():
    scores, labels = problem(10)
    metric = Metric(make_loss("logistic", F32), 10)
    shares = [
        metric.sums(scores[:, samples], labels[samples]) for samples in (slice(0, 70), slice(70, 71), slice(71, 200))
    ]
    assert np.array_equal(sum(shares, metric.zeros())[1:], metric.sums(scores, labels)[1:])
    assert metric.scores(sum(shares))["loss"] == pytest.approx(metric.scores(metric.sums(scores, labels))["loss"])


def test_scores_that_are_no_numbers_are_never_among_the_best():
    scores, labels = np.tile(np.arange(7.0)[::-1, None], 2), np.array([0, 3])
    scores[0, 0] = scores[6, 1] = np.nan
    assert count_above(scores, labels).tolist() == [7, 4]
    assert not (count_above(np.full((7, 2), np.nan), np.array([0, 3])) < 5).any()


def test_the_line_of_an_epoch_shows_what_was_measured():
    row = {"epoch": 1, "step": 2, "train_loss": 0.5, "samples_per_second": 9.0, "bytes_sent": 0, "test_loss": 0.25}
    assert describe({**row, "test_accuracy": 0.625}, 3) == "epoch 1/3  loss 0.5  test loss 0.25  accuracy 62.50 %"
    line = describe({**row, "test_accuracy": 0.5, "test_top5": 0.75}, 3)
    assert line.endswith("test loss 0.25  accuracy 50.00 %  top 5 75.00 %")
    row = {"epoch": 1, "train_loss": 0.5, "validation_loss": 0.25, "validation_accuracy": 0.5}
    assert describe(row, 10) == "epoch  1/10  loss 0.5  validation loss 0.25  accuracy 50.00 %"
