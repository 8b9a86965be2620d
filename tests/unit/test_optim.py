"""Optimizers against independent formulas, PyTorch and SciPy; sharding; schedules; clipping."""

import json
import tracemalloc
from dataclasses import FrozenInstanceError, asdict, fields
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize, rosen, rosen_der

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.layout import Matrix
from psmpi.optim import (
    ALL_OPTIMIZERS,
    OPTIMIZERS,
    SCHEDULES,
    Hyper,
    NewtonSettings,
    ScheduleSettings,
    Unused,
    clip_by_global_norm,
    is_first_order,
    make_schedule,
    unused_settings,
)
from psmpi.optim import make_optimizer as make
from psmpi.optim.base import CHUNK
from psmpi.optim.curvature import RULES
from psmpi.optim.linesearch import Point, _cubic, strong_wolfe
from psmpi.optim.twoloop import two_loop
from psmpi.testing.optimizers import in_shards as in_threads
from psmpi.testing.optimizers import saved_state_goes_on

FIRST_ORDER = [name for name in OPTIMIZERS if is_first_order(name)]


# Matrices of vectors of more than 1,500 elements.
MATRICES = (Matrix(7, 30, 20), Matrix(700, 20, 40))


def no_sum(values):
    return values


def make_optimizer(name, n, dtype, hyper, ops=None, counted=False):
    """Make an optimizer that knows `MATRICES` if the vector has them."""
    return make(name, n, dtype, hyper, ops, counted, MATRICES if n > 1500 else ())


def reference(name, w, gradients, lr, h):
    """The textbook updates, written on whole vectors."""
    if name == "muon":
        return muon_reference(w, gradients, lr, h)
    beta2, momentum = h.beta2 or {"lion": 0.99}.get(name, 0.999), h.momentum or 0.9
    w, m, v = w.copy(), np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        if name in ("adamw", "lion"):
            w = w - lr * h.weight_decay * w
        else:
            g = g + h.weight_decay * w
        if name == "sgd":
            w = w - lr * g
        elif name in ("momentum", "nesterov"):
            v = momentum * v + g
            w = w - lr * (v if name == "momentum" else g + momentum * v)
        elif name == "rmsprop":
            v = h.alpha * v + (1 - h.alpha) * g**2
            w = w - lr * g / (np.sqrt(v) + h.eps)
        elif name == "lion":
            w = w - lr * np.sign(h.beta1 * m + (1 - h.beta1) * g)
            m = beta2 * m + (1 - beta2) * g
        elif name in ("adam", "adamw"):
            m = h.beta1 * m + (1 - h.beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            w = w - lr * (m / (1 - h.beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + h.eps)
        else:
            raise NotImplementedError(f"write the formula of {name} here")
    return w


def muon_reference(w, gradients, lr, h):
    """Muon in matrices as its authors write it, and AdamW elsewhere."""
    beta = h.momentum or 0.95
    expected = reference("adamw", w, gradients, 0.015 * lr, h)
    for matrix in MATRICES if w.size > 1500 else ():
        shape = matrix.rows, matrix.columns
        matrix_w, buffer = w[matrix.place].reshape(shape), np.zeros(shape)
        for g in gradients:
            g = g[matrix.place].reshape(shape)
            buffer = buffer + (1 - beta) * (g - buffer)
            x = g + beta * (buffer - g)
            x = x.T if matrix.rows > matrix.columns else x
            x = x / (np.linalg.norm(x) + 1e-7)
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.T if matrix.rows > matrix.columns else x
            matrix_w = matrix_w * (1 - lr * h.weight_decay) - lr * max(1, matrix.rows / matrix.columns) ** 0.5 * x
        expected[matrix.place] = matrix_w.reshape(-1)
    return expected


# Classes of PyTorch, which has no Lion, and a Muon for matrices only.
TORCH = {"sgd": "SGD", "momentum": "SGD", "nesterov": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}


def problem(n=40_000, steps=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=n), rng.normal(size=(steps, n))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_updates_follow_the_formulas(name, dtype, tolerance, decay):
    w, gradients = problem()
    hyper = Hyper(weight_decay=decay)
    own_w, optimizer = w.astype(dtype), make_optimizer(name, w.size, dtype, hyper)
    for g in gradients:
        optimizer.step(own_w, g.astype(dtype), 0.01, no_sum)
    assert own_w.dtype == dtype
    expected = reference(name, w, gradients, 0.01, hyper)
    assert np.linalg.norm(own_w - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("name", TORCH)
def test_updates_follow_pytorch(name):
    torch = pytest.importorskip("torch")
    w, gradients = problem(n=1000, steps=50)
    parameter = torch.nn.Parameter(torch.tensor(w))
    momentum = {"momentum": 0.9, "nesterov": name == "nesterov"} if name in ("momentum", "nesterov") else {}
    torch_optimizer = getattr(torch.optim, TORCH[name])([parameter], lr=0.01, weight_decay=0.1, **momentum)
    own_w, optimizer = w.copy(), make_optimizer(name, w.size, np.float64, Hyper(weight_decay=0.1))
    for g in gradients:
        parameter.grad = torch.tensor(g)
        torch_optimizer.step()
        optimizer.step(own_w, g.copy(), 0.01, no_sum)
    np.testing.assert_allclose(own_w, parameter.detach().numpy(), rtol=1e-11, atol=1e-12)


def in_shards(name, w, objective, steps, lr, cuts, hyper=None):
    return in_threads(lambda n: make_optimizer(name, n, w.dtype, hyper or Hyper()), w, objective, steps, lr, cuts)


def rosenbrock(w):
    return rosen(w), rosen_der(w)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shards_and_an_empty_one_step_as_the_whole_vector(name):
    start = np.linspace(-1, 1, 20)
    unsharded = in_shards(name, start, rosenbrock, 10, 1e-3, [])
    shards = in_shards(name, start, rosenbrock, 10, 1e-3, [3, 3, 11])
    np.testing.assert_allclose(shards, unsharded, rtol=1e-12 if name in FIRST_ORDER else 1e-8)
    assert not np.array_equal(unsharded, start)


def lbfgs_to_the_end(objective, start, steps, hyper):
    """Return the last point, the number of evaluations and the optimizer."""
    evals, w, g = [0], start.copy(), np.zeros_like(start)

    def closure():
        evals[0] += 1
        value, g[:] = objective(w)
        return value

    optimizer = make_optimizer("lbfgs", w.size, w.dtype, hyper)
    for _ in range(steps):
        optimizer.step(w, g, 1.0, no_sum, closure)
        if np.abs(g).max() < 1e-9:
            break
    return w, evals[0], optimizer


def test_lbfgs_finds_the_minimiser_that_scipy_finds():
    start = np.tile([-1.2, 1.0], 10)
    scipy_result = minimize(
        rosen, start, jac=rosen_der, method="L-BFGS-B", options={"maxiter": 500, "gtol": 1e-9, "ftol": 0}
    )
    minimiser, evals, _ = lbfgs_to_the_end(rosenbrock, start, 300, Hyper())
    np.testing.assert_allclose(minimiser, np.ones(20), atol=1e-6)
    np.testing.assert_allclose(minimiser, scipy_result.x, atol=1e-5)
    assert evals <= 3 * scipy_result.nfev


def test_lbfgs_solves_a_quadratic():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(50, 50)))
    matrix, target = q @ np.diag(np.logspace(0, 2, 50)) @ q.T, rng.normal(size=50)

    def quadratic(w):
        return 0.5 * w @ matrix @ w - target @ w, matrix @ w - target

    w, _, _ = lbfgs_to_the_end(quadratic, np.zeros(50), 200, Hyper())
    np.testing.assert_allclose(w, np.linalg.solve(matrix, target), atol=1e-7)


def test_lbfgs_backs_off_where_the_loss_is_not_finite():
    def barrier(w):
        with np.errstate(invalid="ignore", divide="ignore"):
            value = float((w - np.log(w)).sum())
        return (value, 1 - 1 / w) if np.all(w > 0) else (np.inf, np.full_like(w, np.nan))

    w, _, _ = lbfgs_to_the_end(barrier, np.full(5, 1e-2), 100, Hyper())
    np.testing.assert_allclose(w, 1.0, atol=1e-6)


def test_a_failed_line_search_restores_the_weights():
    start = np.ones(3)

    def liar(w):
        """A loss that rises along the negative of the returned gradient."""
        return float(np.abs(w - start).sum()), np.ones(3)

    w, _, optimizer = lbfgs_to_the_end(liar, start, 1, Hyper())
    assert np.array_equal(w, start) and optimizer.scalars["failed_searches"] == 1


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_step_allocates_no_vector(name):
    n = 1_000_000
    w, g = np.ones(n, np.float32), np.ones(n, np.float32)
    optimizer = make_optimizer(name, n, np.float32, Hyper(weight_decay=0.1))
    optimizer.step(w, g, 0.1, no_sum)
    tracemalloc.start()
    optimizer.step(w, g, 0.1, no_sum)
    clip_by_global_norm(g, 1.0, no_sum)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.05 * w.nbytes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_state_goes_on_to_the_same_bits(name):
    hyper = Hyper(history=3)
    saved_state_goes_on(lambda n: make_optimizer(name, n, np.float64, hyper), np.linspace(-1, 1, 10), 1e-3)


@given(st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_clipping_gives_the_norm_and_keeps_the_direction(limit, seed):
    g = np.random.default_rng(seed).normal(size=30)
    norm, direction = np.linalg.norm(g), g / np.linalg.norm(g)
    assert clip_by_global_norm(g, limit, no_sum) == pytest.approx(norm)
    assert np.linalg.norm(g) == pytest.approx(min(limit, norm))
    np.testing.assert_allclose(g / np.linalg.norm(g), direction, atol=1e-12)


def test_clipping_counts_all_shards_and_survives_large_components():
    g = np.full(5000, 1e30, np.float32)
    assert NumpyOps().squared_norm(g) == pytest.approx(5000 * 1e60, rel=1e-6)
    norm = clip_by_global_norm(g, 1.0, lambda a: a * 4)
    assert norm == pytest.approx(1e30 * sqrt(20000), rel=1e-6)
    assert np.linalg.norm(g.astype(float)) == pytest.approx(0.5, rel=1e-5)


def test_schedules_take_their_values():
    constant = make_schedule("constant", 0.1, total_steps=10)
    assert [constant(t) for t in (0, 5, 99)] == [0.1] * 3
    step = make_schedule("step", 0.1, total_steps=10, step_size=3, gamma=0.5)
    assert [step(t) for t in (0, 2, 3, 6)] == pytest.approx([0.1, 0.1, 0.05, 0.025])
    cosine = make_schedule("cosine", 0.1, total_steps=12, warmup_steps=2, min_lr=0.02)
    assert [cosine(t) for t in (0, 1, 2, 7, 12, 50)] == pytest.approx([0.05, 0.1, 0.1, 0.06, 0.02, 0.02])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "linear"}, "constant, step, cosine"),
        ({"kind": "step"}, "--step-size"),
        ({"kind": "cosine", "warmup_steps": -1}, "0 or more"),
        ({"kind": "cosine", "min_lr": 1.0}, "from 0 to --lr"),
    ],
)
def test_wrong_schedules_say_what_is_right(settings, says):
    settings = dict(settings)
    with pytest.raises(UserError, match=says):
        make_schedule(settings.pop("kind"), 0.1, total_steps=10, **settings)


@pytest.mark.parametrize(
    ("name", "hyper", "says"),
    [
        ("adagrad", {}, "choose one of sgd"),
        ("adam", {"beta2": 1.0}, "not including, 1"),
        ("adam", {"eps": 0.0}, "above 0"),
        ("sgd", {"weight_decay": -1.0}, "0 or more"),
        ("lbfgs", {"history": 0}, "1 or more"),
    ],
)
def test_wrong_optimizers_say_what_is_right(name, hyper, says):
    with pytest.raises(UserError, match=says):
        make_optimizer(name, 3, np.float32, Hyper(**hyper))


# Against PyTorch and the formulas over 100 steps, both dtypes, and at the ends of the ranges.


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("name", TORCH)
def test_a_hundred_steps_follow_pytorch_in_both_dtypes(name, dtype, tolerance, decay):
    torch = pytest.importorskip("torch")
    w, gradients = problem(n=CHUNK + 1000, steps=100, seed=3)
    own_w, gradients = w.astype(dtype), gradients.astype(dtype)
    parameter = torch.nn.Parameter(torch.tensor(own_w))
    momentum = {"momentum": 0.8, "nesterov": name == "nesterov"} if name in ("momentum", "nesterov") else {}
    betas = {"betas": (0.8, 0.99), "eps": 1e-6} if name in ("adam", "adamw") else {}
    rms = {"alpha": 0.95, "eps": 1e-6} if name == "rmsprop" else {}
    torch_optimizer = getattr(torch.optim, TORCH[name])(
        [parameter], lr=0.01, weight_decay=decay, **momentum, **betas, **rms
    )
    hyper = Hyper(momentum=0.8, beta1=0.8, beta2=0.99, alpha=0.95, eps=1e-6, weight_decay=decay)
    optimizer = make_optimizer(name, w.size, dtype, hyper)
    for g in gradients:
        parameter.grad = torch.tensor(g)
        torch_optimizer.step()
        optimizer.step(own_w, g.copy(), 0.01, no_sum)
    expected = parameter.detach().numpy()
    assert own_w.dtype == expected.dtype
    # Weights that end near 0 have the rounding errors of the path that led there.
    np.testing.assert_allclose(own_w, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_hundred_steps_with_other_settings_follow_the_formulas(name):
    w, gradients = problem(n=300, steps=100, seed=4)
    hyper = Hyper(momentum=0.5, beta1=0.7, beta2=0.95, alpha=0.8, eps=1e-3, weight_decay=0.2)
    own_w, optimizer = w.copy(), make_optimizer(name, w.size, np.float64, hyper)
    for g in gradients:
        optimizer.step(own_w, g.copy(), 0.02, no_sum)
    np.testing.assert_allclose(own_w, reference(name, w, gradients, 0.02, hyper), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [2.0**50, 2.0**-140, 0.0])
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_float32_stays_finite_from_the_largest_gradients_to_none(name, size):
    w, optimizer = np.ones(9, np.float32), make_optimizer(name, 9, np.float32, Hyper())
    for _ in range(20):
        optimizer.step(w, np.full(9, size, np.float32), np.float64(1e-3), no_sum)
    assert w.dtype == np.float32 and np.isfinite(w).all()
    assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in optimizer.vectors.values())
    assert size > 0 or np.array_equal(w, np.ones(9))


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_float64_step_allocates_no_vector(name):
    n = 1_000_000
    w, g, optimizer = np.ones(n), np.ones(n), make_optimizer(name, n, np.float64, Hyper(weight_decay=0.1))
    optimizer.step(w, g, 0.1, no_sum)
    tracemalloc.start()
    optimizer.step(w, g, 0.1, no_sum)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_empty_shard_steps(name, decay, dtype):
    optimizer = make_optimizer(name, 0, dtype, Hyper(weight_decay=decay, history=2))
    w, g = np.empty(0, dtype), np.empty(0, dtype)

    def sum_of_other_shards(values):
        values[:] = 1.0
        return values

    for _ in range(3):
        optimizer.step(w, g, 0.1, sum_of_other_shards, lambda: 1.0)
    assert all(vector.shape == (0,) for vector in optimizer.vectors.values())


def test_state_has_stable_names():
    names = {"sgd": "", "momentum": "v", "nesterov": "v", "adam": "mv", "adamw": "mv", "rmsprop": "v", "lion": "m"}
    names["muon"] = "mv"
    assert list(names) == FIRST_ORDER
    for name, expected in names.items():
        optimizer = make_optimizer(name, 3, np.float32, Hyper())
        assert list(optimizer.vectors) == list(expected) and not optimizer.needs_closure
        assert optimizer.scalars == ({"t": 0} if name in ("adam", "adamw", "muon") else {})
    lbfgs = make_optimizer("lbfgs", 3, np.float32, Hyper(history=2))
    assert list(lbfgs.vectors) == ["s0", "y0", "s1", "y1"] and lbfgs.needs_closure
    assert {"count", "head", "failed_searches"} <= set(lbfgs.scalars)
    assert all(v.shape == (3,) and v.dtype == np.float32 for v in lbfgs.vectors.values())


def test_constructors_take_their_settings_by_keyword():
    momentum, nesterov, adamw = (OPTIMIZERS[name] for name in ("momentum", "nesterov", "adamw"))
    assert (momentum(1, "float32", momentum=0.5).momentum, nesterov(1, "float32").momentum) == (0.5, 0.9)
    adam = adamw(1, np.float32, beta1=0.5, beta2=0.6, eps=1e-3, weight_decay=0.1)
    from_hyper = make_optimizer("adamw", 1, np.float32, Hyper(beta1=0.5, beta2=0.6, eps=1e-3, weight_decay=0.1))
    for optimizer in (adam, from_hyper):
        settings = (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay)
        assert settings == (0.5, 0.6, 1e-3, 0.1)
    lbfgs = make_optimizer("lbfgs", 1, np.float32, Hyper(history=3, max_evals=7))
    assert (lbfgs.history, lbfgs.max_evals, len(lbfgs.vectors)) == (3, 7, 6)
    assert OPTIMIZERS["sgd"](1, np.float32, weight_decay=0.3).weight_decay == 0.3
    assert OPTIMIZERS["rmsprop"](1, np.float32, alpha=0.3).alpha == 0.3
    assert (OPTIMIZERS["adam"](1, np.float32).beta2, OPTIMIZERS["lion"](1, np.float32).beta2) == (0.999, 0.99)
    with pytest.raises(TypeError, match="SGD has no momentum: use weight_decay"):
        OPTIMIZERS["sgd"](1, np.float32, momentum=0.5)


# L-BFGS.


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lbfgs_on_shards_is_lbfgs_on_the_whole_to_the_last_digits(decay):
    start, hyper = np.linspace(-1, 1, 20), Hyper(weight_decay=decay, history=4)
    unsharded = in_shards("lbfgs", start, rosenbrock, 8, 1.0, [], hyper)
    shards = in_shards("lbfgs", start, rosenbrock, 8, 1.0, [3, 3, 11], hyper)
    # Eight curved steps amplify the rounding errors of the sums a little.
    np.testing.assert_allclose(shards, unsharded, rtol=1e-11, atol=1e-12)
    assert rosen(unsharded) < 0.1 * rosen(start)


def dense_direction(g, pairs):
    """-H g, H made by the BFGS formula (Nocedal and Wright, eq. 6.17) from its scaled identity, oldest pair first."""
    s, y = pairs[-1]
    h = np.eye(g.size) * (s @ y) / (y @ y)
    for s, y in pairs:
        v = np.eye(g.size) - np.outer(y, s) / (y @ s)
        h = v.T @ h @ v + np.outer(s, s) / (y @ s)
    return -h @ g


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_direction_is_that_of_the_dense_bfgs_formula(count):
    rng = np.random.default_rng(count)
    root = rng.normal(size=(8, 8))
    s = rng.normal(size=(count, 8))
    y, g = s @ (root @ root.T + np.eye(8)), rng.normal(size=8)
    # The pairs are given newest first.
    of_g, of_y, of_s = two_loop(s @ g, y @ g, s @ y.T, y @ y.T)
    direction = of_g * g + np.array(of_y) @ y + np.array(of_s) @ s
    np.testing.assert_allclose(direction, dense_direction(g, list(zip(s, y, strict=True))[::-1]), rtol=1e-9, atol=1e-11)


def test_the_ring_holds_the_newest_pairs_and_their_directions():
    """Every step's direction, seen through the closure, is the dense formula's on the last pairs."""
    history, w = 3, np.linspace(-1, 1, 6)
    g, points = np.zeros(6), []

    def closure():
        points.append(w.copy())
        g[:] = rosen_der(w)
        return rosen(w)

    optimizer, pairs = make_optimizer("lbfgs", 6, np.float64, Hyper(history=history)), []
    for _ in range(12):
        before = w.copy()
        points.clear()
        optimizer.step(w, g, 1.0, no_sum, closure)
        assert np.array_equal(points[0], before)
        if pairs:
            actual, expected = points[1] - before, dense_direction(rosen_der(before), pairs[-history:])
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-10)
        pairs.append((w - before, rosen_der(w) - rosen_der(before)))
        newest = (optimizer.scalars["head"] - 1) % history
        np.testing.assert_array_equal(optimizer.vectors[f"s{newest}"], pairs[-1][0])
        np.testing.assert_array_equal(optimizer.vectors[f"y{newest}"], pairs[-1][1])
    assert optimizer.scalars["count"] == history and optimizer.scalars["pairs_taken"] == 12


def test_the_first_trial_is_scaled_by_the_gradient_and_lr():
    for g0, length in ((np.array([30.0, -10.0]), 0.5 / 40), (np.array([0.1, 0.2]), 0.5)):
        w, g, points = np.zeros(2), np.zeros(2), []

        def closure(w=w, g=g, points=points, g0=g0):
            points.append(w.copy())
            g[:] = g0 + 0.1 * w
            return float(g0 @ w + 0.05 * w @ w)

        make_optimizer("lbfgs", 2, np.float64, Hyper()).step(w, g, 0.5, no_sum, closure)
        np.testing.assert_allclose(points[1], -length * g0, rtol=1e-14)


def test_a_changed_minibatch_makes_no_pair():
    """Gradients of two minibatches must not be subtracted from each other: y = A s holds for each pair's own A."""
    w, g, current = np.ones(4), np.zeros(4), [1.0]

    def closure():
        scale = np.arange(1.0, 5.0) * current[0]
        g[:] = scale * w - current[0] ** 2
        return float(0.5 * w @ (scale * w) - current[0] ** 2 * w.sum())

    optimizer = make_optimizer("lbfgs", 4, np.float64, Hyper())
    for k in range(6):
        current[0] = 1.0 + k % 3
        optimizer.step(w, g, 1.0, no_sum, closure)
        assert optimizer.scalars["pairs_taken"] == k + 1
        s, y = optimizer.vectors[f"s{k}"], optimizer.vectors[f"y{k}"]
        np.testing.assert_allclose(y, np.arange(1.0, 5.0) * current[0] * s, rtol=1e-6, atol=1e-13)


def test_weight_decay_of_lbfgs_is_the_penalty_on_the_loss():
    def penalised(w):
        return rosen(w) + 0.15 * w @ w, rosen_der(w) + 0.3 * w

    start = np.linspace(-1, 1, 8)
    decayed, _, _ = lbfgs_to_the_end(rosenbrock, start, 60, Hyper(weight_decay=0.3))
    expected, _, _ = lbfgs_to_the_end(penalised, start, 60, Hyper())
    np.testing.assert_allclose(decayed, expected, atol=1e-8)
    assert np.abs(penalised(decayed)[1]).max() < 1e-7 < np.abs(rosen_der(decayed)).max()


@pytest.mark.parametrize("max_evals", [2, 3, 20])
def test_a_step_keeps_to_its_evaluations_and_never_rises(max_evals):
    evals, w, g = [0], np.tile([-1.2, 1.0], 5), np.zeros(10)

    def closure():
        evals[0] += 1
        g[:] = rosen_der(w)
        return rosen(w)

    optimizer = make_optimizer("lbfgs", 10, np.float64, Hyper(max_evals=max_evals))
    for _ in range(50):
        evals[0], before, failed = 0, w.copy(), optimizer.scalars["failed_searches"]
        optimizer.step(w, g, 30.0, no_sum, closure)
        assert evals[0] <= max_evals
        if optimizer.scalars["failed_searches"] > failed:
            assert np.array_equal(w, before) and optimizer.scalars["count"] == 0
        else:
            assert rosen(w) < rosen(before)


def test_lbfgs_works_in_float32():
    start = np.tile([-1.2, 1.0], 5).astype(np.float32)

    def narrow(w):
        return rosen(w.astype(float)), rosen_der(w.astype(float)).astype(np.float32)

    w, _, optimizer = lbfgs_to_the_end(narrow, start, 150, Hyper())
    assert w.dtype == np.float32 and all(v.dtype == np.float32 for v in optimizer.vectors.values())
    np.testing.assert_allclose(w, 1.0, atol=1e-3)


def test_a_long_history_costs_no_more_global_sums():
    counts = {}
    for history in (2, 10):
        sums, w, g = [0], np.linspace(-1, 1, 30), np.zeros(30)
        evals = [0]

        def counted(values, sums=sums):
            sums[0] += 1
            return values

        def closure(w=w, g=g, evals=evals):
            evals[0] += 1
            g[:] = rosen_der(w)
            return rosen(w)

        optimizer = make_optimizer("lbfgs", 30, np.float64, Hyper(history=history))
        for _ in range(20):
            optimizer.step(w, g, 1.0, counted, closure)
        counts[history] = sums[0] - evals[0]
    # Sums of products with g and of the slope and the new pair; the first evaluation needs no sum of its own.
    assert counts[2] == counts[10] == 2 * 20


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_at_the_start_leaves_the_weights(where, bad):
    w, g, broken = np.linspace(-1, 1, 4), np.zeros(4), [False]

    def closure():
        g[:] = rosen_der(w)
        if broken[0] and where == "gradient":
            g[2] = bad
        return bad if broken[0] and where == "loss" else rosen(w)

    optimizer = make_optimizer("lbfgs", 4, np.float64, Hyper())
    for _ in range(3):
        optimizer.step(w, g, 1.0, no_sum, closure)
    broken[0], before = True, w.copy()
    optimizer.step(w, g, 1.0, no_sum, closure)
    assert np.array_equal(w, before)
    assert optimizer.scalars["failed_searches"] == 1 and optimizer.scalars["count"] == 0
    broken[0] = False
    optimizer.step(w, g, 1.0, no_sum, closure)
    assert rosen(w) < rosen(before) and optimizer.scalars["count"] == 1


def test_a_stationary_point_stays():
    w, g = np.ones(4), np.zeros(4)
    optimizer = make_optimizer("lbfgs", 4, np.float64, Hyper())

    def closure():
        g[:] = rosen_der(w)
        return rosen(w)

    optimizer.step(w, g, 1.0, no_sum, closure)
    assert np.array_equal(w, np.ones(4)) and optimizer.scalars["failed_searches"] == 0


def test_a_concave_pair_is_skipped():
    """Along a line that turns down for ever, sufficient decrease is found but no curvature."""
    w, g = np.zeros(3), np.zeros(3)

    def closure():
        g[:] = -1 - 2e-3 * w
        return float(-w.sum() - 1e-3 * w @ w)

    optimizer = make_optimizer("lbfgs", 3, np.float64, Hyper(max_evals=6))
    optimizer.step(w, g, 1.0, no_sum, closure)
    assert (w > 0).all() and optimizer.scalars["count"] == 0 and optimizer.scalars["failed_searches"] == 0


def test_spoiled_pairs_fall_back_to_the_gradient():
    w, g = np.linspace(-1, 1, 4), np.zeros(4)

    def closure():
        g[:] = rosen_der(w)
        return rosen(w)

    optimizer = make_optimizer("lbfgs", 4, np.float64, Hyper())
    for _ in range(3):
        optimizer.step(w, g, 1.0, no_sum, closure)
    # As from a damaged checkpoint: y opposite to s makes the direction one of ascent.
    for k in range(3):
        optimizer.vectors[f"y{k}"] *= -1
    optimizer.scalars["curvature"] = 0.0
    before = rosen(w)
    optimizer.step(w, g, 1.0, no_sum, closure)
    assert rosen(w) < before and optimizer.scalars["count"] == 1


def test_state_restored_over_other_state_goes_on_to_the_same_bits():
    """Checkpoints hold no products of pairs: they are computed anew from the restored vectors."""

    def go(optimizer, w, steps):
        g = np.zeros_like(w)

        def closure():
            g[:] = rosen_der(w)
            return rosen(w)

        for _ in range(steps):
            optimizer.step(w, g, 1.0, no_sum, closure)

    first, w = make_optimizer("lbfgs", 10, np.float64, Hyper(history=4)), np.linspace(-1, 1, 10)
    used, other_w = make_optimizer("lbfgs", 10, np.float64, Hyper(history=4)), np.linspace(1, 2, 10)
    go(first, w, 7)
    go(used, other_w, 7)
    assert used.scalars["pairs_taken"] == first.scalars["pairs_taken"]
    for key, vector in first.vectors.items():
        used.vectors[key][:] = vector
    used.scalars.update(json.loads(json.dumps(first.scalars)))
    other_w[:] = w
    go(first, w, 6)
    go(used, other_w, 6)
    assert np.array_equal(w, other_w) and used.scalars == first.scalars


# The line search by itself.


def recorded_line(f, slope):
    points = []

    def trial(length):
        points.append(Point(length, f(length), slope(length)))
        return points[-1]

    return trial, points


@given(st.floats(1e-3, 1e3), st.floats(1e-4, 1e4), st.floats(0.0, 0.95))
def test_a_search_ends_with_the_strong_wolfe_conditions(centre, first, wave):
    """The function is a wavy valley, and first steps are from far too short to far too long."""

    def f(t):
        return (t / centre - 1) ** 2 + 0.1 * wave * (1 - np.cos(6 * (t / centre - 1)))

    def slope(t):
        return (2 * (t / centre - 1) + 0.6 * wave * np.sin(6 * (t / centre - 1))) / centre

    trial, points = recorded_line(f, slope)
    origin = Point(0.0, f(0.0), slope(0.0))
    if not origin.slope < 0:
        return
    kept_points = []
    end = strong_wolfe(trial, lambda: kept_points.append(points[-1]), origin, first, 40)
    assert end is points[-1]
    assert end.value <= origin.value + 1e-4 * end.length * origin.slope
    assert abs(end.slope) <= 0.9 * abs(origin.slope)


def test_a_search_without_an_end_takes_the_lowest_point_seen():
    trial, points = recorded_line(lambda t: -t, lambda t: -1.0)
    kept_points = []
    end = strong_wolfe(trial, lambda: kept_points.append(points[-1]), Point(0.0, 0.0, -1.0), 1.0, 5)
    assert len(points) == 5 and end is points[-1] is kept_points[-1] and end.length > 100


def test_a_search_short_of_evaluations_returns_a_point_it_kept():
    """The valley is so narrow that the search misses its minimum: the kept point is not the last one tried."""
    trial, points = recorded_line(lambda t: 1e3 * abs(t - 1.0), lambda t: 1e3 if t > 1 else -1e3)
    kept_points = []
    end = strong_wolfe(trial, lambda: kept_points.append(points[-1]), Point(0.0, 1e3, -1e3), 0.3, 4)
    assert end in kept_points and end.value == min(p.value for p in points if p.value <= 1e3 - 0.1 * p.length)


@pytest.mark.parametrize("evals", [1, 30])
def test_a_search_uphill_or_flat_finds_nothing(evals):
    origin = Point(0.0, 0.0, -1.0)
    assert strong_wolfe(recorded_line(lambda t: t, lambda t: 1.0)[0], lambda: None, origin, 1.0, evals) is None
    nowhere = strong_wolfe(lambda t: Point(t, np.inf, np.inf), lambda: None, origin, 1.0, evals)
    assert nowhere is None
    # The values are constant: rounding hides the decrease of a tiny slope.
    still = Point(0.0, 1.0, -1e-30)
    assert strong_wolfe(recorded_line(lambda t: 1.0, lambda t: -1e-30)[0], lambda: None, still, 1.0, evals) is None


# Norms.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_norm_is_accumulated_in_float64(dtype):
    g = np.random.default_rng(0).normal(size=3 * CHUNK + 17).astype(dtype)
    assert NumpyOps().squared_norm(g) == pytest.approx(float((g.astype(np.longdouble) ** 2).sum()), rel=1e-13)
    assert NumpyOps().squared_norm(g[:0]) == 0.0


def test_clipping_by_0_or_from_below_only_measures():
    for limit in (0, 0.0, 5.0, 6.0, np.inf):
        g = np.array([3.0, 4.0], np.float32)
        assert clip_by_global_norm(g, limit, no_sum) == 5.0 and np.array_equal(g, [3.0, 4.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_clipping_returns_a_norm_that_is_not_finite_and_leaves_the_gradient(bad):
    g = np.array([1.0, bad, 2.0], np.float32)
    before = g.copy()
    assert not np.isfinite(clip_by_global_norm(g, 1.0, no_sum))
    np.testing.assert_array_equal(g, before)
    # The other shards' gradients stay too.
    assert not np.isfinite(clip_by_global_norm(g[:1], 1.0, lambda a: a + bad * bad)) and g[0] == 1.0


def test_clipping_far_below_the_smallest_float32_factor():
    g = np.full(4, 1e38, np.float32)
    assert clip_by_global_norm(g, 1e-6, no_sum) == pytest.approx(2e38, rel=1e-6)
    np.testing.assert_allclose(g, 5e-7, rtol=1e-5)
    assert g.dtype == np.float32


@pytest.mark.parametrize("limit", [-1.0, np.nan])
def test_a_wrong_largest_norm_says_what_is_right(limit):
    with pytest.raises(UserError, match="expected 0"):
        clip_by_global_norm(np.ones(3), limit, no_sum)


# Schedules.


def test_the_warm_up_multiplies_every_schedule():
    step = make_schedule("step", 0.8, total_steps=10, warmup_steps=4, step_size=2, gamma=0.5)
    assert [step(t) for t in range(6)] == pytest.approx([0.2, 0.4, 0.3, 0.4, 0.2, 0.2])
    constant = make_schedule("constant", 0.8, total_steps=10, warmup_steps=4)
    assert [constant(t) for t in (0, 1, 3, 4, 100)] == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.8])


def test_the_cosine_ends_at_its_least_rate_whatever_the_warm_up():
    plain = make_schedule("cosine", 1.0, total_steps=4)
    half = 0.5 / sqrt(2)
    assert [plain(t) for t in range(6)] == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half, 0, 0])
    for warmup in (10, 12):
        schedule = make_schedule("cosine", 1.0, total_steps=10, warmup_steps=warmup, min_lr=0.25)
        assert schedule(4) == pytest.approx(5 / warmup) and schedule(warmup) == schedule(99) == 0.25


def test_a_schedule_is_frozen():
    with pytest.raises(FrozenInstanceError):
        make_schedule("constant", 0.1, total_steps=1).lr = 1.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "constant", "total_steps": 0}, "1 or more"),
        ({"kind": "step", "step_size": -2}, "--step-size -2"),
        ({"kind": "step", "step_size": 2, "gamma": 0.0}, "--gamma 0.0"),
        ({"kind": "step", "step_size": 2, "gamma": 1.5}, "--gamma 1.5"),
        ({"kind": "cosine", "min_lr": -0.1}, "--min-lr -0.1"),
        ({"kind": "cosine", "min_lr": float("nan")}, "--min-lr nan"),
    ],
)
def test_schedules_refuse_what_makes_none(settings, says):
    with pytest.raises(UserError, match=says):
        make_schedule(**{"lr": 0.1, "total_steps": 10, **settings})


# Settings.


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
@pytest.mark.parametrize("setting", ["momentum", "beta1", "beta2", "alpha"])
def test_decays_are_from_0_up_to_1(setting, value):
    with pytest.raises(UserError, match=f"--{setting} {value}"):
        make_optimizer("sgd", 3, np.float32, Hyper(**{setting: value}))


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("momentum", {"momentum": 1.0}, "--momentum 1.0"),
        ("nesterov", {"momentum": -1.0}, "--momentum -1.0"),
        ("adam", {"beta1": 1.0}, "--beta1 1.0"),
        ("adamw", {"beta2": 2.0}, "--beta2 2.0"),
        ("adam", {"eps": -1e-8}, "--eps"),
        ("adam", {"eps": 1e-60}, "rounds to 0 in float32"),
        ("rmsprop", {"eps": 1e-60}, "rounds to 0 in float32"),
        ("rmsprop", {"alpha": 1.0}, "--alpha 1.0"),
        ("sgd", {"weight_decay": float("nan")}, "--weight-decay nan"),
        ("lbfgs", {"weight_decay": -1.0}, "--weight-decay -1.0"),
        ("lbfgs", {"history": 0}, "--history 0"),
        ("lbfgs", {"max_evals": 1}, "--max-evals 1: expected 2 or more"),
    ],
)
def test_constructors_refuse_wrong_settings(name, settings, says):
    with pytest.raises(UserError, match=says):
        OPTIMIZERS[name](3, np.float32, **settings)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_dtypes_are_refused(name):
    with pytest.raises(UserError, match="float32 or float64"):
        make_optimizer(name, 3, np.float16, Hyper())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arrays_that_are_not_the_shard_are_refused(name):
    optimizer = make_optimizer(name, 3, np.float32, Hyper())
    right, long, wide = np.ones(3, np.float32), np.ones(4, np.float32), np.ones(3)
    for w, g in ((long, right), (right, long), (wide, right), (right, wide)):
        with pytest.raises(ValueError, match="this optimizer steps"):
            optimizer.step(w, g, 0.1, no_sum, lambda: 0.0)


def test_lbfgs_asks_for_its_closure():
    with pytest.raises(ValueError, match="closure"):
        make_optimizer("lbfgs", 3, np.float32, Hyper()).step(
            np.ones(3, np.float32), np.ones(3, np.float32), 1.0, no_sum
        )


SETTINGS = (Hyper, NewtonSettings, ScheduleSettings)


def test_every_setting_has_a_user_and_every_user_a_setting():
    kinds = [*ALL_OPTIMIZERS.values(), *SCHEDULES.values()]
    assert {f.name for kind in SETTINGS for f in fields(kind)} - {"schedule"} == {s for k in kinds for s in k.settings}
    assert sum(len(fields(kind)) for kind in SETTINGS) == len({f.name for kind in SETTINGS for f in fields(kind)})


def test_partitioned_settings_are_those_of_the_element_updates():
    only = {name: set(ALL_OPTIMIZERS[name].settings) - set(ALL_OPTIMIZERS["plsr1"].settings) for name in RULES}
    assert only == {"plbfgs": {"curvature", "damping"}, "plsr1": set(), "plse": {"curvature"}}
    optimizer = make_optimizer("plbfgs", 0, np.float32, Hyper(momentum=0.5, eps=1e-3))
    assert (optimizer.momentum, optimizer.beta2, optimizer.eps) == (0.5, 0.999, 1e-3) and optimizer.needs_closure


def test_defaults_are_used_by_everyone():
    values = {key: value for kind in SETTINGS for key, value in asdict(kind()).items()}
    for optimizer in ALL_OPTIMIZERS:
        for schedule in SCHEDULES:
            assert unused_settings(optimizer, schedule, values) == []


def test_settings_that_nothing_uses_name_who_does():
    newton = ("plbfgs", "plsr1", "plse")
    values = {"lr": 0.5, "sigma": 1.0, "min_lr": 1e-4, "beta1": 0.8, "gamma": 0.5, "damping": True, "warmup_steps": 3}
    assert unused_settings("adam", "cosine", values) == [
        Unused("sigma", "optimizer", newton),
        Unused("gamma", "schedule", ("step",)),
        Unused("damping", "optimizer", ("plbfgs",)),
    ]
    assert [unused.setting for unused in unused_settings("plse", "step", values)] == ["min_lr", "beta1", "damping"]
    assert unused_settings("lbfgs", "constant", {"history": 3, "max_evals": 9, "weight_decay": 0.1}) == []
    assert unused_settings("lsr1-tr", "constant", {"max_evals": 9}) == [Unused("max_evals", "optimizer", ("lbfgs",))]
    # A setting that was given counts even with its default value.
    values, stated = {"history": 10, "gamma": 0.1, "momentum": None, "sigma": 0.0}, {"history", "gamma", "lr"}
    assert [unused.setting for unused in unused_settings("adam", "constant", values, stated)] == ["history", "gamma"]
    assert unused_settings("lbfgs", "step", values, stated) == []
    with pytest.raises(UserError, match="choose one of sgd"):
        unused_settings("adagrad", "cosine", {})


# Corners.


@pytest.mark.parametrize("n", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1])
def test_every_element_is_stepped(n):
    w, g = np.zeros(n), np.ones(n)
    make_optimizer("sgd", n, np.float64, Hyper()).step(w, g, 0.5, no_sum)
    assert np.array_equal(w, np.full(n, -0.5)) and NumpyOps().squared_norm(g) == n


def test_a_point_accepted_before_the_last_trial_is_restored_with_its_gradient():
    def kink(w):
        return 1e3 * abs(w[0] - 1.0), np.array([1e3 if w[0] > 1 else -1e3 + w[0]])

    earlier = 0
    for max_evals in range(2, 9):
        w, g, points = np.zeros(1), np.zeros(1), []

        def closure(w=w, g=g, points=points):
            points.append(w.copy())
            value, g[:] = kink(w)
            return value

        optimizer = make_optimizer("lbfgs", 1, np.float64, Hyper(max_evals=max_evals))
        optimizer.step(w, g, 300.0, no_sum, closure)
        assert any(np.array_equal(point, w) for point in points)
        assert kink(w)[0] == min(kink(point)[0] for point in points)
        if optimizer.scalars["count"]:
            earlier += not np.array_equal(points[-1], w)
            assert np.array_equal(optimizer.vectors["s0"], w)
            assert np.array_equal(optimizer.vectors["y0"], kink(w)[1] - kink(np.zeros(1))[1])
    assert earlier


def test_a_loss_of_minus_infinity_is_too_long():
    w, g = np.ones(2), np.zeros(2)

    def closure():
        g[:] = w
        return float(0.5 * w @ w) if np.abs(w).max() <= 1 else -np.inf

    make_optimizer("lbfgs", 2, np.float64, Hyper()).step(w, g, 50.0, no_sum, closure)
    assert np.abs(w).max() < 1


def test_a_decrease_must_be_sufficient():
    point = strong_wolfe(lambda t: Point(t, -5e-5 * t, 0.0), lambda: None, Point(0.0, 0.0, -1.0), 1.0, 1)
    assert point is None


def test_the_trial_after_one_not_finite_is_a_tenth():
    lengths = []

    def trial(length):
        lengths.append(length)
        return Point(length, np.inf, np.inf) if length > 0.5 else Point(length, -length, 0.0)

    assert strong_wolfe(trial, lambda: None, Point(0.0, 0.0, -1.0), 1.0, 5).length == pytest.approx(0.1)
    assert lengths == pytest.approx([1.0, 0.1])


def test_the_cubic_finds_the_minimum_from_either_side():
    def on(t):
        return Point(t, t**3 - 3 * t, 3 * t**2 - 3)

    assert _cubic(on(0.2), on(1.7)) == pytest.approx(1.0) == _cubic(on(1.7), on(0.2))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_counted_steps_are_those_of_optimizers_of_their_own(name):
    """Weights that come and go step as with an optimizer for each group of weights that are stepped together."""
    rng, hyper = np.random.default_rng(0), Hyper(weight_decay=0.01)
    n, groups = 40_000, [slice(0, 15_000), slice(15_000, 40_000)]
    w = rng.standard_normal(n)
    state = {key: np.zeros(n) for key in ("m", "v", "t")}
    group_optimizers = [make_optimizer(name, g.stop - g.start, np.float64, hyper) for g in groups]
    expected = w.copy()
    for step in range(12):
        stepped = [k for k in (0, 1) if k == 0 or step % 3 == 2]
        gradient = rng.standard_normal(n)
        ids = np.concatenate([np.arange(groups[k].start, groups[k].stop) for k in stepped])
        counted = make_optimizer(name, len(ids), np.float64, hyper, counted=True)
        assert not counted.scalars
        for key, values in state.items():
            counted.vectors[key][...] = values[ids]
        part, g = w[ids], gradient[ids]
        counted.step(part, g, 0.01, lambda values: values)
        w[ids] = part
        for key, values in state.items():
            values[ids] = counted.vectors[key]
        for k in stepped:
            group_optimizers[k].step(expected[groups[k]], gradient[groups[k]].copy(), 0.01, lambda values: values)
    assert abs(w - expected).max() <= 1e-12
    # With betas of 0 the first step has the length of the rate.
    no_moments = make_optimizer(name, 3, np.float32, Hyper(beta1=0.0, beta2=0.0), counted=True)
    w = np.zeros(3, np.float32)
    no_moments.step(w, np.array([1, -2, 3], np.float32), 0.5, lambda values: values)
    assert np.allclose(w, [-0.5, 0.5, -0.5], rtol=1e-6)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_fused_pass_is_found_once_and_does_the_whole_step(name):
    operations, calls = [], []

    class Fused(NumpyOps):
        def fused(self, operation):
            operations.append(operation)
            return lambda w, g, *state: calls.append((w.size, g.size))

    optimizer = make(name, 3 * CHUNK, np.float64, Hyper(weight_decay=0.1), Fused(), matrices=())
    w, g = np.ones(3 * CHUNK), np.ones(3 * CHUNK)
    for _ in range(2):
        optimizer.step(w, g, 0.1, no_sum)
    assert operations == [type(optimizer).operation] and calls == [(3 * CHUNK,) * 2] * 2 and (w == 1).all()
