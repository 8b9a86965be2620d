"""Truncated conjugate gradients against dense linear algebra."""

from concurrent.futures import ThreadPoolExecutor
from math import nan
from threading import Barrier

import numpy as np
import pytest

from psmpi.optim.truncated_cg import truncated_cg


def solve(b, g, **options):
    """(x, result) of truncated_cg on b x = -g; `follow` builds the same x from the lengths of the steps alone."""
    n = len(g)
    x, followed, last = np.empty(n, g.dtype), np.zeros(n, g.dtype), np.empty(n, g.dtype)

    def product(p, q):
        np.copyto(last, p)
        q[:] = b @ p

    def follow(a):
        nonlocal followed
        followed += g.dtype.type(a) * last

    result = truncated_cg(g, x, product, follow, lambda v: v, np.empty((3, n), g.dtype), **options)
    assert np.array_equal(followed, x)
    assert result.length == pytest.approx(np.linalg.norm(x), abs=1e-12) and result.slope == pytest.approx(
        g @ x, rel=1e-9
    )
    assert result.curvature == pytest.approx(x @ b @ x, rel=1e-7, abs=1e-7)
    return x, result


def test_a_definite_system_is_solved():
    rng = np.random.default_rng(0)
    for n in (1, 3, 12, 40):
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        b, g = (q * np.linspace(1, 50, n)) @ q.T, rng.standard_normal(n)
        x, result = solve(b, g, rtol=1e-13, itmax=4 * n)
        assert np.allclose(x, np.linalg.solve(b, -g), rtol=1e-9, atol=1e-12) and result.end == "converged"


def test_the_tolerance_and_the_cap_end_it():
    rng = np.random.default_rng(1)
    q = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    b, g = (q * np.geomspace(1, 1e4, 30)) @ q.T, rng.standard_normal(30)
    for rtol in (0.5, 1e-1, 1e-2):
        x, result = solve(b, g, rtol=rtol, itmax=100)
        assert np.linalg.norm(b @ x + g) <= rtol * np.linalg.norm(g) and result.end == "converged"
    _, result = solve(b, g, rtol=1e-9, itmax=5)
    assert (result.iterations, result.end) == (5, "iterations")
    _, result = solve(b, np.zeros(30))
    assert (result.iterations, result.length) == (0, 0)


def test_a_trust_region_step_is_as_good_as_the_cauchy_point():
    """On 200 random indefinite systems the step is inside the radius, or on it if its end says so, and never worse."""
    rng, ends = np.random.default_rng(2), set()
    for _ in range(200):
        a = rng.standard_normal((12, 12))
        b, g = (a + a.T) / 2 + rng.uniform(-1, 6) * np.eye(12), rng.standard_normal(12)
        radius = float(rng.uniform(0.1, 3))
        x, result = solve(b, g, radius=radius, itmax=24)
        ends.add(result.end)
        assert np.linalg.norm(x) <= radius * (1 + 1e-12)
        if result.end == "boundary":
            assert np.linalg.norm(x) == pytest.approx(radius, rel=1e-12)
        gbg, norm = g @ b @ g, np.linalg.norm(g)
        tau = 1.0 if gbg <= 0 else min(1.0, norm**3 / (radius * gbg))
        cauchy = -tau * radius / norm * g
        assert g @ x + x @ b @ x / 2 <= g @ cauchy + cauchy @ b @ cauchy / 2 + 1e-12
    assert ends == {"boundary", "converged"}


def test_without_a_radius_the_direction_always_descends():
    rng, ends = np.random.default_rng(3), set()
    for _ in range(200):
        a = rng.standard_normal((12, 12))
        b, g = (a + a.T) / 2 + rng.uniform(-3, 6) * np.eye(12), rng.standard_normal(12)
        x, result = solve(b, g, itmax=24)
        ends.add(result.end)
        assert g @ x < 0
        if result.end == "curvature" and result.iterations == 1:
            assert np.array_equal(x, -g)
    assert {"curvature", "converged"} <= ends


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("radius", [np.inf, 0.7])
def test_shards_take_the_same_iterations(parts, radius):
    """The vectors are cut into shards, a thread each, which exchange sums alone."""
    rng, n = np.random.default_rng(4), 40
    a = rng.standard_normal((n, n))
    b, g = a @ a.T / n + np.eye(n), rng.standard_normal(n)
    full_x, expected = solve(b, g, rtol=1e-4, itmax=80, radius=radius)
    edges, meet = np.linspace(0, n, parts + 1).astype(int), Barrier(parts)
    sums: list = [None] * parts
    full_p, x = np.empty(n), np.empty(n)

    def shard(k):
        span = slice(edges[k], edges[k + 1])

        def allsum(values):
            sums[k] = values.copy()
            meet.wait(60)
            values[:] = np.sum(sums, axis=0)
            meet.wait(60)
            return values

        def product(p, q):
            full_p[span] = p
            meet.wait(60)
            q[:] = b[span] @ full_p
            meet.wait(60)

        work = np.empty((3, len(g[span])))
        return truncated_cg(g[span], x[span], product, lambda a: None, allsum, work, rtol=1e-4, itmax=80, radius=radius)

    with ThreadPoolExecutor(parts) as pool:
        results = list(pool.map(shard, range(parts)))
    assert all(result == results[0] for result in results)
    assert (results[0].iterations, results[0].end) == (expected.iterations, expected.end)
    assert np.allclose(x, full_x, rtol=1e-12, atol=1e-12) and results[0].slope == pytest.approx(
        expected.slope, rel=1e-12
    )


def test_numbers_that_are_not_finite_end_it_at_once():
    x, g = np.empty(3), np.array([1.0, nan, 0.0])
    result = truncated_cg(g, x, lambda p, q: None, lambda a: None, lambda v: v, np.empty((3, 3)))
    assert result.iterations == 0 and (x == 0).all()
