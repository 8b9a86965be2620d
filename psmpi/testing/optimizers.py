"""Checks of optimizers: shards, saved states, memory of a step. docs/own_optimizer.md uses them."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.optim import Hyper, Optimizer, is_first_order, make_optimizer

# The value of a function at w (n,), and its gradient (n,).
Function = Callable[[np.ndarray], tuple[float, np.ndarray]]


def check_optimizer(name: str, *, own: Any = None, lr: float = 1e-3, hyper: Hyper | None = None) -> None:
    """AssertionError unless the optimizer called `name` steps shards like the whole vector, and resumes exactly.

    A step of a first-order optimizer may allocate no vector. own: an object of its `options`; hyper: other settings.
    """
    hyper, start = hyper or Hyper(), np.linspace(-1, 1, 20)

    def make(n: int, dtype: Any = np.float64) -> Optimizer:
        return make_optimizer(name, n, dtype, hyper, own=own)

    whole = in_shards(make, start, valley, 10, lr, [])
    assert not np.array_equal(whole, start), "ten steps leave the weights as they were"
    shards = in_shards(make, start, valley, 10, lr, [3, 3, 11])
    far, allowed = np.linalg.norm(shards - whole) / np.linalg.norm(whole), 1e-12 if is_first_order(name) else 1e-8
    assert far <= allowed, f"four shards, one of them empty, are stepped otherwise than the whole: by {far:.1e}"
    saved_state_goes_on(make, start, lr)
    if is_first_order(name):
        _allocates_nothing(make)


def valley(w: np.ndarray) -> tuple[float, np.ndarray]:
    """Rosenbrock's function and its gradient."""
    a, b = w[:-1], w[1:]
    bend, g = b - a**2, np.zeros_like(w)
    g[:-1] = -400 * a * bend - 2 * (1 - a)
    g[1:] += 200 * bend
    return float((100 * bend**2 + (1 - a) ** 2).sum()), g


def in_shards(
    make: Callable[[int], Optimizer], w: np.ndarray, function: Function, steps: int, lr: float, cuts: Sequence[int]
) -> np.ndarray:
    """The weights after some steps of shards of w, in threads that share global sums."""
    slices = [slice(a, b) for a, b in pairwise([0, *cuts, w.size])]
    w, g, values = w.copy(), np.zeros_like(w), [0.0]
    barrier, errors = threading.Barrier(len(slices), timeout=60), []
    sums: list[Any] = [None] * len(slices)

    def work(k: int) -> None:
        def allsum(partial: np.ndarray) -> np.ndarray:
            sums[k] = partial.copy()
            barrier.wait()
            partial[:] = sum(sums)
            barrier.wait()
            return partial

        def closure() -> float:
            barrier.wait()
            if k == 0:
                values[0], g[:] = function(w)
            barrier.wait()
            return values[0]

        try:
            optimizer = make(w[slices[k]].size)
            for _ in range(steps):
                if not optimizer.needs_closure:
                    closure()
                optimizer.step(w[slices[k]], g[slices[k]], lr, allsum, closure)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(slices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return w


def saved_state_goes_on(make: Callable[[int], Optimizer], start: np.ndarray, lr: float) -> None:
    """An optimizer with the vectors and scalars of another one takes the same steps, to the bit."""

    def go(optimizer: Optimizer, w: np.ndarray, steps: int) -> None:
        g = np.zeros_like(w)

        def closure() -> float:
            value, g[:] = valley(w)
            return value

        for _ in range(steps):
            if not optimizer.needs_closure:
                closure()
            optimizer.step(w, g, lr, lambda values: values, closure)

    first, w = make(start.size), start.copy()
    go(first, w, 7)
    second, again = make(start.size), w.copy()
    for name, vector in first.vectors.items():
        second.vectors[name][:] = vector
    second.scalars.update(first.scalars)
    go(first, w, 5)
    go(second, again, 5)
    assert np.array_equal(w, again), "a restored optimizer steps otherwise: its state is not all in vectors and scalars"


def _allocates_nothing(make: Callable[..., Optimizer], n: int = 1_000_000) -> None:
    w, g = np.ones(n, np.float32), np.ones(n, np.float32)
    optimizer = make(n, np.float32)
    optimizer.step(w, g, 0.1, lambda values: values)
    tracemalloc.start()
    try:
        optimizer.step(w, g, 0.1, lambda values: values)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.05 * w.nbytes, f"a step of {w.nbytes:,} bytes allocates {peak:,}"
