"""Compare a step of a linear head of very many classes, tile by tile, with PyTorch's, which has all scores at once."""

from __future__ import annotations

import json as jsonlib
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import numpy as np

from psmpi.backend import make_backend
from psmpi.errors import UserError
from psmpi.nn.head import Head
from psmpi.nn.losses import LOSSES, make_loss
from psmpi.nn.model import Model
from psmpi.nn.network import build
from psmpi.nn.tiles import TiledObjective
from psmpi.optim import Hyper, make_optimizer
from psmpi.optim.first_order import FirstOrder
from psmpi.output import Screen, tell

Call = Callable[[], None]
# Classes, features, samples, and the factor of cosines in the scores (0: the scores are products).
Shape = tuple[int, int, int, float]
Loss = Literal["bce", "psl", "logistic", "nll", "squared", "hinge"]
LR = 1e-3
# Suffix of the name of a loss: Adam steps the rows tile by tile.
IN_TILES = ", in tiles"


def head(
    classes: int = 60_000,
    features: int = 128,
    batch_size: int = 256,
    losses: tuple[Loss, ...] = ("bce", "psl", "logistic", "nll"),
    scale: float = 0.0,
    pairs: int = 7,
    threads: int = 1,
    json: str = "",
) -> int:
    """Measure a step of a head of many classes beside PyTorch's cross-entropy.

    A step has scores, loss, gradients, also of the features, and Adam. PyTorch takes Linear, cross_entropy and fused
    Adam. Where the loss allows it, Adam can step the rows of a tile while these are in the cache (--clip 0 in a
    training); both ways are measured. Memory is the peak of a separate process, less the memory of its loaded
    libraries. Needs psmpi[torch].

    Args:
        classes: Rows of weights.
        features: Inputs of each row.
        batch_size: Samples of a minibatch.
        losses: Losses of psmpi; PyTorch has cross-entropy.
        scale: Factor of cosine scores, of both. 0: plain products.
        pairs: Measurements of each, psmpi and PyTorch in turn, after a warm-up.
        threads: Threads of both.
        json: File for the figures, in JSON.
    """
    from threadpoolctl import threadpool_limits

    try:
        import torch
    except ImportError:
        raise UserError("bench head compares with PyTorch: pip install 'psmpi[torch]'") from None
    settings = (("--classes", classes), ("--features", features), ("--batch-size", batch_size), ("--pairs", pairs))
    for option, value in (*settings, ("--threads", threads)):
        if value < 1:
            raise UserError(f"{option} {value}: expected a whole number from 1 up")
    if classes < 2:
        raise UserError(f"--classes {classes}: expected 2 or more")
    if not 0 <= scale <= 1e6:
        raise UserError(f"--scale {scale:g}: expected a number above 0, or 0 for none")
    torch.set_num_threads(threads)
    shape = (classes, features, batch_size, scale)
    with threadpool_limits(threads):
        other, _ = pytorch_step(*shape)
        named = [name + more for name in losses for more in ("", IN_TILES)[: 1 + LOSSES[name].immediate]]
        rows = [_measure(name, own_step(name, *shape, threads)[0], other, pairs) for name in named]
    del other
    memory = {name: _memory(name, shape, threads) for name in (*named, "PyTorch")}
    figures = {
        "classes": classes, "features": features, "batch_size": batch_size, "scale": scale, "threads": threads,
        "torch": torch.__version__, "rows": rows, "memory_mb": memory,
    }  # fmt: skip
    _show(figures)
    if json:
        Path(json).write_text(jsonlib.dumps(figures) + "\n")
    return 0


def _problem(classes: int, features: int, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random weights (classes, features) and features (features, batch), float32, and labels (batch,)."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((classes, features), np.float32) / np.float32(np.sqrt(features))
    return w, rng.standard_normal((features, batch), np.float32), rng.integers(0, classes, batch)


def own_step(loss: str, classes: int, features: int, batch: int, scale: float, threads: int) -> tuple[Call, np.ndarray]:
    """Return a step of psmpi, which also computes the gradient of the features, and its weights (classes, features).

    loss: the name of a loss, perhaps with the suffix IN_TILES.
    """
    ops, dtype = make_backend("auto", threads), np.dtype(np.float32)
    kind = {"type": "cosine", "scale": scale, "units": classes} if scale else {"type": "dense", "units": classes}
    network = build("head", (features,), [kind], classes)
    layout = network.layout()
    rows, x, labels = _problem(classes, features, batch)
    w, g = ops.zeros(layout.size, dtype), ops.zeros(layout.size, dtype)
    model = Model(network, layout, w, g, ops, tiled=True)
    name, in_tiles = loss.removesuffix(IN_TILES), loss.endswith(IN_TILES)
    made = make_loss(name, dtype, outputs=classes)
    made.scale = scale
    objective = TiledObjective(made, model)
    objective.below = True
    head = objective.tail
    assert isinstance(head, Head)
    head.weights[...] = rows
    del rows
    objective.reserve(classes, batch)
    optimizer = make_optimizer("adam", layout.size, dtype, Hyper(), ops)
    assert isinstance(optimizer, FirstOrder)
    if in_tiles:
        objective.step_in_tiles(lambda at, gradient: optimizer.step_piece(w, gradient, LR, at))

    def step() -> None:
        if in_tiles:
            optimizer.begin()
        tape = model.forward(x)
        objective.losses(tape.scores, labels, 1 / batch)
        objective.value()
        if not in_tiles:
            optimizer.step(w, g, LR, lambda values: values)

    return step, head.weights


def pytorch_step(classes: int, features: int, batch: int, scale: float) -> tuple[Call, Any]:
    """Return the same step in PyTorch, with cross-entropy, and its layer."""
    import torch
    from torch import nn

    rows, x, labels = _problem(classes, features, batch)
    layer = nn.Linear(features, classes, bias=not scale)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(rows))
        if layer.bias is not None:
            layer.bias.zero_()
    del rows
    optimizer = torch.optim.Adam(layer.parameters(), lr=LR, fused=True)
    h, y = torch.from_numpy(np.ascontiguousarray(x.T)).requires_grad_(), torch.from_numpy(labels)

    def scores() -> Any:
        if not scale:
            return layer(h)
        rows, unit = (nn.functional.normalize(values, dim=1) for values in (layer.weight, h))
        return scale * nn.functional.linear(unit, rows)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        h.grad = None
        nn.functional.cross_entropy(scores(), y).backward()
        optimizer.step()

    return step, layer


def _measure(name: str, own: Call, reference: Call, pairs: int) -> dict[str, Any]:
    """Time two steps in turn; return the medians in milliseconds, and the ratio with its quartiles."""
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(pairs + 1):
        for each, into in zip((own, reference), times, strict=True):
            start = time.perf_counter()
            each()
            if k:
                into.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    row = {"loss": name, "psmpi_ms": 1e3 * median(times[0]), "pytorch_ms": 1e3 * median(times[1])}
    tell(f"{name}: {row['psmpi_ms']:.0f} ms, PyTorch {row['pytorch_ms']:.0f} ms, ratio {middle:.2f}")
    return {**row, "ratio": middle, "low": low, "high": high}


def _memory(name: str, shape: Shape, threads: int) -> float:
    """MB that a separate process needs for some steps; UserError if it ends early."""
    context = multiprocessing.get_context("spawn")
    receiver, its = context.Pipe(duplex=False)
    process = context.Process(target=_steps, args=(its, name, shape, threads))
    process.start()
    its.close()
    try:
        nbytes: float = receiver.recv()
    except EOFError:
        raise UserError(
            f"the process that measures the memory of {name} ended early: use smaller sizes if memory is short"
        ) from None
    finally:
        process.join()
    return nbytes


def _steps(answer: Any, name: str, shape: Shape, threads: int) -> None:
    """Send the MB by which this process grows in some steps, after a small step that loads the libraries."""
    small = (64, *shape[1:])
    if name == "PyTorch":
        import torch

        torch.set_num_threads(threads)
        pytorch_step(*small)[0]()
    else:
        own_step(name, *small, threads)[0]()
    before = _held("VmRSS")
    step, _ = pytorch_step(*shape) if name == "PyTorch" else own_step(name, *shape, threads)
    for _ in range(3):
        step()
    answer.send(_held("VmHWM") - before)


def _held(name: str) -> float:
    """MB that this process holds (VmRSS), or has held at most (VmHWM), from Linux's /proc."""
    # The maximum of the resource module includes that of the parent process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e6


def _show(figures: dict[str, Any]) -> None:
    from rich.table import Table

    cosines = f", cosines times {figures['scale']:g}" if figures["scale"] else ""
    sizes = f"{figures['classes']} classes, {figures['features']} features, {figures['batch_size']} samples"
    title = f"{sizes}{cosines}; PyTorch"
    table = Table(title=f"{title} {figures['torch']}", title_justify="left")
    table.add_column("loss")
    for name in ("psmpi ms", "PyTorch ms", "ratio", "quartiles", "psmpi MB", "PyTorch MB"):
        table.add_column(name, justify="right")
    memory = figures["memory_mb"]
    for row in figures["rows"]:
        table.add_row(
            row["loss"],
            f"{row['psmpi_ms']:.0f}",
            f"{row['pytorch_ms']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['low']:.2f} {row['high']:.2f}",
            f"{memory[row['loss']]:.0f}",
            f"{memory['PyTorch']:.0f}",
        )
    Screen().print(table)
