"""Partitioned quasi-Newton steps on functions that are sums of small ones, against SciPy and dense linear algebra."""

from functools import partial

import numpy as np
import pytest
from scipy.optimize import minimize, rosen, rosen_der

from psmpi.backend import make_backend
from psmpi.optim import Hyper, make_optimizer
from psmpi.optim.curvature import RULES, ElementOperators, curvature_ops
from psmpi.optim.globalization import SMALLEST, TrustRegion, armijo
from psmpi.optim.truncated_cg import truncated_cg

F64 = np.dtype(np.float64)


def partitioned(element, runs, start, rule, steps, *, search, done, memory=5):
    """Minimise sum_e f_e(U_e x) on one rank: (x, steps taken). element(v) -> values (e,), gradients (e, n_e)."""
    ops, width = make_backend("auto"), runs[0][1] - runs[0][0]
    restriction = curvature_ops(ops).restriction([[run] for run in runs], width)
    operators = ElementOperators(len(runs), width, F64, rule, ops, memory=memory, relative=True)
    x, region = start.copy(), TrustRegion()
    step, g, work = np.empty_like(x), np.empty_like(x), np.empty((3, len(x)))
    v, s = (np.zeros((len(runs), width)) for _ in range(2))

    def evaluate(point):
        restriction.restrict(point, v)
        return element(v)

    def value(x, step, length):
        return evaluate(x + length * step)[0].sum()

    for taken in range(steps):
        values, old_gradients = evaluate(x)
        restriction.accumulate(old_gradients, g)
        if done(g):
            return x, taken
        cg_step = truncated_cg(
            g, step, lambda p, q: operators.restricted_product(restriction, p, q), lambda a: None, lambda sums: sums,
            work, radius=np.inf if search else region.radius, rtol=1e-10, itmax=4 * len(x),
        )  # fmt: skip
        start_value = values.sum()
        if search:
            searched = armijo(partial(value, x, step), start_value, cg_step.slope, extend=False)
            length = searched[0] if searched else 0.0
        else:
            decrease = -(cg_step.slope + cg_step.curvature / 2)
            length = float(region.judge(start_value, value(x, step, 1.0), decrease, cg_step.length))
        if length:
            x += length * step
            restriction.restrict(length * step, s)
            operators.push(s, evaluate(x)[1] - old_gradients, np.ones(len(runs), bool))
    return x, steps


@pytest.mark.parametrize("search", [True, False], ids=["line search", "trust region"])
@pytest.mark.parametrize("rule", RULES)
def test_a_convex_quadratic_is_solved_in_at_most_n_steps(rule, search):
    """The matrix of an element of 4 variables is learnt in 4 steps, for any number of overlapping elements."""
    n, width = 60, 4
    rng = np.random.default_rng(0)
    runs = [(k, k + width) for k in range(0, n - width + 1, 2)]
    a = np.stack([np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in runs])
    a = np.einsum("eij,j,ekj->eik", a, np.array([0.3, 1.0, 2.0, 5.0]), a)
    b = rng.standard_normal((len(runs), width))
    dense, rhs = np.zeros((n, n)), np.zeros(n)
    for (i, j), matrix, vector in zip(runs, a, b, strict=True):
        dense[i:j, i:j] += matrix
        rhs[i:j] += vector

    def element(v):
        av = np.einsum("eij,ej->ei", a, v)
        return (v * (av / 2 - b)).sum(axis=1), av - b

    x, taken = partitioned(
        element, runs, np.zeros(n), rule, n, search=search, done=lambda g: np.linalg.norm(g) <= 1e-10
    )
    solution = np.linalg.solve(dense, rhs)
    assert taken < n and np.linalg.norm(x - solution) <= 1e-8 * np.linalg.norm(solution)


def rosenbrock(v):
    left, right = v[:, 0], v[:, 1]
    bend = right - left**2
    return 100 * bend**2 + (1 - left) ** 2, np.stack([-400 * left * bend - 2 * (1 - left), 200 * bend], axis=1)


@pytest.mark.parametrize(
    ("rule", "search", "n"),
    [
        pytest.param(*each, n, marks=[pytest.mark.slow] * (n == 100 and each[0] != "plsr1"))
        for each in (("plbfgs", True), ("plse", True), ("plbfgs", False), ("plsr1", False), ("plse", False))
        for n in (10, 100)
    ],
)
def test_the_chained_rosenbrock_function_has_the_minimiser_that_scipy_finds(rule, search, n):
    # From the usual start some methods find the other local minimiser, others this one.
    start = np.tile([0.3, 0.6], n // 2)
    runs = [(k, k + 2) for k in range(n - 1)]
    # A region of the smallest radius lets a gradient be that radius times the largest curvature, here about 1,000:
    # steps along it are rejected where the model is wrong, and a rejected step mends no model.
    tolerance = 1e-8 if search else 1e3 * SMALLEST
    x, taken = partitioned(
        rosenbrock, runs, start, rule, 2000, search=search, done=lambda g: np.linalg.norm(g) <= tolerance
    )
    expected = minimize(rosen, start, jac=rosen_der, method="L-BFGS-B", options={"maxiter": 5000, "gtol": 1e-10})
    assert taken < 2000 and rosen(x) <= rosen(expected.x) + 1e-10
    assert np.linalg.norm(x - 1) <= 1e-6 and np.linalg.norm(expected.x - 1) <= 1e-4


def unpartitioned(name, objective, start, steps, hyper):
    """Step an optimizer of the whole vector until the gradient vanishes: (x, steps taken, optimizer)."""
    optimizer, w, g = make_optimizer(name, len(start), F64, hyper), start.copy(), np.zeros_like(start)
    for taken in range(steps):

        def closure():
            value, g[:] = objective(w)
            return value

        if np.linalg.norm(objective(w)[1]) <= 1e-8:
            return w, taken, optimizer
        optimizer.step(w, g, 1.0, lambda sums: sums, closure)
    return w, steps, optimizer


@pytest.mark.parametrize("name", ["lbfgs-tr", "lsr1-tr"])
def test_whole_vectors_in_a_trust_region_find_what_scipy_finds(name):
    start = np.tile([-1.2, 1.0], 5)
    x, taken, _ = unpartitioned(name, lambda w: (rosen(w), rosen_der(w)), start, 1000, Hyper())
    assert taken < 1000
    expected = minimize(rosen, start, jac=rosen_der, method="L-BFGS-B", options={"gtol": 1e-10})
    assert np.linalg.norm(x - expected.x) <= 1e-4


def test_sr1_on_the_whole_vector_learns_an_indefinite_matrix():
    """With as many pairs as variables SR1 learns the matrix of the quadratic; L-BFGS keeps a definite matrix."""
    n = 6
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    a = (q * np.array([-1.0, 0.5, 1, 2, 3, 4])) @ q.T
    for name in ("lsr1-tr", "lbfgs-tr"):
        _, _, optimizer = unpartitioned(name, lambda w: (w @ a @ w / 2, a @ w), np.ones(n), 3 * n, Hyper(history=n))
        z = np.stack(optimizer.rows)
        b = optimizer.scalars["sigma"] * np.eye(n) + z.T @ optimizer.middle @ z
        if name == "lsr1-tr":
            # Its steps are far from orthogonal, which costs digits.
            assert np.linalg.norm(b - a) <= 1e-4 * np.linalg.norm(a)
        else:
            assert np.linalg.eigvalsh(b).min() > 0
