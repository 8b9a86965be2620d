"""Compare training steps of psmpi with PyTorch's in one process, on the processor or a GPU."""

from __future__ import annotations

import json as jsonlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import numpy as np

from psmpi.backend import NumpyOps, make_backend
from psmpi.bench.problems import LR, Minibatch, Problem, operations, problems
from psmpi.bench.pytorch import Kind, pytorch_step
from psmpi.comm.world import cores, quota
from psmpi.errors import UserError, unused_option
from psmpi.layout import Runs
from psmpi.nn.init import initial_weights
from psmpi.nn.losses import make_loss
from psmpi.nn.model import Model
from psmpi.nn.objective import Objective
from psmpi.optim import Hyper, make_optimizer
from psmpi.output import Screen, check_files, tell

Call = Callable[[], None]
Backend = Literal["auto", "numpy", "compiled", "cupy"]
Compute = Literal["float32", "tf32", "float16", "bfloat16"]
Convolution = Literal["own", "cudnn", "measured"]


def psmpi_step(
    problem: Problem,
    data: Minibatch,
    backend: Backend,
    threads: int = 1,
    compute: Compute = "float32",
    convolution: Convolution = "own",
) -> tuple[Call, np.ndarray, Model]:
    """Return a step of psmpi, its weights, and the model. On a device the step is asynchronous."""
    network, classes = problem.network, problem.classes
    layout = network.layout()
    part: Runs = layout.part(classes)
    ops = make_backend(backend, threads, compute=compute, convolution=convolution)

    start = np.zeros(part.size, np.float32)
    initial_weights(network, layout, part, start, seed=0)
    w, g = ops.put(start), ops.zeros(part.size, start.dtype)
    model = Model(network, layout, w, g, ops, classes)
    b = len(data.labels)
    others = None if len(classes) == network.classes else OtherClasses(data, classes, ops)
    objective = Objective(make_loss(problem.loss, w.dtype), model, others)
    optimizer = make_optimizer("adam", part.size, w.dtype, Hyper(), ops)
    objective.reserve(len(classes), b)
    x = ops.put(np.ascontiguousarray(data.x.reshape(b, -1).T))
    labels = ops.put(data.labels.astype(np.int64) - classes[0])

    def passes() -> None:
        tape = model.forward(x)
        objective.derive(tape, tape.scores, labels, 1 / b)

    recorded = objective.record(passes)

    def step() -> None:
        recorded()
        optimizer.step(w, g, LR, lambda values: values)

    return step, w, model


class OtherClasses:
    """Stand-in for the ranks with the other classes, with fixed scores, in a step of psl on some classes."""

    def __init__(self, data: Minibatch, classes: Sequence[int], ops: NumpyOps):
        labels, samples = data.labels, np.arange(len(data.labels))
        scores = data.other_scores.astype(np.float64)
        absent = ~np.isin(labels, classes)
        self.label_scores = ops.put(np.where(absent, scores[labels, samples], 0)[None])
        # The label's own score has no term in the sum: exp(-inf) = 0.
        scores[labels, samples] = -np.inf
        self.scores = ops.put(np.delete(scores, classes, axis=0))
        self.known = ops.zeros(len(labels), np.dtype(np.float64)).reshape(1, -1)

    def summed(self, summary: np.ndarray, labels: np.ndarray) -> np.ndarray:
        known: np.ndarray = self.known
        known[...] = summary + self.label_scores
        return known

    def add(self, values: np.ndarray) -> None:
        values += np.exp(self.scores - self.known).sum(axis=0) / len(values)


@dataclass(frozen=True)
class Row:
    """Medians over all pairs of measurements. ratio, low, high: median and quartiles of psmpi's time / PyTorch's."""

    network: str
    kind: str
    psmpi_ms: float
    pytorch_ms: float
    ratio: float
    low: float
    high: float
    psmpi_gflops: float
    pytorch_gflops: float


def compute(
    networks: tuple[
        Literal["mnist-psnet", "cifar10-psnet", "mnist-lenet", "separable-psnet", "mlp", "one-class"], ...
    ] = ("mnist-psnet", "cifar10-psnet", "mnist-lenet", "separable-psnet", "mlp", "one-class"),
    batch_size: int = 100,
    pairs: int = 20,
    threads: int = 1,
    backend: Backend = "auto",
    compute: Compute = "float32",
    convolution: Convolution = "own",
    compiled: bool = False,
    json: str = "",
    plot: str = "",
) -> int:  # fmt: skip
    """Measure a training step (forward, loss, backward, Adam) beside PyTorch's, in turn.

    PyTorch takes images in its default layout, and with channels last, which is often faster. GFLOP/s count the
    operations of the network as written. Needs psmpi[torch].

    Args:
        networks: Networks to measure.
        batch_size: Samples of a minibatch.
        pairs: Measurements of each, psmpi and PyTorch in turn, after a warm-up.
        threads: Threads of both.
        backend: Backend of psmpi. With cupy, PyTorch computes on the same GPU.
        compute: Arithmetic of matrix products on the GPU, of PyTorch too (autocast, TF32).
        convolution: Convolutions of psmpi on the GPU: its own, cuDNN's, or the faster of both.
        compiled: Measure torch.compile too, where it works.
        json: File for the figures, in JSON.
        plot: File for a plot of the ratios: .png, .pdf or .svg. Needs psmpi[plot].
    """
    from threadpoolctl import threadpool_limits

    try:
        import torch
    except ImportError:
        raise UserError("bench compute compares with PyTorch: pip install 'psmpi[torch]'") from None
    for option, value in (("--batch-size", batch_size), ("--pairs", pairs), ("--threads", threads)):
        if value < 1:
            raise UserError(f"{option} {value}: expected a whole number from 1 up")
    check_files(plot, json=json)
    present = min(len(cores()), quota())
    if compute != "float32" and backend != "cupy":
        raise unused_option(f"--compute {compute}", "--backend", ("cupy",), backend)
    if convolution != "own" and backend != "cupy":
        raise unused_option(f"--convolution {convolution}", "--backend", ("cupy",), backend)
    if threads > present:
        tell(f"note: {threads} threads share {present} core(s): the figures say little")
    torch.set_num_threads(threads)
    rows = []
    with threadpool_limits(threads):
        peak = gemm_peak()
        for name in networks:
            problem = problems()[name]
            data = Minibatch(problem, batch_size)
            step, _, model = psmpi_step(problem, data, backend, threads, compute, convolution)
            images = len(problem.network.in_shape) == 3
            wanted: dict[Kind, bool] = {"eager": True, "channels last": images, "compile": compiled}
            for kind in (kind for kind, yes in wanted.items() if yes):
                try:
                    other, _ = pytorch_step(problem, data, model, kind, compute)
                    other()
                except Exception as error:
                    # torch.compile fails without a C++ compiler, for example.
                    tell(f"{name} ({kind}): PyTorch cannot: {str(error).strip().splitlines()[0]}")
                    continue
                waits = (model.ops.synchronize, torch.cuda.synchronize if model.ops.on_device else lambda: None)
                rows.append(_row(name, kind, (step, other), waits, pairs, operations(problem, batch_size)))
                tell(_line(rows[-1]))
            for line in model.ops.choices:
                tell(line)
    machine = f"{platform.processor() or platform.machine()}, {threads} thread(s)"
    if model.ops.on_device:
        machine = f"{model.ops.description} on {machine}"
    figures = {
        "machine": machine,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "batch_size": batch_size,
        "gemm_gflops": peak,
        "rows": [vars(row) for row in rows],
    }
    _show(rows, figures)
    if json:
        Path(json).write_text(jsonlib.dumps(figures) + "\n")
    if plot:
        _draw(rows, plot, figures)
    return 0


def gemm_peak(n: int = 1536, repeats: int = 5) -> float:
    """GFLOP/s of a float32 matrix product (n, n), the best of `repeats` measurements."""
    a, b = (np.random.default_rng(k).random((n, n), np.float32) for k in range(2))
    c = np.empty_like(a)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        np.matmul(a, b, out=c)
        best = max(best, 2 * n**3 / (time.perf_counter() - start) / 1e9)
    return best


def _row(name: str, kind: str, steps: tuple[Call, Call], waits: tuple[Call, Call], pairs: int, work: float) -> Row:
    # Number of steps in a measurement, which then takes about 50 ms.
    counts = []
    for each, wait in zip(steps, waits, strict=True):
        for _ in range(3):
            each()
        wait()
        start = time.perf_counter()
        each()
        wait()
        counts.append(max(1, int(0.05 / (time.perf_counter() - start))))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(pairs):
        for each, wait, count, into in zip(steps, waits, counts, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                each()
            wait()
            into.append((time.perf_counter() - start) / count)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    own_time, pytorch_time = median(times[0]), median(times[1])
    return Row(
        name,
        kind,
        1e3 * own_time,
        1e3 * pytorch_time,
        median(ratios),
        low,
        high,
        work / own_time / 1e9,
        work / pytorch_time / 1e9,
    )


def _line(row: Row) -> str:
    return f"{row.network} ({row.kind}): {row.psmpi_ms:.2f} ms, PyTorch {row.pytorch_ms:.2f} ms, ratio {row.ratio:.2f}"


def _show(rows: Sequence[Row], speeds: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=f"a step of {speeds['batch_size']} samples; PyTorch {speeds['torch']}", title_justify="left")
    table.add_column("network")
    table.add_column("PyTorch")
    for name in ("psmpi ms", "PyTorch ms", "ratio", "quartiles", "psmpi GFLOP/s", "PyTorch GFLOP/s"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = (f"{row.psmpi_ms:.2f}", f"{row.pytorch_ms:.2f}", f"{row.ratio:.2f}", f"{row.low:.2f}-{row.high:.2f}")
        table.add_row(row.network, row.kind, *figures, f"{row.psmpi_gflops:.0f}", f"{row.pytorch_gflops:.0f}")
    Screen().print(table)
    tell(f"float32 matrix product: {speeds['gemm_gflops']:.0f} GFLOP/s; {speeds['machine']}")


def _draw(rows: Sequence[Row], path: str, figures: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    axis = figure.subplots()
    names = [f"{row.network} ({row.kind})" for row in rows]
    ratios = [row.ratio for row in rows]
    spread = [[row.ratio - row.low for row in rows], [row.high - row.ratio for row in rows]]
    axis.barh(names, ratios, xerr=np.abs(spread))
    axis.axvline(1.0, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.set_xlabel(f"time of psmpi / time of PyTorch {figures['torch']}, {figures['machine']}")
    figure.savefig(path)
