"""Initial weights, a function of (seed, parameter, unit) alone: any rank can make any run of the flat vector."""

from __future__ import annotations

from zlib import crc32

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Layout, Runs
from psmpi.nn.layers.base import Initial
from psmpi.nn.network import Network

INITS = ("xavier", "he", "pytorch")


def initial_values(network: Network, kind: str, gain: float) -> dict[str, Initial]:
    """The laws of the initial values of each parameter that does not begin with 0.

    xavier: U(-a, a) with a = gain sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010, eq. 16); he: a = sqrt(6 /
    fan_in) (He et al. 2015, eq. 10, as a uniform); pytorch: a = 1 / sqrt(fan_in), that of PyTorch's layers. Each group
    of a separable layer uses its own fans. `gain` applies to xavier weights whose next activation is a sigmoid: 4 makes
    up for its slope at 0, a quarter of tanh's, for which xavier was made.
    """
    if kind not in INITS:
        raise UserError(f"--init {kind!r} is unknown: choose one of {', '.join(INITS)}")
    layers = list(network.walk())
    found: dict[str, Initial] = {}
    for at, layer in enumerate(layers):
        following = next((one.activation for one in layers[at + 1 :] if one.activation), "identity")
        found |= layer.initial(kind, gain if following == "sigmoid" else 1.0)
    return found


def initial_weights(
    network: Network, layout: Layout, runs: Runs, out: np.ndarray, *, seed: int, kind: str = "xavier", gain: float = 1.0
) -> None:
    """Fill `out` (runs.size,) with the initial weights of `runs`, each unit's drawn by itself."""
    laws = initial_values(network, kind, gain)
    for piece in layout.pieces():
        parameter = layout.parameters[piece.parameter]
        size = parameter.unit_size
        span = Runs(((piece.offset, piece.offset + (piece.last - piece.first) * size),))
        for start, stop in (span & runs).intervals:
            into = out[runs.local(start, stop)]
            law = laws.get(parameter.name, Initial("constant", 0.0))
            if law.law == "constant":
                into[:] = law.value
                continue
            a, key = law.value, crc32(parameter.name.encode())
            first = (start - piece.offset) // size
            last = -(-(stop - piece.offset) // size)
            for k in range(first, last):
                begin = piece.offset + k * size
                row = np.random.default_rng([seed, key, piece.first + k]).uniform(-a, a, size)
                lo, hi = max(begin, start), min(begin + size, stop)
                into[lo - start : hi - start] = row[lo - begin : hi - begin]
