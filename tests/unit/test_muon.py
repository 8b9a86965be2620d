"""Muon: orthogonal steps of whole matrices."""

import tracemalloc
from math import prod, sqrt

import numpy as np
import pytest

from psmpi.backend import CompiledOps, NumpyOps
from psmpi.errors import UserError
from psmpi.layout import Matrix
from psmpi.optim import Hyper, make_optimizer
from psmpi.optim.orthogonal import NewtonSchulz

SHAPES = [(30, 20), (20, 30), (64, 64), (1, 50), (50, 1), (1, 1), (16, 144)]


def no_sum(values):
    return values


def muon(n, matrices, dtype=np.float64, **settings):
    return make_optimizer("muon", n, dtype, Hyper(**settings), matrices=matrices)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_of_matrices_are_nearly_orthogonal(shape, dtype):
    """U S V^T becomes U S' V^T with S' in [0.68, 1.21], except for singular values far below the others."""
    rng, n = np.random.default_rng(0), prod(shape)
    g = rng.normal(size=n).astype(dtype)
    w, optimizer = np.zeros(n, dtype), muon(n, [Matrix(0, *shape)], dtype)
    optimizer.step(w, g.copy(), 1.0, no_sum)
    step = -w.astype(float).reshape(shape) / sqrt(max(1, shape[0] / shape[1]))
    u, before, v = np.linalg.svd(g.astype(float).reshape(shape), full_matrices=False)
    after = u.T @ step @ v.T
    np.testing.assert_allclose(after, np.diag(np.diag(after)), atol=1e-3 if dtype == np.float32 else 1e-10)
    values = np.diag(after)[before > 0.02 * np.linalg.norm(before)]
    assert len(values) >= 0.9 * min(shape) and values.min() > 0.68 and values.max() < 1.21


def test_newton_schulz_is_a_quintic_of_singular_values():
    rng, x = np.random.default_rng(1), np.linspace(0.01, 1, 12)
    u, v = (np.linalg.qr(rng.normal(size=shape))[0] for shape in ((12, 12), (20, 12)))
    matrix = Matrix(0, 12, 20)
    schulz = NewtonSchulz([matrix], np.dtype(float), NumpyOps())
    schulz.input(matrix)[:] = ((u * x) @ v.T).reshape(-1)
    schulz(matrix)
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    np.testing.assert_allclose(schulz.input(matrix).reshape(12, 20), (u * x) @ v.T, atol=1e-12)


def test_the_length_of_a_step_does_not_depend_on_the_gradients():
    steps = []
    for size in (1.0, 2.0**50, 2.0**-20):
        w = np.zeros(600, np.float32)
        g = np.random.default_rng(2).normal(size=600).astype(np.float32) * np.float32(size)
        muon(600, [Matrix(0, 20, 30)], np.float32).step(w, g, 0.1, no_sum)
        steps.append(w)
    np.testing.assert_allclose(steps[1], steps[0], atol=1e-4)
    # Here the number added to the norm is not negligible.
    np.testing.assert_allclose(steps[2], steps[0], rtol=0.2, atol=1e-2)
    w = np.ones(600, np.float32)
    muon(600, [Matrix(0, 20, 30)], np.float32).step(w, np.zeros(600, np.float32), 0.1, no_sum)
    assert (w == 1).all()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_matrices_follow_pytorch(decay):
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    rng, shape = np.random.default_rng(3), (24, 16)
    w, gradients = rng.normal(size=shape), rng.normal(size=(10, *shape))
    parameter = torch.nn.Parameter(torch.tensor(w, dtype=torch.float32))
    torch_optimizer = torch.optim.Muon([parameter], lr=0.02, weight_decay=decay, momentum=0.9)
    own_w, optimizer = w.reshape(-1).copy(), muon(w.size, [Matrix(0, *shape)], momentum=0.9, weight_decay=decay)
    for g in gradients:
        parameter.grad = torch.tensor(g, dtype=torch.float32)
        torch_optimizer.step()
        optimizer.step(own_w, g.reshape(-1).copy(), 0.02, no_sum)
    # PyTorch iterates in bfloat16.
    np.testing.assert_allclose(own_w.reshape(shape), parameter.detach().numpy(), atol=0.02)


@pytest.mark.parametrize("ops", [NumpyOps(), CompiledOps()], ids=["numpy", "compiled"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shards_of_whole_matrices_step_as_the_whole_vector(dtype, ops):
    rng, n = np.random.default_rng(4), 3000
    start, gradients = rng.normal(size=n).astype(dtype), rng.normal(size=(4, n)).astype(dtype)
    matrices = [Matrix(5, 30, 20), Matrix(800, 20, 50), Matrix(1800, 10, 10)]
    shards = [slice(0, 700), slice(700, 1900), slice(1900, 1900), slice(1900, n)]
    full_w, sharded_w = start.copy(), start.copy()
    optimizer = make_optimizer("muon", n, dtype, Hyper(weight_decay=0.1), ops, matrices=matrices)
    for g in gradients:
        optimizer.step(full_w, g.copy(), 0.1, no_sum)
    for span in shards:
        inside = [m for m in matrices if span.start <= m.start < span.stop]
        local = [Matrix(m.start - span.start, m.rows, m.columns) for m in inside]
        shard_optimizer = make_optimizer(
            "muon", span.stop - span.start, dtype, Hyper(weight_decay=0.1), ops, matrices=local
        )

        def fail(values):
            raise AssertionError("a matrix is stepped by its owner alone")

        for g in gradients:
            shard_optimizer.step(sharded_w[span], g[span].copy(), 0.1, fail)
    # A fused pass rounds the last elements of a run differently.
    np.testing.assert_allclose(sharded_w, full_w, rtol=0, atol=1e-6 if dtype == np.float32 else 1e-14)
    for matrix in matrices:
        assert np.array_equal(sharded_w[matrix.place], full_w[matrix.place])


def test_restored_momentum_goes_on_to_the_same_bits():
    rng, matrices = np.random.default_rng(5), [Matrix(3, 8, 6)]
    first, w = muon(60, matrices), rng.normal(size=60)
    gradients = rng.normal(size=(8, 60))
    for g in gradients[:4]:
        first.step(w, g.copy(), 0.1, no_sum)
    second, restored_w = muon(60, matrices), w.copy()
    for key, vector in first.vectors.items():
        second.vectors[key][:] = vector
    second.scalars.update(first.scalars)
    for g in gradients[4:]:
        first.step(w, g.copy(), 0.1, no_sum)
        second.step(restored_w, g.copy(), 0.1, no_sum)
    assert np.array_equal(w, restored_w) and not first.vectors["v"][3:51].any()


def test_a_step_of_matrices_allocates_no_matrix():
    n = 400_000
    matrices = [Matrix(0, 300, 400), Matrix(150_000, 500, 300)]
    w, g, optimizer = np.ones(n, np.float32), np.ones(n, np.float32), muon(n, matrices, np.float32)
    optimizer.step(w, g, 0.1, no_sum)
    tracemalloc.start()
    optimizer.step(w, g, 0.1, no_sum)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    # Two vectors, two matrices and two squares of the largest size, and the chunks of the rest.
    state_bytes = sum(array.nbytes for array in optimizer.arrays)
    assert state_bytes == 4 * (2 * n + 2 * 150_000 + 2 * 300**2) + optimizer.scratch.nbytes


@pytest.mark.parametrize("matrices", [[Matrix(0, 3, 4), Matrix(11, 2, 2)], [Matrix(15, 2, 3)], [Matrix(-1, 2, 3)]])
def test_matrices_outside_the_shard_or_each_other_are_refused(matrices):
    with pytest.raises(ValueError, match="overlap"):
        muon(20, matrices)


def test_who_does_not_know_the_matrices_is_told_what_to_use():
    with pytest.raises(UserError, match="not known: use --optimizer adamw"):
        make_optimizer("muon", 20, np.float32, Hyper())
    with pytest.raises(UserError, match="come and go: use --optimizer adamw"):
        make_optimizer("muon", 20, np.float32, Hyper(), counted=True, matrices=())
