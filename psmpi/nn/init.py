"""Initial weights as a function of (seed, parameter, unit), so that any rank can make any run of the flat vector."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from zlib import crc32

import numpy as np

from psmpi.errors import UserError
from psmpi.layout import Layout, Runs, Stretch
from psmpi.nn.draws import draw_rows
from psmpi.nn.layers.base import INITS, Initial
from psmpi.nn.network import Network

# Elements that are drawn at a time, which bounds the memory.
TILE = 1 << 18


def initial_values(network: Network, kind: str, gain: float) -> dict[str, Initial]:
    """Return the law of the initial values of each parameter, by name; other parameters start at 0.

    kind: xavier draws from U(-a, a) with a = gain sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010, eq. 16); he
    uses a = sqrt(6 / fan_in) (He et al. 2015, eq. 10, as a uniform); pytorch uses a = 1 / sqrt(fan_in), as PyTorch's
    layers. Each group of a separable layer uses the fans of a group. gain: applies to xavier weights whose next
    activation is a sigmoid; 4 compensates for the sigmoid's slope at 0, a quarter of tanh's, which xavier assumes.
    UserError for an unknown kind.
    """
    if kind not in INITS:
        raise UserError(f"--init {kind!r} is unknown: choose one of {', '.join(INITS)}")
    layers = list(network.walk())
    laws: dict[str, Initial] = {}
    for at, layer in enumerate(layers):
        following = next((one.activation for one in layers[at + 1 :] if one.activation), "identity")
        laws |= layer.initial(kind, gain if following == "sigmoid" else 1.0)
    return laws


def initial_weights(
    network: Network, layout: Layout, runs: Runs, out: np.ndarray, *, seed: int, kind: str = "xavier", gain: float = 1.0
) -> None:
    """Fill `out` (runs.size,) with the initial weights of `runs`; each unit has a separate generator."""
    laws = initial_values(network, kind, gain)
    for piece in chain.from_iterable(layout.banded):
        parameter = layout.parameters[piece.parameter]
        law, key = laws.get(parameter.name, Initial("constant", 0.0)), [seed, crc32(parameter.name.encode())]
        stretch = piece.stretch(parameter.unit_size)
        for start, stop in (runs & Runs(((stretch.offset, stretch.stop),))).intervals:
            shift = runs.local(start, stop).start - start
            for some in stretch.within(start, stop):
                if law.law == "constant" and law.units is None:
                    some.view(out, shift)[...] = law.value
                elif law.units is not None:
                    first, last = (unit * parameter.unit_size for unit in law.units)
                    values = np.zeros(some.last - some.first)
                    values[max(0, first - some.first) : max(0, last - some.first)] = law.value
                    for part in some.elements(some.first, some.last):
                        view = part.view(out, shift)
                        view[...] = values[part.first - some.first : part.last - some.first].reshape(view.shape)
                else:
                    _draw(key, law, parameter.unit_size, some, out, shift)


def _draw(key: Sequence[int], law: Initial, size: int, some: Stretch, out: np.ndarray, shift: int) -> None:
    """Fill a stretch of a parameter, whose units have `size` elements each, with draws of a law, tile by tile."""
    a = law.value
    if law.widths is None and some.length == size and some.first % size == 0:
        # The runs of the stretch are whole units, one for each class.
        draw_rows(some.view(out, shift), key, some.first // size, -a, a)
        return
    most = max(size, TILE // size * size)
    for first in range(some.first // size * size, some.last, most):
        last = min(first + most, -(-some.last // size) * size)
        rows = np.empty(((last - first) // size, size))
        draw_rows(rows, key, first // size, -a, a)
        if law.widths is not None:
            rows *= law.widths[first // size : last // size, None]
        drawn = rows.reshape(-1)
        # The stretch may contain only a part of the first and of the last unit.
        for part in some.elements(first, last):
            view = part.view(out, shift)
            view[...] = drawn[part.first - first : part.last - first].reshape(view.shape)
