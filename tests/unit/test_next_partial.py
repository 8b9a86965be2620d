"""Convex models that linearise the network alone: derivatives, closed forms, and solutions by their conditions."""

from types import SimpleNamespace

import numpy as np
import pytest

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.methods.next.convex import Terms, read_set
from psmpi.methods.next.partial import Inner, Jacobian, damped_solve
from psmpi.nn.losses import LOSSES
from psmpi.nn.model import Model
from psmpi.nn.network import build

FEATURES, CLASSES, SAMPLES = 4, 3, 7
IDS = np.arange(SAMPLES)
F64 = np.dtype(np.float64)


class Samples:
    """Samples in memory."""

    def __init__(self, x):
        self.x = x

    def batch(self, ids, out):
        return SimpleNamespace(inputs=np.ascontiguousarray(self.x[ids].T))


@pytest.fixture
def jacobian():
    rng = np.random.default_rng(5)
    layers = [{"type": "dense", "units": 5}, {"type": "tanh"}, {"type": "dense", "units": CLASSES}]
    network = build("small", (FEATURES,), layers, CLASSES)
    layout = network.layout()
    w = 0.5 * rng.normal(size=layout.size)
    model = Model(network, layout, w, np.zeros_like(w), NumpyOps())
    return Jacobian(model, Samples(rng.normal(size=(SAMPLES, FEATURES))), FEATURES)


def scores(jacobian, w):
    saved_w = jacobian.model.w.copy()
    jacobian.model.w[:] = w
    values = jacobian.model.forward(np.ascontiguousarray(jacobian.samples.x.T)).scores.copy()
    jacobian.model.w[:] = saved_w
    return values


def test_rows_are_the_derivatives_of_the_scores(jacobian):
    f, rows = jacobian.fill(IDS)
    w, rows = jacobian.model.w.copy(), rows.copy()
    np.testing.assert_allclose(f, scores(jacobian, w), rtol=0, atol=1e-14)
    for q in range(w.size):
        step = np.zeros(w.size)
        step[q] = 1e-6
        differences = (scores(jacobian, w + step) - scores(jacobian, w - step)).reshape(-1) / 2e-6
        np.testing.assert_allclose(rows[:, q], differences, rtol=0, atol=1e-8)


@pytest.mark.parametrize("n", [3, 30])
def test_both_systems_give_the_dense_solution(n):
    rng = np.random.default_rng(n)
    rows, v = rng.normal(size=(n, 12)), rng.normal(size=12)
    expected = np.linalg.solve(0.3 * rows.T @ rows + 0.7 * np.eye(12), v)
    np.testing.assert_allclose(damped_solve(rows, 0.3, 0.7, v), expected, rtol=1e-10)


def solved(jacobian, name, terms, blocks, cores=1, tau=0.5, scale=0.1):
    """Weights, solution, and the gradient of the model without its regularizer at the solution."""
    rng = np.random.default_rng(11)
    loss, labels = LOSSES[name](F64), rng.integers(CLASSES, size=SAMPLES)
    inner = Inner(jacobian, lambda: LOSSES[name](F64), terms, tau, blocks, cores)
    w, y = jacobian.model.w.copy(), rng.normal(size=jacobian.model.w.size)
    x = inner.solve(IDS, labels, scale, w, y)
    f, rows = (a.copy() for a in jacobian.fill(IDS))

    def value(d, at=None):
        moved = rows @ d if at is None else rows[:, at] @ d[at]
        return loss(f + moved.reshape(f.shape), labels, scale) + tau / 2 * d @ d

    def slope(function, d):
        steps = 1e-5 * np.eye(d.size)
        return np.array([(function(d + s) - function(d - s)) / 2e-5 for s in steps])

    correction = y - slope(value, np.zeros(w.size))
    gradient = np.zeros(w.size)
    for block in inner.blocks:
        block_slope = slope(lambda d, at=block: value(d, at), x - w)
        gradient[block] = block_slope[block] + correction[block]
    return w, x, gradient


@pytest.mark.parametrize("blocks", [1, 3, "all"])
@pytest.mark.parametrize("name", ["squared", "nll", "logistic", "psl"])
@pytest.mark.parametrize("regularizer", ["none", "l2", "l1"])
def test_solutions_meet_the_conditions_of_their_model(jacobian, name, regularizer, blocks):
    """Each block meets its conditions with the other blocks at the agent's weights."""
    blocks = jacobian.model.w.size if blocks == "all" else blocks
    terms = Terms(regularizer, 0.0 if regularizer == "none" else 0.3)
    _, x, slope = solved(jacobian, name, terms, blocks)
    if regularizer == "l1":
        assert np.count_nonzero(x == 0) > 1
        np.testing.assert_allclose(slope[x != 0], -0.3 * np.sign(x[x != 0]), rtol=0, atol=1e-6)
        assert (np.abs(slope[x == 0]) <= 0.3 + 1e-6).all()
    else:
        np.testing.assert_allclose(slope + 2 * terms.lam * x, 0, rtol=0, atol=1e-6)


def test_l1_of_the_squared_loss_meets_its_conditions_closely(jacobian):
    """The KKT residual is computed by dense algebra."""
    rng = np.random.default_rng(2)
    w, y = jacobian.model.w.copy(), rng.normal(size=jacobian.model.w.size)
    labels = rng.integers(CLASSES, size=SAMPLES)
    inner = Inner(jacobian, lambda: LOSSES["squared"](F64), Terms("l1", 0.3), 0.5, 1, 1)
    x = inner.solve(IDS, labels, 0.1, w, y)
    _, rows = jacobian.fill(IDS)
    slope = (0.2 * rows.T @ rows + 0.5 * np.eye(w.size)) @ (x - w) + y
    residual = np.where(x != 0, slope + 0.3 * np.sign(x), np.maximum(np.abs(slope) - 0.3, 0))
    assert np.abs(residual).max() <= 1e-10


@pytest.mark.parametrize("regularizer", ["none", "l2", "l1"])
def test_sets_hold(jacobian, regularizer):
    lam = 0.0 if regularizer == "none" else 0.1
    _, x, slope = solved(jacobian, "nll", Terms(regularizer, lam, "box", 0.5), 2)
    assert np.abs(x).max() <= 0.5
    edge = np.abs(x) == 0.5
    gradient = slope + (2 * lam * x if regularizer == "l2" else lam * np.sign(x))
    assert edge.any() and (gradient[edge] * x[edge] <= 1e-6).all()
    free = ~edge & (x != 0)
    np.testing.assert_allclose(gradient[free], 0, rtol=0, atol=1e-6)
    _, x, slope = solved(jacobian, "nll", Terms(regularizer, lam, "ball", 1.0), 1)
    assert np.linalg.norm(x) == pytest.approx(1.0)
    gradient = slope + (2 * lam * x if regularizer == "l2" else lam * np.sign(x))
    nonzero = x != 0
    # The gradient is along the normal of the ball, inwards.
    multiplier = gradient[nonzero] @ x[nonzero] / (x @ x)
    np.testing.assert_allclose(gradient[nonzero], multiplier * x[nonzero], rtol=0, atol=1e-6)
    assert multiplier <= 0


def test_cores_change_nothing(jacobian):
    serial, parallel = (solved(jacobian, "nll", Terms("l1", 0.1), 5, cores)[1] for cores in (1, 3))
    assert np.array_equal(serial, parallel)


@pytest.mark.parametrize("words", ["", "box", "ball:0", "box:nan", "box:inf", "cone:1", "ball:-2", "none:1"])
def test_a_set_that_is_none_is_an_error(words):
    with pytest.raises(UserError, match="expected none, box:B"):
        read_set(words)
