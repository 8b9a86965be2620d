"""Element quasi-Newton operators against dense matrices built pair after pair, and their safeguards."""

import numpy as np
import pytest

from psmpi.backend import make_backend
from psmpi.errors import UserError
from psmpi.optim.curvature import RULES, ElementOperators, Outcome
from psmpi.optim.curvature.operators import FLAT
from psmpi.optim.curvature.recursion import OMEGA

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
OPS = make_backend("auto")
SECANT = {(F64, False): 1e-10, (F64, True): 1e-10, (F32, False): 1e-6, (F32, True): 5e-3}


def quadratics(count, n, rng, definite):
    """Symmetric matrices (count, n, n), positive definite of condition number about 50 where `definite`."""
    blocks = []
    for k in range(count):
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        values = np.geomspace(0.1, 5, n)
        blocks.append(q * np.where(definite[k], values, values * rng.choice([-1, 1], n)) @ q.T)
    return np.stack(blocks)


def dense(pairs, sigma, indefinite):
    """Apply the update formulas to sigma I."""
    b = sigma * np.eye(len(pairs[0][0]))
    for s, y in pairs:
        if indefinite:
            r = y - b @ s
            b = b + np.outer(r, r) / (s @ r)
        else:
            bs = b @ s
            b = b - np.outer(bs, bs) / (s @ bs) + np.outer(y, y) / (s @ y)
    return b


def matrices(op):
    """The matrices that `product` multiplies by, (count, size, size)."""
    columns, out = [], np.empty((op.count, op.size), op.dtype)
    for k in range(op.size):
        v = np.zeros_like(out)
        v[:, k] = 1
        op.product(v, out)
        columns.append(out.copy())
    return np.stack(columns, axis=2)


def stored(op, e):
    order = [k for k in np.argsort(op.stamps[e]) if op.stamps[e, k] >= 0]
    return [(op.pairs[e, k].astype(np.float64), op.pairs[e, op.memory + k].astype(np.float64)) for k in order]


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_operators_are_the_dense_recursion_and_satisfy_the_secant_equation(rule, dtype):
    rng, count, n = np.random.default_rng(0), 7, 30
    definite = np.array([rule == "plbfgs" or k % 2 == 0 for k in range(count)])
    a = quadratics(count, n, rng, definite)
    op = ElementOperators(count, n, dtype, rule, OPS)
    updates = 0
    for _ in range(50):
        s = rng.standard_normal((count, n)).astype(dtype)
        y = np.einsum("eij,ej->ei", a, s).astype(dtype)
        old_product, out = np.empty_like(s), np.empty_like(s)
        op.product(s, old_product)
        outcome = op.push(s, y, np.ones(count, bool))
        op.product(s, out)
        for e in np.flatnonzero(outcome == Outcome.UPDATED):
            updates += 1
            # The new product cancels the old one, so its rounding error is relative to their size.
            size = max(np.linalg.norm(y[e]), np.linalg.norm(old_product[e]) if dtype == F32 else 0)
            if dtype == F32 and not op.indefinite[e]:
                # Pairs at nearly right angles make large terms that cancel: rounding grows by as much.
                size *= max(np.linalg.norm(u) * np.linalg.norm(v) / (u @ v) for u, v in stored(op, e))
            assert np.linalg.norm(out[e] - y[e]) <= SECANT[dtype, bool(op.indefinite[e])] * size
        if dtype == F64:
            for e, b in enumerate(matrices(op)):
                expected = dense(stored(op, e), op.sigma[e], op.indefinite[e])
                if not op.indefinite[e]:
                    assert np.linalg.norm(b - expected) <= 1e-12 * np.linalg.norm(expected)
                    assert np.linalg.eigvalsh(b).min() > 0
                else:
                    # The formulas in long double bound the accuracy of a float64 recursion.
                    wide = [(s.astype(np.longdouble), y.astype(np.longdouble)) for s, y in stored(op, e)]
                    exact = dense(wide, np.longdouble(op.sigma[e]), True).astype(np.float64)
                    reach = np.linalg.norm(expected - exact) / np.linalg.norm(exact)
                    assert np.linalg.norm(b - exact) <= max(1e-12, 10 * reach) * np.linalg.norm(exact)
                assert abs(b - b.T).max() <= 1e-12 * abs(b).max()
    assert updates >= 40 * count


def test_sr1_recovers_an_indefinite_hessian():
    rng, n = np.random.default_rng(3), 8
    a = quadratics(4, n, rng, np.zeros(4, bool))
    op = ElementOperators(4, n, F64, "plsr1", OPS, memory=n)
    for _ in range(n):
        s = rng.standard_normal((4, n))
        assert (op.push(s, np.einsum("eij,ej->ei", a, s), np.ones(4, bool)) == Outcome.UPDATED).all()
    assert abs(matrices(op) - a).max() <= 1e-10 * abs(a).max()


@pytest.mark.parametrize("name", ["plsr1", "plse"])
def test_a_matrix_that_says_all_is_not_reset_by_pairs_that_it_fits(name):
    """Twelve more pairs of the same concave quadratic change no bit of the matrix and count no failure."""
    n = 6
    a = -np.diag(np.linspace(1.0, 3.0, n))[None]
    op, rng = ElementOperators(1, n, F64, name, OPS, memory=n), np.random.default_rng(8)
    for k in range(n):
        s = np.eye(n)[k : k + 1]
        assert op.push(s, np.einsum("eij,ej->ei", a, s), np.ones(1, bool))[0] == Outcome.UPDATED
    before = matrices(op)
    assert np.linalg.norm(before - a) <= 1e-12
    for _ in range(12):
        s = rng.standard_normal((1, n))
        assert op.push(s, np.einsum("eij,ej->ei", a, s), np.ones(1, bool))[0] == Outcome.SKIPPED
    assert np.array_equal(matrices(op), before) and op.failures[0] == 0


@pytest.mark.parametrize("rule", RULES)
def test_every_element_is_alone(rule):
    """Pushes to some elements give each of them the matrix that it would have without the other elements."""
    rng, count, n = np.random.default_rng(4), 5, 12
    a = quadratics(count, n, rng, np.array([True, False, True, False, True]))
    together = ElementOperators(count, n, F64, rule, OPS, memory=3)
    single_operators = [ElementOperators(1, n, F64, rule, OPS, memory=3) for _ in range(count)]
    for _ in range(20):
        s, pushed = rng.standard_normal((count, n)), rng.random(count) < 0.6
        y = np.einsum("eij,ej->ei", a, s)
        outcome = together.push(s, y, pushed)
        for e in range(count):
            assert single_operators[e].push(s[e : e + 1], y[e : e + 1], pushed[e : e + 1])[0] == outcome[e]
    expected = np.concatenate([matrices(op) for op in single_operators])
    assert np.linalg.norm(matrices(together) - expected) <= 1e-12 * np.linalg.norm(expected)


def test_a_bad_pair_leaves_plbfgs_as_it_is_and_the_fifth_resets_it():
    rng, n = np.random.default_rng(5), 10
    op = ElementOperators(2, n, F64, "plbfgs", OPS)
    s = rng.standard_normal((2, n))
    op.push(s, 3 * s, np.ones(2, bool))
    before = matrices(op)
    for k in range(1, 6):
        outcome = op.push(s, -s, np.array([True, False]))
        assert outcome.tolist() == [Outcome.REJECTED if k < 5 else Outcome.RESET, Outcome.SKIPPED]
        assert np.array_equal(matrices(op)[0], before[0] if k < 5 else np.eye(n))
        assert op.failures.tolist() == [k % 5, 0] and np.array_equal(matrices(op)[1], before[1])
    # An update in between starts the count again.
    for curvature in (-1, -1, -1, -1, 2, -1, -1, -1, -1):
        assert op.push(s, curvature * s, np.array([True, False]))[0] in (Outcome.REJECTED, Outcome.UPDATED)


@pytest.mark.parametrize("rule", RULES)
def test_absent_classes_zero_steps_and_numbers_that_are_not_finite(rule):
    rng, n = np.random.default_rng(6), 10
    op = ElementOperators(3, n, F64, rule, OPS)
    s = rng.standard_normal((3, n))
    op.push(s, 2 * s + 0.1 * np.roll(s, 1, axis=1), np.ones(3, bool))
    before, failures = matrices(op), op.failures.copy()
    assert (op.push(s, np.zeros_like(s), np.zeros(3, bool)) == Outcome.SKIPPED).all()
    assert (op.push(np.zeros_like(s), s, np.ones(3, bool)) == Outcome.SKIPPED).all()
    assert np.array_equal(matrices(op), before) and np.array_equal(op.failures, failures)
    y = s.copy()
    y[0, 0], y[1, 3] = np.nan, np.inf
    outcome = op.push(s, y, np.array([True, True, False]))
    assert outcome.tolist() == [Outcome.REJECTED, Outcome.REJECTED, Outcome.SKIPPED]
    assert np.array_equal(matrices(op), before) and op.failures.tolist() == [1, 1, 0]


def test_a_pair_of_negative_curvature_makes_at_most_that_many_negative_eigenvalues():
    """With s^T y / y^T y as the scale, all but one eigenvalue of the element would be negative."""
    rng, n = np.random.default_rng(7), 30
    op = ElementOperators(1, n, F64, "plsr1", OPS)
    for count in range(1, 4):
        s = rng.standard_normal((1, n))
        y = -s + 0.1 * rng.standard_normal((1, n))
        assert op.push(s, y, np.ones(1, bool))[0] == Outcome.UPDATED
        assert op.sigma[0] == 1 and (np.linalg.eigvalsh(matrices(op)[0]) < 0).sum() <= count


def test_plse_changes_its_operator_with_the_curvature():
    rng, n = np.random.default_rng(8), 10
    op = ElementOperators(1, n, F64, "plse", OPS)
    s = rng.standard_normal((3, 1, n))
    pushed = np.ones(1, bool)
    op.push(s[0], 2 * s[0], pushed)
    assert not op.indefinite[0]
    op.push(s[1], -s[1], pushed)
    assert op.indefinite[0] and (op.stamps >= 0).sum() == 1
    op.push(s[2], 3 * s[2], pushed)
    assert not op.indefinite[0] and (op.stamps >= 0).sum() == 1
    assert abs(matrices(op)[0] - dense([(s[2, 0], 3 * s[2, 0])], op.sigma[0], False)).max() <= 1e-14


def test_an_older_pair_that_no_longer_fits_is_dropped():
    """With the scale 2 of the second pair, s_1^T (y_1 - 2 s_1) = 0."""
    e = np.eye(6)[:, None]
    op = ElementOperators(1, 6, F64, "plsr1", OPS)
    pushed = np.ones(1, bool)
    assert op.push(e[0], 2 * e[0] + e[2], pushed)[0] == Outcome.UPDATED and op.sigma[0] == 2.5
    assert op.push(e[1], e[1] + e[3], pushed)[0] == Outcome.UPDATED and op.sigma[0] == 2
    assert (op.stamps >= 0).sum() == 1
    assert abs(matrices(op)[0] - dense([(e[1, 0], (e[1] + e[3])[0])], 2.0, True)).max() <= 1e-14
    # The newest pair must fit; y = c s does not fit the scale c that it brings.
    before = matrices(op)
    assert op.push(e[4], 3 * e[4], pushed)[0] == Outcome.REJECTED and np.array_equal(matrices(op), before)


def test_the_relative_test_does_not_depend_on_scale():
    rng, n = np.random.default_rng(9), 10
    s = 1e-6 * rng.standard_normal((1, n))
    absolute, relative = (ElementOperators(1, n, F32, "plbfgs", OPS, relative=r) for r in (False, True))
    pair = s.astype(np.float32), (1e-6 * s).astype(np.float32)
    assert absolute.push(*pair, np.ones(1, bool))[0] == Outcome.REJECTED
    assert relative.push(*pair, np.ones(1, bool))[0] == Outcome.UPDATED
    assert FLAT == 1e-8 and OMEGA == 1e-6


def test_the_identity_can_stay_the_first_matrix():
    """The matrices are those of dense updates from I."""
    rng, n = np.random.default_rng(9), 20
    a = quadratics(2, n, rng, np.ones(2, bool))
    op = ElementOperators(2, n, F64, "plbfgs", OPS, rescaled=False)
    for _ in range(8):
        s = rng.standard_normal((2, n))
        op.push(s, np.einsum("eij,ej->ei", a, s), np.ones(2, bool))
    assert (op.sigma == 1).all()
    for e, b in enumerate(matrices(op)):
        assert np.linalg.norm(b - dense(stored(op, e), 1.0, False)) <= 1e-12 * np.linalg.norm(b)


def test_damping_keeps_pairs_of_negative_curvature_useful():
    rng, n = np.random.default_rng(10), 10
    op = ElementOperators(1, n, F64, "plbfgs", OPS, damping=True)
    s = rng.standard_normal((1, n))
    assert op.push(s, -s, np.ones(1, bool))[0] == Outcome.UPDATED
    b = matrices(op)[0]
    assert np.linalg.eigvalsh(b).min() > 0
    # The damped pair has s^T y = (1 - 0.99) s^T B s.
    assert (s @ b @ s.T)[0, 0] == pytest.approx(0.01 * (s @ s.T)[0, 0])


def test_padding_changes_nothing():
    rng, n = np.random.default_rng(11), 9
    a = quadratics(1, n, rng, np.ones(1, bool))[0]
    narrow, wide = ElementOperators(1, n, F64, "plse", OPS), ElementOperators(1, n + 4, F64, "plse", OPS)
    for _ in range(8):
        s = rng.standard_normal((1, n))
        pair = s, s @ a
        narrow.push(*pair, np.ones(1, bool))
        wide.push(*(np.pad(v, ((0, 0), (0, 4))) for v in pair), np.ones(1, bool))
    b = matrices(wide)[0]
    assert abs(b[:n, :n] - matrices(narrow)[0]).max() <= 1e-12 * abs(b).max()
    assert np.array_equal(b[n:, :n], np.zeros((4, n)))


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="element update 'bfgs' is unknown"):
        ElementOperators(1, 3, F64, "bfgs", OPS)
    with pytest.raises(UserError, match="--memory 0"):
        ElementOperators(1, 3, F64, "plse", OPS, memory=0)
