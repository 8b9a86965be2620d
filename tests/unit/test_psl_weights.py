"""psl with samples weighted by their loss: against cross-entropy, logistic losses and finite differences."""

from itertools import pairwise

import numpy as np
import pytest

from psmpi.backend import NumpyOps
from psmpi.nn.losses import make_loss

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def problem(classes=10, batch=16, spread=2.0):
    rng = np.random.default_rng(0)
    return spread * rng.normal(size=(classes, batch)), rng.integers(0, classes, batch)


def by_parts(scores, labels, cuts, scale=0.5, divisors=None, **settings):
    """Value and derivatives of psl on ranks with cuts[k] classes each, which exchange sums."""
    spans = [slice(a, b) for a, b in pairwise(np.cumsum([0, *cuts]).tolist())]
    losses = [make_loss("psl", F64, **settings) for _ in cuts]
    label = sum(loss.summarize(scores[span], labels - span.start) for loss, span in zip(losses, spans, strict=True))
    value, grad, rests = 0.0, np.full(scores.shape, np.nan), np.zeros((len(cuts), len(labels)))
    for loss, span, rest in zip(losses, spans, rests, strict=True):
        loss.divisors = divisors
        value += loss.terms(scores[span], labels - span.start, scale, label, grad[span], rest)
    for loss, span in zip(losses, spans, strict=True):
        value += loss.close(grad[span], labels - span.start, rests.sum(axis=0), scale)
    return value, grad


@pytest.mark.parametrize("spread", [2.0, 60.0])
@pytest.mark.parametrize("cuts", [(10,), (3, 0, 2, 5), (1,) * 10], ids=str)
@pytest.mark.parametrize("kappa", [1.0, 1.5])
def test_psl_divided_by_this_steps_sum_is_cross_entropy(kappa, cuts, spread):
    scores, labels = problem(batch=40, spread=spread)
    psl, nll = make_loss("psl", F64, kappa=kappa, weights="current"), make_loss("nll", F64)
    full_grad, expected = np.empty(scores.shape), np.empty(scores.shape)
    value = nll(kappa * scores, labels, 0.5, expected)
    expected *= kappa
    assert psl(scores, labels, 0.5) == pytest.approx(value, rel=1e-13)
    assert psl(scores, labels, 0.5, full_grad) == pytest.approx(value, rel=1e-13)
    parts_value, parts = by_parts(scores, labels, cuts, kappa=kappa, weights="current")
    assert parts_value == pytest.approx(value, rel=1e-13)
    for grad in (full_grad, parts):
        np.testing.assert_allclose(grad, expected, rtol=1e-12, atol=1e-12)


def weighed(scores, labels, divisors, pairs=None, kappa=1.5):
    """Value, derivatives and sums of psl with remembered divisors of the samples, and the loss object."""
    loss, grad = make_loss("psl", F64, kappa=kappa, weights="remembered"), np.empty(scores.shape)
    loss.divisors = divisors
    return loss(scores, labels, 0.5, grad, pairs), grad, loss.rests, loss


def test_psl_divided_by_what_is_remembered_lies_between_logistic_and_cross_entropy():
    scores, labels = problem(batch=40)
    expected = np.empty(scores.shape)
    value = make_loss("logistic", F64, kappa=1.5)(scores, labels, 0.5, expected)
    weighed_value, grad, sums, _ = weighed(scores, labels, None)
    assert weighed_value == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(grad, expected, rtol=1e-12, atol=1e-14)
    # With the sums of the same scores as divisors the loss is cross-entropy.
    value = make_loss("nll", F64)(1.5 * scores, labels, 0.5, expected)
    weighed_value, grad, second_sums, _ = weighed(scores, labels, 1 + sums)
    assert weighed_value == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(grad, 1.5 * expected, rtol=1e-12, atol=1e-14)
    assert np.array_equal(second_sums, sums)
    margins = 1.5 * (scores - np.take_along_axis(scores, labels[None], axis=0))
    np.testing.assert_allclose(1 + sums, np.exp(margins).sum(axis=0), rtol=1e-13)
    # With other divisors the loss is above cross-entropy.
    for factor in (0.05, 0.3, 3.0, 20.0):
        assert weighed(scores, labels, np.maximum(1, factor * (1 + sums)))[0] > value


def test_derivatives_of_remembered_psl_match_central_differences_of_its_value():
    scores, labels = problem(batch=5)
    r, h = np.array([1.0, 1.5, 4.0, 30.0, 2000.0]), 1e-6
    _, grad, *_ = weighed(scores, labels, r)
    for index in np.ndindex(scores.shape):
        moved = scores.copy()
        moved[index] += h
        above = weighed(moved, labels, r)[0]
        moved[index] -= 2 * h
        assert abs((above - weighed(moved, labels, r)[0]) / (2 * h) - grad[index]) <= 1e-8


@pytest.mark.parametrize("cuts", [(5, 5), (3, 0, 2, 5), (1,) * 10], ids=str)
def test_remembered_psl_adds_up_over_classes_and_over_pairs(cuts):
    scores, labels = problem(batch=40)
    r = np.random.default_rng(1).uniform(1, 30, 40)
    value, grad, sums, loss = weighed(scores, labels, r)
    parts_value, parts = by_parts(scores, labels, cuts, divisors=r, kappa=1.5, weights="remembered")
    assert parts_value == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(parts, grad, rtol=1e-12, atol=1e-13)
    total, summed, shares = 0.5 * loss.constants(r, 40), np.zeros_like(grad), np.zeros(40)
    first = np.cumsum([0, *cuts])
    for a, b in pairwise(first.tolist()):
        pairs = np.zeros((10, 10), bool)
        for i in range(a, b):
            pairs[i, i + 1 :] = pairs[i + 1 :, i] = True
        part, derivatives, share, _ = weighed(scores, labels, r, pairs)
        total, summed, shares = total + part, summed + derivatives, shares + share
    assert total == pytest.approx(value, rel=1e-13)
    np.testing.assert_allclose(summed, grad, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(shares, sums, rtol=1e-13)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("weights", ["remembered", "current"])
@pytest.mark.parametrize("margin", [60.0, 1e3, 1e30])
def test_derivatives_of_weighed_samples_are_bounded_at_any_margin(margin, weights, dtype):
    for scores in ([[0.0], [margin], [margin]], [[margin], [0.0], [0.0]]):
        for r in (1.0, 1e30):
            loss, grad = make_loss("psl", dtype, kappa=2.0, weights=weights), np.empty((3, 1))
            loss.divisors = np.full(1, r)
            c, y = np.array(scores, dtype), np.array([0])
            value = loss(c, y, 1.0, grad)
            assert np.isfinite(value) and np.abs(grad).max() <= 4 and np.isfinite(loss(c, y, 1.0))
            assert weights == "remembered" or np.abs(grad).max() <= 2


def test_a_device_leaves_weighed_samples_to_its_host():
    class Device(NumpyOps):
        def fused(self, name):
            return print

    assert make_loss("psl", F32).fused(Device()) is not None
    assert [make_loss("psl", F32, weights=weights).fused(Device()) for weights in ("remembered", "current")] == [
        None,
        None,
    ]


def test_weighed_samples_are_hopeless_where_many_terms_are_beyond_what_float64_holds():
    for weights in ("remembered", "current"):
        loss = make_loss("psl", F32, weights=weights)
        assert loss.tangent == make_loss("psl", F64).tangent
        assert [loss.diverged(650.0, share, 9.0) for share in (0.1, 0.3)] == [False, True]
