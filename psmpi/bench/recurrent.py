"""Compare a training step of recurrent layers with its matrix products alone, and with PyTorch's."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from psmpi.bench.beside import show_beside, take_turns
from psmpi.errors import UserError
from psmpi.output import check_files

# Largest rounding error of the states.
TOLERANCE = 1e-3
Kind = Literal["rnn", "gru", "lstm"]


def recurrent(
    kinds: tuple[Kind, ...] = ("lstm", "gru"),
    layers: int = 4,
    steps: int = 100,
    units: int = 512,
    batch_size: int = 64,
    chunk_steps: int = 0,
    threads: int = 1,
    rounds: int = 7,
    pytorch: bool = False,
    json: str = "",
) -> int:
    """Time forward and backward passes of stacked recurrent layers in one process, float32.

    They take turns with their matrix products at the speed of one large product, and with --pytorch with the same
    passes of torch.nn.LSTM, GRU and RNN.

    Args:
        kinds: Kinds of layers.
        layers: Number of layers.
        steps: Steps of a sequence.
        units: Units of a layer, and features of the samples.
        batch_size: Samples of a minibatch.
        chunk_steps: Steps of a chunk; the passes of psmpi then go over the layers chunk by chunk. 0: all steps.
        threads: Threads of psmpi and of PyTorch.
        rounds: Measurements of each; the median counts, and the least and the largest are shown.
        pytorch: Time PyTorch too. Needs psmpi[torch].
        json: File for the figures, in JSON.
    """
    from threadpoolctl import threadpool_limits

    for option, value in (("--layers", layers), ("--steps", steps), ("--units", units), ("--batch-size", batch_size),
                          ("--threads", threads), ("--rounds", rounds)):  # fmt: skip
        if value < 1:
            raise UserError(f"{option} {value}: expected 1 or more")
    if not 0 <= chunk_steps <= steps:
        raise UserError(f"--chunk-steps {chunk_steps}: expected 0 to {steps}")
    check_files(json=json)
    rows: list[dict[str, Any]] = []
    with threadpool_limits(threads):
        for kind in kinds:
            calls: dict[str, Callable[[], object]] = {}
            rng = np.random.default_rng(0)
            x = rng.standard_normal((units, steps, batch_size)).astype(np.float32)
            calls["psmpi"], macs, weights, last = _psmpi_step(kind, layers, x, chunk_steps or steps, threads)
            calls["large product"], size = _product(threads, units, steps * batch_size)
            if pytorch:
                calls["PyTorch"], states = _pytorch_step(kind, layers, x, weights, threads)
                calls["psmpi"]()
                off = float(np.abs(states - last()).max())
                if not off <= TOLERANCE:
                    raise UserError(
                        f"PyTorch's {kind} has other states, by {off:.1e}: its times would be of another network"
                    )
            times = take_turns(calls, rounds)
            rows.append({"kind": kind, "ms": times, "products ms": median(times["large product"]) * macs / size})
    show_beside(rows, f"{layers} x {units}, {steps} steps, {batch_size} samples, {threads} thread(s)")
    if json:
        Path(json).write_text(jsonlib.dumps(rows) + "\n")
    return 0


def _psmpi_step(
    kind: Kind, layers: int, x: np.ndarray, each: int, threads: int
) -> tuple[Callable[[], object], int, dict[str, np.ndarray], Callable[[], np.ndarray]]:
    """Return a step of psmpi, its multiplications, its weights by name, and a function for its last states."""
    from psmpi.backend import make_backend
    from psmpi.methods.wavefront.lane import Lane
    from psmpi.nn.layers.workspace import Span
    from psmpi.nn.network import build
    from psmpi.nn.sequences import chunks

    units, steps, b = x.shape
    ops, edges = make_backend("auto", threads), chunks(steps, each)
    network = build("recurrent", (units, steps), [{"type": kind, "units": units}] * layers, units, by_step=True)
    layout = network.layout()
    rng = np.random.default_rng(1)
    w = (rng.standard_normal(layout.size) / np.sqrt(units)).astype(np.float32)
    lane = Lane(network.with_steps(each), layout, (0, layers), w, np.zeros_like(w), len(edges), ops)
    lane.reserve(b)
    parts = [np.ascontiguousarray(x[:, a:z]) for a, z in edges]
    spans = [Span(begins=a == 0, ends=z == steps) for a, z in edges]
    dy = ops.empty(units * each * b, w.dtype)

    def step() -> None:
        for c, (part, span) in enumerate(zip(parts, spans, strict=True)):
            lane.forward(c, part, span)
        for c in reversed(range(len(edges))):
            size = parts[c].size
            dy[:size].fill(1)
            lane.backward(c, dy[:size].reshape(parts[c].shape), None, c < len(edges) - 1)

    arrays = {p.name: w[layout.runs_of_parameters({p.name}).intervals[0][0] :][: np.prod(p.shape)].reshape(p.shape)
             for p in layout.parameters}  # fmt: skip
    # Products of the forward pass, of the gradients of inputs and states, and of the gradients of weights. The gradient
    # of the samples is not computed.
    macs = sum(3 * layer.macs for layer in network.layers) - network.layers[0].macs * units // (2 * units)

    def last() -> np.ndarray:
        tape = lane.chunks[-1].tape
        assert tape is not None
        states: np.ndarray = tape.scores[:, -1]
        return states

    return step, macs * b, arrays, last


def _product(threads: int, units: int, columns: int) -> tuple[Callable[[], object], int]:
    """Return a matrix product as large as those of a layer over all steps, and its multiplications."""
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((4 * units, units), (units, columns)))
    out = np.empty((4 * units, columns), np.float32)
    return lambda: np.matmul(a, b, out=out), 4 * units * units * columns


def _pytorch_step(
    kind: Kind, layers: int, x: np.ndarray, weights: dict[str, np.ndarray], threads: int
) -> tuple[Callable[[], object], np.ndarray]:
    """Return the same step in PyTorch, from the same weights, and its last states (units, b)."""
    try:
        import torch
    except ImportError:
        raise UserError("--pytorch needs psmpi[torch]: pip install 'psmpi[torch]'") from None
    torch.set_num_threads(threads)
    units = len(x)
    net = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind](units, units, layers)
    with torch.no_grad():
        for k in range(layers):
            names = {"weight_ih": "weight", "weight_hh": "recurrent", "bias_ih": "bias", "bias_hh": "recurrent_bias"}
            for name, parameter in names.items():
                into = getattr(net, f"{name}_l{k}")
                values = weights.get(f"{kind}{k + 1}.{parameter}")
                into.copy_(torch.zeros_like(into) if values is None else torch.from_numpy(values.copy()))
    samples = torch.from_numpy(np.ascontiguousarray(x.transpose(1, 2, 0)))

    def step() -> None:
        net.zero_grad(set_to_none=True)
        net(samples)[0].sum().backward()

    with torch.no_grad():
        states = net(samples)[0][-1].numpy().T
    return step, states
