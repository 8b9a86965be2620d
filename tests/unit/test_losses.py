"""Losses against their definitions, finite differences and each other; behaviour at extreme margins."""

from math import exp, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_softmax

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.nn.losses import LOSSES, SUMS, Loss, make_loss
from psmpi.nn.model import Model
from psmpi.nn.objective import GRADIENT_LIMIT, Objective
from psmpi.nn.zoo import make_network
from psmpi.testing.losses import derivatives_match_differences, elements_add_up, loss_by_parts

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
PAIRWISE = [name for name, loss in LOSSES.items() if loss.pairwise]


def problem(classes=10, batch=16, seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    return spread * rng.normal(size=(classes, batch)), rng.integers(0, classes, batch)


class Given(Loss):
    """A loss with the derivatives `d`."""

    def __init__(self, d):
        super().__init__(F32)
        self.d = d

    def terms(self, scores, labels, scale, given, grad, rest, pairs):
        np.multiply(self.d, scale, out=grad)
        return 0.0


DEFINITIONS = {
    "psl": lambda c, y, k: np.exp(k * (c - c[y])).sum(),
    "logistic": lambda c, y, k: sum(np.log1p(np.exp(k * (c[j] - c[y]))) for j in range(len(c)) if j != y),
    "hinge": lambda c, y, k: sum(max(0.0, 1 + k * (c[j] - c[y])) for j in range(len(c)) if j != y),
    "nll": lambda c, y, k: -log_softmax(c)[y],
    "bce": lambda c, y, k: np.log1p(np.exp(c - log(len(c) - 1))).sum() - (c[y] - log(len(c) - 1)),
    "squared": lambda c, y, k: ((c - (np.arange(len(c)) == y)) ** 2).sum(),
}


@pytest.mark.parametrize("kappa", [1.0, 2.0])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_values_follow_the_definitions(name, kappa):
    scores, labels = problem()
    expected = sum(DEFINITIONS[name](scores[:, b], labels[b], kappa) for b in range(len(labels)))
    assert make_loss(name, F64, kappa=kappa)(scores, labels, 0.25) == pytest.approx(0.25 * expected, rel=1e-13)


@pytest.mark.parametrize("kappa", [1.0, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_match_central_differences(name, kappa):
    derivatives_match_differences(make_loss(name, F64, kappa=kappa), *problem(batch=4), 1e-8)


@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_psl_is_the_exponential_of_cross_entropy(kappa):
    scores, labels = problem(batch=50)
    psl, nll = make_loss("psl", F64, kappa=kappa), make_loss("nll", F64)
    for b in range(50):
        c, y = scores[:, b : b + 1], labels[b : b + 1]
        assert abs(log(psl(c, y, 1.0)) - nll(kappa * c, y, 1.0)) <= 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 1e-6)])
@pytest.mark.parametrize("name", PAIRWISE)
def test_element_losses_and_derivatives_sum_to_the_loss(name, dtype, tolerance):
    scores, labels = problem()
    elements_add_up(make_loss(name, dtype), scores.astype(dtype), labels, tolerance)


@pytest.mark.parametrize("spread", [2.0, 300.0])
@pytest.mark.parametrize("cuts", [(10,), (5, 5), (1, 9), (3, 0, 2, 5), (1,) * 10], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (F32, 1e-6)])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_cut_by_classes_is_the_loss_of_all_of_them(name, dtype, tolerance, cuts, spread):
    scores, labels = problem(batch=40, spread=spread)
    scores = scores.astype(dtype)
    kappa = {"kappa": 1.5} if "kappa" in LOSSES[name].settings else {}
    full_loss, grad = make_loss(name, dtype, **kappa), np.empty(scores.shape)
    value = full_loss(scores, labels, 0.5, grad)
    total, parts, clipped = loss_by_parts(name, dtype, scores, labels, cuts, **kappa)
    assert total == pytest.approx(value, rel=tolerance) and clipped == full_loss.clipped
    np.testing.assert_allclose(parts, grad, rtol=tolerance, atol=tolerance * abs(grad).max())


@pytest.mark.parametrize("name", PAIRWISE)
def test_elements_of_an_absent_class_are_exactly_zero(name):
    scores, _ = problem()
    labels = np.full(16, 3)
    pairs, grad = np.zeros((10, 10), bool), np.empty(scores.shape)
    pairs[1, 2] = pairs[2, 1] = True
    assert make_loss(name, F64)(scores, labels, 1.0, grad, pairs) == 0.0
    assert not grad.any()


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_samples_add_up_whatever_the_dtype_and_the_buffers_before(name, dtype):
    scores, labels = problem()
    scores = scores.astype(dtype)
    loss, grad = make_loss(name, dtype, kappa=2.0), np.empty(scores.shape)
    value = loss(scores, labels, 0.5, grad)
    assert value == pytest.approx(make_loss(name, F64, kappa=2.0)(scores.astype(F64), labels, 0.5), rel=1e-14)
    parts = [np.empty((10, 1)), np.empty((10, 15))]
    part_values = [
        loss(scores[:, samples], labels[samples], 0.5, part)
        for samples, part in zip((slice(0, 1), slice(1, 16)), parts, strict=True)
    ]
    assert sum(part_values) == pytest.approx(value, rel=1e-14)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), grad, rtol=1e-14)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("margin", [60.0, 1e3, 1e30])
def test_every_loss_is_finite_at_margins_of_both_signs(name, margin, dtype):
    for scores in ([[0.0], [margin]], [[margin], [0.0]]):
        grad = np.empty((2, 1))
        value = make_loss(name, dtype, kappa=2.0)(np.array(scores, dtype), np.array([0]), 1.0, grad)
        assert np.isfinite(value) and np.isfinite(grad).all()


# The functional of each name in SUMS: of the scores of one sample and the derivatives of the loss.
FUNCTIONALS = {
    "label": lambda c, y, d: c[y],
    "terms": lambda c, y, d: np.delete(d, y).sum(),
    "largest": lambda c, y, d: c.max(),
    "exponentials": lambda c, y, d: np.exp(c - c.max()).sum(),
}


def other_scores(loss, c, y, kept, rng):
    """Scores unlike c, but for the scores of the classes `kept` and the sums that the loss states."""

    def derivatives(c):
        grad = np.empty((len(c), 1))
        loss(c[:, None], np.array([y]), 1.0, grad)
        return grad[:, 0]

    def sums(c):
        return np.array([FUNCTIONALS[name](c, y, derivatives(c)) for name in loss.sums])

    def off(value):
        """The error of the sums with `value` as the solved score."""
        changed[solved] = value
        return (sums(changed) - target).sum()

    target, fixed = sums(c), {*kept, *([y] if "label" in loss.sums else []), c.argmax()}
    free = [k for k in range(len(c)) if k not in fixed]
    for _ in range(10_000):
        changed = c.copy()
        changed[free] = rng.uniform(c.min() - 1, c.max(), len(free))
        solved = free[0]
        if np.abs(sums(changed) - target).max(initial=0.0) > 0 and off(-50.0) * off(c.max()) < 0:
            changed[solved] = brentq(off, -50.0, c.max(), xtol=1e-14, rtol=1e-14)
        if np.abs(sums(changed) - target).max(initial=0.0) <= 1e-11 * np.abs(target).max(initial=1.0):
            assert np.abs(changed - c)[free].max() > 0.1
            return changed, derivatives(changed), derivatives(c)
    raise AssertionError("no such scores were found")


@pytest.mark.parametrize("name", LOSSES)
def test_a_derivative_follows_from_the_own_score_and_the_sums_that_the_loss_states(name):
    assert set(LOSSES[name].sums) <= FUNCTIONALS.keys() == SUMS.keys()
    loss, rng, y = make_loss(name, F64, kappa=1.5), np.random.default_rng(0), 2
    moved = 0.0
    for j in (0, 1, 5, y):
        for _ in range(5):
            c = rng.normal(size=8)
            _, changed_derivatives, derivatives = other_scores(loss, c, y, [j], rng)
            assert changed_derivatives[j] == pytest.approx(derivatives[j], rel=1e-9, abs=1e-11)
            c = rng.normal(size=8)
            free = [k for k in range(8) if k not in (j, y)]
            grads = np.empty((8, 2))
            pair = np.stack([c, c], axis=1)
            pair[free, 1] += 2 * rng.normal(size=len(free))
            loss(pair, np.array([y, y]), 1.0, grads)
            moved = max(moved, abs(grads[j, 0] - grads[j, 1]))
    # Without equal sums the derivative changes, unless the loss states no sums.
    assert (moved > 1e-3) == bool(LOSSES[name].sums)


def at_margin(margin, dtype):
    return np.array([[0.0], [margin]], dtype), np.array([0])


@given(st.floats(0, 2.0**127, width=32), st.sampled_from([1.0, 2.0]))
def test_psl_in_float32_is_finite_at_any_margin(margin, kappa):
    scores, labels = at_margin(margin, np.float32)
    grad = np.empty((2, 1))
    value = make_loss("psl", F32, kappa=kappa)(scores, labels, 1.0, grad)
    assert np.isfinite(value) and np.isfinite(grad).all()


@given(st.floats(-1e308, 1e308))
def test_psl_in_float64_is_finite_at_any_margin(margin):
    scores, labels = at_margin(margin, np.float64)
    grad = np.empty((2, 1))
    assert np.isfinite(make_loss("psl", F64)(scores, labels, 1.0, grad)) and np.isfinite(grad).all()


@pytest.mark.parametrize("kappa", [1.0, 2.0, 1e3])
@pytest.mark.parametrize("margin", [600.0, 709.6, 1000.0, 1e100])
def test_psl_in_float64_has_finite_sums_over_classes_and_samples(margin, kappa):
    scores = np.full((1000, 50), margin)
    scores[0], labels = 0, np.zeros(50, int)
    grad = np.empty_like(scores)
    assert np.isfinite(make_loss("psl", F64, kappa=kappa)(scores, labels, 0.02, grad)) and np.isfinite(grad).all()
    assert abs(grad.sum(axis=0)).max() <= 1e-9 * abs(grad).max()


def test_terms_of_other_workers_pairs_are_neither_counted_nor_looked_at():
    scores, labels = np.array([[0.0], [500.0], [90.0]], np.float32), np.array([0])
    pairs = np.zeros((3, 3), bool)
    pairs[0, 2] = pairs[2, 0] = True
    loss = make_loss("psl", F32, exp_clip="80")
    grad = np.empty((3, 1))
    assert loss(scores, labels, 1.0, grad, pairs) == pytest.approx(exp(80) * 11) and loss.clipped == 1
    assert grad[:, 0] == pytest.approx([-exp(80), 0, exp(80)])
    pairs[0, 2] = pairs[2, 0] = False
    assert make_loss("psl", F32, exp_clip="off")(scores, labels, 1.0, grad, pairs) == 0.0


def test_psl_is_exact_up_to_the_largest_float32_and_goes_on_as_its_tangent():
    top = log(np.finfo(np.float32).max)
    for margin in (0.0, 20.0, 80.0, 88.0, 88.7):
        scores, labels = at_margin(margin, np.float32)
        loss, grad = make_loss("psl", F32), np.empty((2, 1))
        exact = exp(float(scores[1, 0]))
        assert loss(scores, labels, 1.0, grad) == pytest.approx(1 + exact, rel=1e-14)
        assert grad[:, 0] == pytest.approx([-exact, exact], rel=1e-14)
        assert loss.clipped == 0
    scores, labels = at_margin(100.0, np.float32)
    loss, grad = make_loss("psl", F32, kappa=2.0), np.empty((2, 1))
    assert loss(scores, labels, 1.0, grad) == pytest.approx(exp(top) * (1 + 200 - top), rel=1e-12)
    assert grad[1, 0] == pytest.approx(2 * exp(top), rel=1e-12)
    assert loss.clipped == 1


def test_clipped_terms_are_counted_and_refused_when_clipping_is_off():
    scores = np.array([[0.0, 0, 0], [100, 0, 0], [100, 100, -100]], np.float32)
    labels = np.array([0, 0, 0])
    loss = make_loss("psl", F32, kappa=2.0, exp_clip="80")
    assert np.isfinite(loss(scores, labels, 1.0)) and loss.clipped == 3
    with pytest.raises(FloatingPointError, match="--exp-clip is off"):
        make_loss("psl", F32, kappa=2.0, exp_clip="off")(scores, labels, 1.0)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_hopeless_where_its_scores_are_a_million_steps_away(name, kappa, classes):
    """A step is as long as the largest derivative, for any kappa and number of classes; psl is on its tangent."""
    diverged = []
    for distance in (1e5, 1e7):
        if name == "psl":
            distance /= min(1, kappa)
        # All other scores are above the label's score.
        scores, labels = np.full((classes, 1), distance), np.array([0])
        scores[0] = 0
        loss, grad = make_loss(name, F32, kappa=kappa), np.empty((classes, 1))
        mean = loss(scores, labels, 1.0, grad)
        diverged.append(loss.diverged(mean, 0.0, classes - 1))
        # The other losses are linear at this distance.
        assert name in ("squared", "psl") or mean == pytest.approx(distance * grad[1:].sum(), rel=0.02)
    assert diverged == [name == "squared", True]


def test_values_to_learn_are_hopeless_beside_their_own_size():
    loss = make_loss("squared", F32, task="regression")
    assert [loss.diverged(mean, 0.0, 1e18) for mean in (1e23, 1e25)] == [False, True]
    # Weights are drawn for outputs of about 1.
    assert [loss.diverged(mean, 0.0, 1e-6) for mean in (1e5, 1e7)] == [False, True]


def test_scores_that_are_not_numbers_are_an_error():
    scores, labels = at_margin(np.nan, np.float32)
    with pytest.raises(FloatingPointError, match="diverged"):
        make_loss("psl", F32)(scores, labels, 1.0)


@given(st.floats(-(2.0**127), 2.0**127, width=32))
def test_logistic_is_finite_with_bounded_derivatives_at_any_margin(margin):
    scores, labels = at_margin(margin, np.float32)
    grad = np.empty((2, 1))
    assert np.isfinite(make_loss("logistic", F32)(scores, labels, 1.0, grad))
    assert np.abs(grad).max() <= 1


@pytest.mark.parametrize("size", [1.0, 2.0**30, 1e30, 3e38])
def test_the_backward_pass_stays_finite_for_huge_derivatives(size):
    network = make_network("psnet", (1, 8, 8), 10)
    layout = network.layout()
    rng = np.random.default_rng(0)
    w = rng.normal(size=layout.size).astype(np.float32)
    x, d = rng.normal(size=(64, 5)).astype(np.float32), rng.normal(size=(10, 5))
    gradients = []
    for scale in (1.0, size):
        model = Model(network, layout, w, np.empty_like(w), NumpyOps())
        objective = Objective(Given(d), model)
        objective.reserve(10, 5)
        tape = model.forward(x)
        objective.derive(tape, tape.scores, np.zeros(5, int), scale)
        gradients.append(model.g.astype(float))
    limit = GRADIENT_LIMIT[F32]
    np.testing.assert_allclose(gradients[1], np.clip(gradients[0] * size, -limit, limit), rtol=1e-4, atol=1e-6 * size)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "absent"}, f"choose one of {', '.join(LOSSES)}"),
        ({"name": "psl", "kappa": 0.0}, "above 0"),
        ({"name": "psl", "exp_clip": "89"}, "from 0 to 88.7"),
        ({"name": "psl", "exp_clip": "never"}, "auto, off"),
    ],
)
def test_wrong_settings_say_what_is_right(settings, says):
    settings = dict(settings)
    with pytest.raises(UserError, match=says):
        make_loss(settings.pop("name"), F32, **settings)
