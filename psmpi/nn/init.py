"""Initial weights, a function of (seed, parameter, unit) alone: any rank can make any run of the flat vector."""

from __future__ import annotations

from math import sqrt
from zlib import crc32

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Layout, Runs
from psmpi.nn.network import Activation, BatchNorm, Linear, Network

INITS = ("xavier", "he", "pytorch")


def bounds(network: Network, kind: str, gain: float) -> dict[str, float]:
    """Half-width a of the uniform distribution U(-a, a) of each weight.

    xavier: a = gain sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010, eq. 16); he: a = sqrt(6 / fan_in) (He et al.
    2015, eq. 10, as a uniform); pytorch: a = 1 / sqrt(fan_in), that of PyTorch's layers. Each group of a separable
    layer uses its own fans. `gain` applies to xavier weights whose next activation is a sigmoid: 4 makes up for its
    slope at 0, a quarter of tanh's, for which xavier was made.
    """
    if kind not in INITS:
        raise UserError(f"--init {kind!r} is unknown: choose one of {', '.join(INITS)}")
    widths = {}
    for at, layer in enumerate(network.layers):
        if isinstance(layer, Linear):
            fan_in, fan_out = layer.fans
            following = next((x.kind for x in network.layers[at + 1 :] if isinstance(x, Activation)), "identity")
            scale = gain if following == "sigmoid" else 1.0
            xavier, he, pytorch = scale * sqrt(6 / (fan_in + fan_out)), sqrt(6 / fan_in), 1 / sqrt(fan_in)
            a = {"xavier": xavier, "he": he, "pytorch": pytorch}[kind]
            widths[f"{layer.name}.weight"] = a
    return widths


def initial_weights(
    network: Network, layout: Layout, runs: Runs, out: np.ndarray, *, seed: int, kind: str = "xavier", gain: float = 1.0
) -> None:
    """Fill `out` (runs.size,) with the initial weights of `runs`; biases are 0, scales of batch normalization 1."""
    widths = bounds(network, kind, gain)
    ones = {f"{layer.name}.weight" for layer in network.layers if isinstance(layer, BatchNorm)}
    for piece in layout.pieces():
        parameter = layout.parameters[piece.parameter]
        size = parameter.unit_size
        span = Runs(((piece.offset, piece.offset + (piece.last - piece.first) * size),))
        for start, stop in (span & runs).intervals:
            into = out[runs.local(start, stop)]
            if parameter.name not in widths:
                into[:] = parameter.name in ones
                continue
            a, key = widths[parameter.name], crc32(parameter.name.encode())
            first = (start - piece.offset) // size
            last = -(-(stop - piece.offset) // size)
            for k in range(first, last):
                begin = piece.offset + k * size
                row = np.random.default_rng([seed, key, piece.first + k]).uniform(-a, a, size)
                lo, hi = max(begin, start), min(begin + size, stop)
                into[lo - start : hi - start] = row[lo - begin : hi - begin]
