"""Compare a training step of a sparse network with SciPy's and PyTorch's products of matrices in compressed rows."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from psmpi.bench.beside import take_turns
from psmpi.errors import UserError
from psmpi.layout import Pattern, radix_pattern, radix_strides, random_pattern
from psmpi.output import Screen, check_files

# Largest rounding error of the last layer's outputs, relative to the largest output.
TOLERANCE = 1e-3
Step = Callable[[], object]


def sparse(
    units: int = 1024,
    depth: int = 120,
    fan_in: int = 32,
    pattern: str = "radix",
    batch_size: int = 64,
    threads: int = 1,
    rounds: int = 15,
    json: str = "",
) -> int:
    """Time a step of sparse layers with ReLU in one process, float32.

    A step is forward, backward and all gradients. SciPy's and PyTorch's products with matrices in compressed rows take
    turns with it, where they are installed: W x, W^T dy by a matrix of its own, and for each weight the product of a
    row of dy with one of x. SciPy gathers these rows, PyTorch samples the products of the pattern.

    Args:
        units: Units of a layer.
        depth: Number of layers.
        fan_in: Connections of a unit.
        pattern: Pattern of the connections: radix, the layers of mixed-radix systems in turn, or random.
        batch_size: Samples of a minibatch.
        threads: Threads of psmpi and of PyTorch. SciPy's products have one.
        rounds: Measurements of each; the median counts, and the least and the largest are shown.
        json: File for the figures, in JSON.
    """
    from threadpoolctl import threadpool_limits

    for option, value in (("--units", units), ("--depth", depth), ("--fan-in", fan_in), ("--batch-size", batch_size),
                          ("--threads", threads), ("--rounds", rounds)):  # fmt: skip
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    if pattern not in ("radix", "random") or fan_in > units:
        raise UserError(
            f"--pattern {pattern} --fan-in {fan_in}: expected radix or random, and at most {units} connections a unit"
        )
    check_files(json=json)
    strides = radix_strides(units, max(2, fan_in))
    layers = [
        radix_pattern(units, fan_in, strides[k % len(strides)])
        if pattern == "radix"
        else random_pattern(units, units, fan_in, (0, k))
        for k in range(depth)
    ]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((units, batch_size)).astype(np.float32)
    weights = [(rng.uniform(-1, 1, one.size) * np.sqrt(6 / fan_in)).astype(np.float32) for one in layers]
    calls: dict[str, Step] = {}
    with threadpool_limits(threads):
        calls["psmpi"], expected = _psmpi_step(layers, weights, x, threads)
        for name, make in (("SciPy", _scipy), ("PyTorch", _pytorch)):
            try:
                calls[name], gradients = make(layers, weights, x, threads)
            except ImportError:
                continue
            off = abs(gradients - expected).max() / abs(expected).max()
            if not off <= TOLERANCE:
                raise UserError(f"{name} has other outputs, by {off:.1e}: its times would be of another network")
        times = take_turns(calls, rounds)
        floor = _floor(layers, batch_size)
    _show(times, floor, f"{depth} x {units} units, {fan_in} inputs each, {pattern}, {batch_size} samples")
    if json:
        Path(json).write_text(jsonlib.dumps({"ms": times, **floor}) + "\n")
    return 0


def _psmpi_step(
    layers: list[Pattern], weights: list[np.ndarray], x: np.ndarray, threads: int
) -> tuple[Step, np.ndarray]:
    """Return a step of psmpi, and the outputs of the last sparse layer (units, b)."""
    from psmpi.backend import make_backend
    from psmpi.nn.model import Model
    from psmpi.nn.network import build

    tables: list[dict[str, Any]] = []
    for one in layers:
        tables += [{"type": "sparse", "units": one.rows, "pattern": one.packed(), "bias": False}, {"type": "relu"}]
    network = build("sparse", x.shape[:1], [*tables, {"type": "dense", "units": 1}], 1)
    # A network must end with a layer of scores: the model leaves it out.
    some, layout = (0, len(tables)), network.layout()
    w = np.concatenate(weights)
    model = Model(network, layout, w, np.zeros_like(w), make_backend("auto", threads), layers=some)
    dy, dx = np.empty((layers[-1].rows, x.shape[1]), np.float32), np.empty_like(x)

    def step() -> None:
        tape = model.forward(x)
        dy.fill(1)
        model.backward(tape, dy, dx=dx)

    outputs: np.ndarray = model.forward(x).scores.copy()
    return step, outputs


def _scipy(layers: list[Pattern], weights: list[np.ndarray], x: np.ndarray, threads: int) -> tuple[Step, np.ndarray]:
    """The step by scipy.sparse. Gradients of weights are gathered from dense products, which is fastest."""
    from scipy.sparse import csr_array

    ahead, back = [], []
    for one, w in zip(layers, weights, strict=True):
        shape, turned = (one.rows, one.inputs), one.transposed
        ahead.append(csr_array((w, one.columns, one.starts.astype(np.int32)), shape))
        back.append(csr_array((w[turned.entries], turned.rows, turned.starts.astype(np.int32)), shape[::-1]))
    entries = [(one.row_numbers.astype(np.int64) * one.inputs + one.columns) for one in layers]
    gradients = [np.empty_like(w) for w in weights]
    product = np.empty((layers[0].rows, layers[0].inputs), np.float32)

    def forward() -> list[np.ndarray]:
        outputs = [x]
        for matrix in ahead:
            y = matrix @ outputs[-1]
            outputs.append(np.maximum(y, 0, out=y))
        return outputs

    def step() -> None:
        outputs = forward()
        dy = np.ones_like(outputs[-1])
        for k in range(len(layers) - 1, -1, -1):
            dy *= outputs[k + 1] > 0
            np.matmul(dy, outputs[k].T, out=product)
            np.take(product, entries[k], out=gradients[k])
            np.take(weights[k], layers[k].transposed.entries, out=back[k].data)
            dy = back[k] @ dy

    return step, forward()[-1]


def _pytorch(layers: list[Pattern], weights: list[np.ndarray], x: np.ndarray, threads: int) -> tuple[Step, np.ndarray]:
    """The step by torch.sparse. It does without autograd, whose gradients would be dense."""
    import warnings

    import torch

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", "Sparse ")
    ahead, back, orders = [], [], []
    for one, w in zip(layers, weights, strict=True):
        turned, size = one.transposed, (one.rows, one.inputs)
        order = torch.from_numpy(turned.entries.astype(np.int64))
        arrays = (one.starts.astype(np.int32), one.columns.copy(), turned.starts.astype(np.int32), turned.rows.copy())
        starts, columns, back_starts, rows = map(torch.from_numpy, arrays)
        values = torch.from_numpy(w)
        ahead.append(torch.sparse_csr_tensor(starts, columns, values, size))
        back.append(torch.sparse_csr_tensor(back_starts, rows, values[order], size[::-1]))
        orders.append(order)
    samples = torch.from_numpy(x)

    def forward() -> list[Any]:
        outputs = [samples]
        for matrix in ahead:
            outputs.append((matrix @ outputs[-1]).relu_())
        return outputs

    @torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
    def step() -> None:
        outputs = forward()
        dy, gradients = torch.ones_like(outputs[-1]), []
        for k in range(len(layers) - 1, -1, -1):
            dy = dy * (outputs[k + 1] > 0)
            gradients.append(torch.sparse.sampled_addmm(ahead[k], dy, outputs[k].T, beta=0.0))
            torch.index_select(ahead[k].values(), 0, orders[k], out=back[k].values())
            dy = back[k] @ dy

    outputs: np.ndarray = forward()[-1].numpy()
    return step, outputs


def _floor(layers: list[Pattern], batch: int) -> dict[str, float]:
    """The GFLOP of a step, the GFLOP/s of a product of dense matrices, and the GB that the entries read in a step.

    Each entry reads a row of x in the forward pass and a row of dy in the backward pass. Outputs, gradients and weights
    are not counted.
    """
    n, rng = 1024, np.random.default_rng(1)
    a, b = (rng.standard_normal((n, n)).astype(np.float32) for _ in range(2))
    out = np.empty_like(a)
    (times,) = take_turns({"product": lambda: np.matmul(a, b, out=out)}, 7).values()
    entries = sum(one.size for one in layers)
    macs = 3.0 * entries * batch
    return {"GFLOP": 2e-9 * macs, "GFLOP/s dense": 2e-6 * n**3 / min(times), "GB": 1e-9 * 2 * entries * batch * 4}


def _show(times: dict[str, list[float]], floor: dict[str, float], title: str) -> None:
    from rich.table import Table

    screen = Screen()
    table = Table(title=f"ms a step, median (least to largest): {title}", title_justify="left")
    for name in ("by", "ms", "GFLOP/s", "of psmpi's"):
        table.add_column(name, justify="right")
    psmpi_median = median(times["psmpi"])
    for name, seconds in times.items():
        ms = median(seconds)
        spread = f"{ms:.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        table.add_row(name, spread, f"{floor['GFLOP'] / ms * 1e3:.1f}", f"{ms / psmpi_median:.2f}")
    screen.print(table)
    least = 1e3 * floor["GFLOP"] / floor["GFLOP/s dense"]
    screen.print(
        f"a step is {floor['GFLOP']:.2f} GFLOP, at the {floor['GFLOP/s dense']:.0f} GFLOP/s of a dense product "
        f"{least:.0f} ms: psmpi takes {psmpi_median / least:.1f} times that (the least "
        f"{min(times['psmpi']) / least:.1f}), and reads rows of samples at {floor['GB'] / psmpi_median * 1e3:.0f} GB/s"
    )
    others = [seconds for name, seconds in times.items() if name != "psmpi"]
    if others:
        medians, least_times = psmpi_median / min(map(median, others)), min(times["psmpi"]) / min(map(min, others))
        screen.print(
            f"psmpi takes {medians:.2f} of the time of the best of the others, {least_times:.2f} by the least times"
        )
