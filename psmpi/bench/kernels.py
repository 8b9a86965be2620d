"""Bytes over time of the operations that memory bounds, beside a copy on the same backend."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps, make_backend
from psmpi.bench.compute import Backend
from psmpi.errors import UserError
from psmpi.output import Screen

# Samples of the images and scores that are measured.
BATCH = 256


def kernels(backend: Backend = "auto", megabytes: int = 64, repeats: int = 20, threads: int = 1, json: str = "") -> int:
    """Measure the operations whose time is that of reading and writing their arrays, in float32.

    Bytes are those that must move, each array read or written once. A copy of as many is measured in turn with each.

    Args:
        backend: The array library.
        megabytes: Size of the largest array of an operation; small ones are in the caches.
        repeats: Measurements of each, the operation and a copy in turn, after a warm-up.
        threads: Threads of the processor.
        json: Also write the figures into this file.
    """
    from threadpoolctl import threadpool_limits

    for option, value in (("--megabytes", megabytes), ("--repeats", repeats), ("--threads", threads)):
        if value < 1:
            raise UserError(f"{option} {value}: expected a whole number from 1 up")
    with threadpool_limits(threads):
        ops = make_backend(backend, threads)
        rows = measure(ops, megabytes * 10**6 // 4, repeats)
    _show(rows, ops)
    if json:
        with open(json, "w") as file:
            file.write(jsonlib.dumps({"backend": ops.description, "megabytes": megabytes, "rows": rows}) + "\n")
    return 0


def measure(ops: NumpyOps, size: int, repeats: int) -> list[dict[str, Any]]:
    """Medians and quartiles of GB/s, of each operation that this backend has, on arrays of about `size` float32."""
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
    # Without a fused pass the optimizer does these in pieces, with NumPy.
    if (adam := ops.fused("adam")) is not None:
        work.append(("Adam", 7 * a.nbytes, partial(adam, a, b, c, d, 1e-3, 1.0, 0.9, 0.999, 1e-8, 0.0, 1.0)))
    if (momentum := ops.fused("momentum")) is not None:
        work.append(("momentum", 5 * a.nbytes, partial(momentum, a, b, c, 1e-3, 0.9, 0.0, False)))
    found = []
    for name, nbytes, each in work:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):
            for call, into in zip((each, copy), times, strict=True):
                ops.synchronize()
                start = time.perf_counter()
                call()
                ops.synchronize()
                into.append(time.perf_counter() - start)
        rates = [nbytes / t / 1e9 for t in times[0][1:]]
        copies = [2 * a.nbytes / t / 1e9 for t in times[1][1:]]
        shares = [mine / theirs for mine, theirs in zip(rates, copies, strict=True)]
        low, _, high = quantiles(shares, n=4) if len(shares) > 1 else shares * 3
        found.append(
            {
                "name": name, "megabytes": nbytes / 1e6, "gb_per_s": median(rates), "copy_gb_per_s": median(copies),
                "share": median(shares), "low": low, "high": high,
            }
        )  # fmt: skip
    return found


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
