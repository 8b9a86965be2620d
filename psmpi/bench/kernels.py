"""Measure operations of a backend: memory-bound ones in GB/s, and recurrent cells in GFLOP/s.

A copy, and a matrix product, on the same backend are measured beside them.
"""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps, make_backend
from psmpi.backend.reference import CELLS
from psmpi.bench.compute import Backend
from psmpi.errors import UserError
from psmpi.output import Screen

# Minibatch of the images and scores.
BATCH = 256
# Units, steps and minibatch of the sequences.
SEQUENCES = 512, 32, 64


def kernels(backend: Backend = "auto", megabytes: int = 64, repeats: int = 20, threads: int = 1, json: str = "") -> int:
    """Measure memory-bound operations and recurrent cells, in float32.

    Bytes count each array once for a read or write. Each operation is measured in turn with a copy of as many bytes.
    Recurrent cells count the operations of their products, and are measured in turn with the product for such a layer's
    input.

    Args:
        backend: Backend.
        megabytes: Size of the largest array of an operation, in MB. Small arrays stay in the caches.
        repeats: Measurements of each, operation and copy in turn, after a warm-up.
        threads: Threads of the processor.
        json: File for the figures, in JSON.
    """
    from threadpoolctl import threadpool_limits

    for option, value in (("--megabytes", megabytes), ("--repeats", repeats), ("--threads", threads)):
        if value < 1:
            raise UserError(f"{option} {value}: expected a whole number from 1 up")
    with threadpool_limits(threads):
        ops = make_backend(backend, threads)
        rows = measure(ops, megabytes * 10**6 // 4, repeats)
        cells = measure_cells(ops, repeats)
    _show(rows, ops)
    _show_cells(cells, ops)
    if json:
        figures = {"backend": ops.description, "megabytes": megabytes, "rows": rows, "cells": cells}
        with open(json, "w") as file:
            file.write(jsonlib.dumps(figures) + "\n")
    return 0


def measure(ops: NumpyOps, size: int, repeats: int) -> list[dict[str, Any]]:
    """Measure GB/s of each operation that this backend has, on arrays of about `size` float32.

    Each row has medians, and the median and quartiles of the ratio to a copy.
    """
    dtype = np.dtype(np.float32)
    channels = max(1, size // (32 * 32 * BATCH))
    size = channels * 32 * 32 * BATCH
    a, b, c, d = (ops.zeros(size, dtype) for _ in range(4))
    images, others = (array.reshape(channels, 32, 32, BATCH) for array in (a, b))
    pooled = c[: size // 4].reshape(channels, 16, 16, BATCH)
    spare = d[: size // 4].reshape(pooled.shape)
    rows, biases = (array.reshape(1, channels, -1) for array in (a, b)), ops.zeros(channels, dtype).reshape(1, -1)
    y, dy = rows
    features = size // BATCH
    kept = ops.samples(np.zeros((BATCH, features), np.uint8), 1 / 255)
    at = np.random.default_rng(0).permutation(BATCH)

    def copy() -> None:
        b[...] = a

    work: list[tuple[str, int, Callable[[], Any]]] = [
        ("bias and sigmoid", 2 * a.nbytes, lambda: ops.finish(y, biases, "sigmoid")),
        ("gradient of bias and sigmoid", 3 * a.nbytes, lambda: ops.finish_back(y, dy, "sigmoid", biases)),
        ("mean pooling", a.nbytes * 5 // 4, lambda: ops.mean_pool(images, 2, pooled, "identity")),
        ("gradient of mean pooling", a.nbytes * 5 // 4, lambda: ops.mean_pool_back(pooled, 2, others)),
        ("max pooling", a.nbytes * 5 // 4, lambda: ops.max_pool(images, 2, pooled, "identity")),
        ("gradient of max pooling", a.nbytes * 9 // 4, lambda: ops.max_pool_back(images, spare, pooled, 2, others)),
        ("samples of bytes", a.nbytes * 5 // 4, lambda: kept.fetch(at, a.reshape(features, BATCH))),
        ("squared norm", a.nbytes, lambda: ops.squared_norm(a)),
    ]
    # A backend without a fused step of an optimizer does it in pieces with NumPy, which are not measured.
    if (adam := ops.fused("adam")) is not None:
        work.append(("Adam", 7 * a.nbytes, partial(adam, a, b, c, d, 1e-3, 1.0, 0.9, 0.999, 1e-8, 0.0, 1.0)))
    if (momentum := ops.fused("momentum")) is not None:
        work.append(("momentum", 5 * a.nbytes, partial(momentum, a, b, c, 1e-3, 0.9, 0.0, False)))
    table = []
    for name, nbytes, each in work:
        kernel_seconds, copy_seconds = _seconds(ops, repeats, each, copy)
        rates, copies = [nbytes / t / 1e9 for t in kernel_seconds], [2 * a.nbytes / t / 1e9 for t in copy_seconds]
        figures = {"megabytes": nbytes / 1e6, "gb_per_s": median(rates), "copy_gb_per_s": median(copies)}
        table.append({"name": name, **figures, **_shares(rates, copies)})
    return table


def measure_cells(ops: NumpyOps, repeats: int) -> list[dict[str, Any]]:
    """Measure GFLOP/s of the forward and the backward pass through a layer of recurrent cells of each kind.

    Each row has medians, and the median and quartiles of the ratio to a matrix product.
    """
    dtype, (units, steps, batch), table = np.dtype(np.float32), SEQUENCES, []
    rng = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return ops.put((rng.standard_normal(shape, np.float32) / np.float32(units**0.5)).astype(dtype))

    for kind in CELLS:
        cells = ops.recurrence(kind, units, dtype)
        rows = cells.gates * units
        u, x, product = some(rows, units), some(units, steps * batch), some(rows, steps * batch)
        start, h, dh = some(rows, steps, batch), some(units, steps, batch), some(units, steps, batch)
        more = some(max(1, cells.kept), units, steps, batch)[: cells.kept]
        before, carry, a = some(cells.carried, units, batch), some(cells.carried, units, batch), some(*start.shape)
        cells.prepare(u)
        forward = partial(cells.forward, a, None, before, h, more, None)

        def restart(a: np.ndarray = a, start: np.ndarray = start) -> None:
            a[...] = start

        def again(restart: Callable[[], None] = restart, forward: Callable[[], None] = forward) -> None:
            # A backward pass overwrites its inputs: without new ones numbers would soon be subnormal, which are slow.
            restart()
            forward()

        ways: list[tuple[str, Callable[[], None], Callable[[], None]]] = [
            ("states", forward, restart),
            ("gradients", partial(cells.backward, a, before, h, more, dh, carry, None), again),
        ]
        work = 2 * rows * units * steps * batch / 1e9
        for name, way, ready in ways:
            cell_seconds, product_seconds = _seconds(ops, repeats, way, partial(ops.matmul, u, x, product), ready=ready)
            rates, products = ([work / t for t in times] for times in (cell_seconds, product_seconds))
            figures = {"gflop_per_s": median(rates), "product_gflop_per_s": median(products)}
            table.append({"name": f"{name} of {kind}", **figures, **_shares(rates, products)})
    return table


def _seconds(
    ops: NumpyOps, repeats: int, *calls: Callable[[], Any], ready: Callable[[], None] | None = None
) -> list[list[float]]:
    """The seconds of each call, in rounds that call them in turn, after a warm-up round.

    ready: called before each round, and not timed.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        if ready is not None:
            ready()
        for call, into in zip(calls, times, strict=True):
            ops.synchronize()
            start = time.perf_counter()
            call()
            ops.synchronize()
            into.append(time.perf_counter() - start)
    return [each[1:] for each in times]


def _shares(rates: list[float], others: list[float]) -> dict[str, float]:
    """The median and the quartiles of rate / other."""
    shares = [rate / other for rate, other in zip(rates, others, strict=True)]
    low, _, high = quantiles(shares, n=4) if len(shares) > 1 else shares * 3
    return {"share": median(shares), "low": low, "high": high}


def _show(rows: list[dict[str, Any]], ops: NumpyOps) -> None:
    from rich.table import Table

    table = Table(title=f"operations that memory bounds, backend {ops.description}", title_justify="left")
    table.add_column("operation")
    for name in ("MB", "GB/s", "copy GB/s", "share of the copy", "quartiles"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (f"{row['megabytes']:.0f}", f"{row['gb_per_s']:.1f}", f"{row['copy_gb_per_s']:.1f}")
        table.add_row(row["name"], *figures, f"{row['share']:.2f}", f"{row['low']:.2f}-{row['high']:.2f}")
    Screen().print(table)


def _show_cells(rows: list[dict[str, Any]], ops: NumpyOps) -> None:
    from rich.table import Table

    units, steps, batch = SEQUENCES
    title = f"recurrent cells, {units} units, {steps} steps, {batch} samples, backend {ops.description}"
    table = Table(title=title, title_justify="left")
    table.add_column("operation")
    for name in ("GFLOP/s", "product GFLOP/s", "share of the product", "quartiles"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (f"{row['gflop_per_s']:.1f}", f"{row['product_gflop_per_s']:.1f}", f"{row['share']:.2f}")
        table.add_row(row["name"], *figures, f"{row['low']:.2f}-{row['high']:.2f}")
    Screen().print(table)
