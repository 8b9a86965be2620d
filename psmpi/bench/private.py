"""Compare steps of a partitioned network of very many classes: private layers by tiles of classes, and all at once."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import numpy as np

from psmpi.backend import make_backend
from psmpi.bench.problems import LR, Minibatch, Problem
from psmpi.bench.pytorch import pytorch_step
from psmpi.errors import UserError
from psmpi.nn.init import initial_weights
from psmpi.nn.losses import LOSSES, make_loss
from psmpi.nn.model import Model
from psmpi.nn.objective import Objective
from psmpi.nn.tiles import TiledObjective
from psmpi.nn.zoo import make_network
from psmpi.optim import Hyper, make_optimizer
from psmpi.optim.first_order import FirstOrder
from psmpi.output import Screen, check_files, tell

Call = Callable[[], None]
Loss = Literal["bce", "psl", "logistic", "nll", "squared", "hinge"]
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
# The ways to compute a step, which are compared with AT_ONCE. With IN_TILES Adam steps the weights of a tile while they
# are in the cache.
AT_ONCE, BY_TILES, IN_TILES, PYTORCH = "all at once", "by tiles", "stepped in tiles", "PyTorch"


def private(
    images: Literal["mnist", "cifar10"] = "mnist",
    classes: int = 1000,
    batch_size: int = 100,
    losses: tuple[Loss, ...] = ("psl", "nll", "bce"),
    pairs: int = 7,
    threads: int = 1,
    pytorch: bool = False,
    json: str = "",
) -> int:
    """Measure a step of a PSNet of many classes, all classes at once and by tiles of classes, in turn.

    A step has passes, loss and Adam. A training uses tiles where the private layers of all its classes would not fit
    the caches. Memory is that of weights, gradients, optimizer, activations and buffers. PyTorch, with channels last,
    has psl and nll.

    Args:
        images: Shape of the images, and of the PSNet.
        classes: Classes of the network.
        batch_size: Samples of a minibatch.
        losses: Losses to measure.
        pairs: Measurements of each way, in turn, after a warm-up.
        threads: Number of threads.
        pytorch: Measure PyTorch too. Needs psmpi[torch].
        json: File for the figures, in JSON.
    """
    from threadpoolctl import threadpool_limits

    settings = (("--batch-size", batch_size, 1), ("--pairs", pairs, 1), ("--threads", threads, 1))
    for option, value, least in (("--classes", classes, 2), *settings):
        if value < least:
            raise UserError(f"{option} {value}: expected a whole number from {least} up")
    check_files(json=json)
    rows = []
    with threadpool_limits(threads):
        for loss in losses:
            problem = Problem(make_network("psnet", SHAPES[images], classes), loss, tuple(range(classes)))
            steps, sizes = make_steps(problem, batch_size, threads, pytorch)
            rows += _measured(loss, steps, sizes, pairs)
    figures = {"images": images, "classes": classes, "batch_size": batch_size, "threads": threads, "rows": rows}
    _show(figures)
    if json:
        Path(json).write_text(jsonlib.dumps(figures) + "\n")
    return 0


def make_steps(
    problem: Problem, batch: int, threads: int, pytorch: bool = False
) -> tuple[dict[str, Call], dict[str, float]]:
    """Return a step for each way, all from the same weights, and the megabytes that psmpi's ways hold."""
    data, steps, sizes = Minibatch(problem, batch), {}, {}
    for way in (AT_ONCE, BY_TILES, *([IN_TILES] if LOSSES[problem.loss].immediate else [])):
        steps[way], model, sizes[way] = own_step(problem, data, threads, way)
        if way == AT_ONCE and pytorch and problem.loss in ("psl", "nll"):
            try:
                import torch
            except ImportError:
                raise UserError("--pytorch needs PyTorch: pip install 'psmpi[torch]'") from None
            torch.set_num_threads(threads)
            steps[PYTORCH], _ = pytorch_step(problem, data, model, "channels last")
    return steps, sizes


def own_step(problem: Problem, data: Minibatch, threads: int, way: str) -> tuple[Call, Model, float]:
    """Return a step of psmpi, its model, and the megabytes that it holds."""
    network, b = problem.network, len(data.labels)
    layout, ops = network.layout(), make_backend("auto", threads)
    w = np.zeros(layout.size, np.float32)
    initial_weights(network, layout, layout.part(range(network.classes)), w, seed=0)
    g = np.zeros_like(w)
    model = Model(network, layout, w, g, ops, tiled=way != AT_ONCE)
    loss = make_loss(problem.loss, w.dtype, outputs=network.classes)
    objective = Objective(loss, model) if way == AT_ONCE else TiledObjective(loss, model)
    optimizer = make_optimizer("adam", w.size, w.dtype, Hyper(), ops)
    assert isinstance(optimizer, FirstOrder)
    model.reserve(b)
    objective.reserve(network.classes, b)
    early = slice(0, 0)
    if way == IN_TILES and isinstance(objective, TiledObjective):
        early = objective.tail.run(0, network.classes)
        objective.step_in_tiles(lambda at, gradient: optimizer.step_piece(w, gradient, LR, at))
    x = np.ascontiguousarray(data.x.reshape(b, -1).T)
    labels = data.labels.astype(np.int64)

    def step() -> None:
        if way == IN_TILES:
            optimizer.begin()
        tape = model.forward(x)
        objective.derive(tape, tape.scores.reshape(-1, b), labels, 1 / b)
        objective.value()
        if way != IN_TILES:
            optimizer.step(w, g, LR, lambda values: values)
            return
        for at in (slice(0, early.start), slice(early.stop, w.size)):
            optimizer.step_piece(w, g[at], LR, at)

    # With IN_TILES only the gradient of one tile is ever written, so the others take no memory.
    vectors = 4 * w.nbytes - (early.stop - early.start) * w.itemsize
    held = vectors + model.activation_bytes + model.buffer_bytes + objective.nbytes
    return step, model, (held + (objective.tail.activation_bytes if objective.tail is not None else 0)) / 1e6


def _measured(loss: str, steps: Mapping[str, Call], sizes: Mapping[str, float], pairs: int) -> list[dict[str, Any]]:
    """Time the steps in turn. A row for each way has medians, and the ratio to AT_ONCE with its quartiles."""
    times: dict[str, list[float]] = {way: [] for way in steps}
    for k in range(pairs + 1):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            if k:
                times[way].append(time.perf_counter() - start)
    rows: list[dict[str, Any]] = []
    for way, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[AT_ONCE], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "loss": loss, "way": way, "ms": 1e3 * median(seconds), "ratio": middle, "low": low, "high": high,
                "megabytes": sizes.get(way),
            }
        )  # fmt: skip
    said = (f"{row['way']} {row['ms']:.0f} ms" for row in rows)
    tell(f"{loss}: {', '.join(said)}")
    return rows


def _show(figures: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"PSNet for {figures['images']}, {figures['classes']} classes, {figures['batch_size']} samples"
    table = Table(title=title, title_justify="left")
    table.add_column("loss")
    table.add_column("private layers")
    for name in ("ms", "ratio", "quartiles", "MB"):
        table.add_column(name, justify="right")
    for row in figures["rows"]:
        size = "" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
        span = f"{row['low']:.2f} {row['high']:.2f}"
        table.add_row(row["loss"], row["way"], f"{row['ms']:.0f}", f"{row['ratio']:.2f}", span, size)
    Screen().print(table)
