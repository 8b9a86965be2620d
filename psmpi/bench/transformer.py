"""Compare a training step of transformer blocks and a dense layer with its matrix products and with PyTorch's step."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from psmpi.bench.beside import show_beside, take_turns
from psmpi.errors import UserError
from psmpi.output import check_files

# Largest rounding error of the outputs.
TOLERANCE = 1e-3


def transformer(
    blocks: int = 1,
    steps: int = 64,
    width: int = 128,
    heads: int = 4,
    batch_size: int = 32,
    threads: int = 1,
    rounds: int = 15,
    pytorch: bool = False,
    json: str = "",
) -> int:
    """Time forward and backward passes of transformer blocks in one process, float32.

    A dense layer of scores follows the blocks. They take turns with the products of their dense layers, at whose speed
    the products of attention are counted too, and with --pytorch with the same passes of
    torch.nn.TransformerEncoderLayer and Linear.

    Args:
        blocks: Blocks of attention and two dense layers, of 4 times the width between them.
        steps: Steps of a sequence; each attends to those up to itself.
        width: Units of a step.
        heads: Heads of attention.
        batch_size: Samples of a minibatch.
        threads: Threads of psmpi and of PyTorch.
        rounds: Measurements of each; the median counts, and the least and the largest are shown.
        pytorch: Time PyTorch too. Needs psmpi[torch].
        json: File for the figures, in JSON.
    """
    from threadpoolctl import threadpool_limits

    for option, value in (("--blocks", blocks), ("--steps", steps), ("--width", width), ("--heads", heads),
                          ("--batch-size", batch_size), ("--threads", threads), ("--rounds", rounds)):  # fmt: skip
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    if width % heads:
        raise UserError(f"--heads {heads} does not divide the width, {width}")
    check_files(json=json)
    calls: dict[str, Callable[[], object]] = {}
    x = np.random.default_rng(0).standard_normal((width, steps, batch_size)).astype(np.float32)
    with threadpool_limits(threads):
        calls["psmpi"], weights, outputs = _psmpi_step(blocks, heads, x, threads)
        calls["products"], share = _products(blocks, width, steps, batch_size)
        if pytorch:
            calls["PyTorch"], gradients = _pytorch_step(blocks, heads, x, weights, threads)
            calls["psmpi"]()
            off = float(np.abs(gradients - outputs()).max())
            if not off <= TOLERANCE:
                raise UserError(f"PyTorch has other outputs, by {off:.1e}: its times would be of another network")
        times = take_turns(calls, rounds)
    rows = [{"kind": "transformer", "ms": times, "products ms": median(times["products"]) * share}]
    title = f"{blocks} x {width}, {heads} heads, {steps} steps, {batch_size} samples, {threads} thread(s)"
    show_beside(rows, title)
    if json:
        Path(json).write_text(jsonlib.dumps(rows) + "\n")
    return 0


def _psmpi_step(
    blocks: int, heads: int, x: np.ndarray, threads: int
) -> tuple[Callable[[], object], dict[str, np.ndarray], Callable[[], np.ndarray]]:
    """Return a step of psmpi, its weights by name, and a function for its outputs (width, steps, b)."""
    from psmpi.backend import make_backend
    from psmpi.nn.init import initial_weights
    from psmpi.nn.model import Model
    from psmpi.nn.network import build
    from psmpi.nn.transformer import block

    width, steps, b = x.shape
    tables = [*block(width, 4 * width, heads) * blocks, {"type": "dense", "units": width}]
    network = build("transformer", (width, steps), tables, width, by_step=True)
    layout = network.layout()
    w = np.empty(layout.size, np.float32)
    initial_weights(network, layout, layout.part(range(width)), w, seed=0)
    model = Model(network, layout, w, np.zeros_like(w), make_backend("auto", threads))
    dy, samples = np.empty((width, steps, b), w.dtype), x.reshape(-1, b)

    def step() -> None:
        tape = model.forward(samples)
        dy.fill(1)
        model.backward(tape, dy)

    runs = {p.name: layout.runs_of_parameters({p.name}).intervals for p in layout.parameters}
    weights = {
        p.name: np.concatenate([w[first:stop] for first, stop in runs[p.name]]).reshape(p.shape)
        for p in layout.parameters
    }
    return step, weights, lambda: model.forward(samples).scores


def _products(blocks: int, width: int, steps: int, batch: int) -> tuple[Callable[[], object], float]:
    """Return the products of the dense layers in a step, and the ratio of all multiplications of a step to theirs."""
    rng, columns, macs = np.random.default_rng(2), steps * batch, 0
    calls: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    # Outputs and inputs of the layers, in units of `width`.
    for out, into in [(3, 1), (1, 1), (4, 1), (1, 4)] * blocks + [(1, 1)]:
        w, x, y = (
            rng.standard_normal(shape).astype(np.float32)
            for shape in ((out * width, into * width), (into * width, columns), (out * width, columns))
        )
        calls += [(w, x, y), (y, x.T, w.copy()), (w.T, y, x.copy())]
        macs += 3 * w.size * columns

    def step() -> None:
        for a, b, out in calls:
            np.matmul(a, b, out=out)

    # Attention has 2 products in the forward pass and 5 in the backward pass, one of which computes the probabilities
    # again.
    return step, 1 + blocks * 7 * width * steps * (steps + 1) // 2 * batch / macs


def _pytorch_step(
    blocks: int, heads: int, x: np.ndarray, weights: dict[str, np.ndarray], threads: int
) -> tuple[Callable[[], object], np.ndarray]:
    """Return the same step in PyTorch, from the same weights, and its outputs (width, steps, b)."""
    try:
        import torch
    except ImportError:
        raise UserError("--pytorch needs psmpi[torch]: pip install 'psmpi[torch]'") from None
    torch.set_num_threads(threads)
    width, steps, _ = x.shape
    nets = [
        torch.nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for _ in range(blocks)
    ]
    # PyTorch orders rows by queries, keys and values first, and then by heads; psmpi by heads first.
    order = np.arange(3 * width).reshape(heads, 3, -1).transpose(1, 0, 2).reshape(-1)
    last = torch.nn.Linear(width, width)

    def take(module: Any, layer: str) -> None:
        module.weight.copy_(torch.from_numpy(weights[f"{layer}.weight"].copy()))
        module.bias.copy_(torch.from_numpy(weights[f"{layer}.bias"].copy()))

    with torch.no_grad():
        take(last, f"dense{4 * blocks + 1}")
        for k, net in enumerate(nets):
            attention, dense, norm = net.self_attn, 4 * k, 2 * k
            for module, layer in (
                (attention.out_proj, f"dense{dense + 2}"),
                (net.linear1, f"dense{dense + 3}"),
                (net.linear2, f"dense{dense + 4}"),
                (net.norm1, f"layer_norm{norm + 1}"),
                (net.norm2, f"layer_norm{norm + 2}"),
            ):
                take(module, layer)
            attention.in_proj_weight.copy_(torch.from_numpy(weights[f"dense{dense + 1}.weight"][order]))
            attention.in_proj_bias.copy_(torch.from_numpy(weights[f"dense{dense + 1}.bias"][order]))
    samples = torch.from_numpy(np.ascontiguousarray(x.transpose(2, 1, 0)))
    mask = torch.nn.Transformer.generate_square_subsequent_mask(steps)

    def forward() -> Any:
        values = samples
        for net in nets:
            values = net(values, src_mask=mask, is_causal=True)
        return last(values)

    def step() -> None:
        for net in (*nets, last):
            net.zero_grad(set_to_none=True)
        forward().sum().backward()

    output: np.ndarray = forward().detach().numpy().transpose(2, 1, 0)
    return step, output
