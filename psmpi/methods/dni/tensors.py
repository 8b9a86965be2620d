"""Tensors of the method `dni` besides the network's: their names, shapes and ranks, and this rank's arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.layout import plain_layout
from psmpi.methods.dni.settings import Cut, Settings

# Shape of each tensor, and the ranks that have it, by name.
Shapes = dict[str, tuple[int, ...]]
Owners = dict[str, set[int]]


class Tensors:
    """Named tensors of a space of checkpoints; this rank's tensors lie one after the other in `array` (n,).

    layout: of all tensors; owned: the runs of each of `size` ranks; views: this rank's tensors by name.
    """

    def __init__(
        self, shapes: Shapes, owners: Mapping[str, set[int]], size: int, rank: int, ops: NumpyOps, dtype: np.dtype
    ):
        self.layout = plain_layout(shapes)
        self.owned = [
            self.layout.runs_of_parameters({name for name in shapes if other in owners[name]}) for other in range(size)
        ]
        own = self.owned[rank]
        self.array = ops.zeros(own.size, dtype)
        self.views: dict[str, np.ndarray] = {}
        for name in (name for name in shapes if rank in owners[name]):
            for a, b in self.layout.runs_of_parameters({name}).intervals:
                self.views[name] = self.array[own.local(a, b)].reshape(shapes[name])


def in_flight(cuts: Sequence[Cut], s: Settings, batch: int, owner: Callable[[int], int]) -> tuple[Shapes, Owners]:
    """Return shapes and ranks of the tensors in flight: outputs, and the gradients that the block above returns.

    Synthesizers learn from these tensors. owner: a function from a block to its rank.
    """
    shapes: Shapes = {}
    owners: Owners = {}
    for cut in cuts:
        shape, name = (s.ahead, cut.units * batch), f"cut{cut.number + 1}"
        below, above = {owner(cut.number)}, {owner(cut.number + 1)}
        if s.predicts:
            shapes[f"{name}.targets"], owners[f"{name}.targets"] = shape, below
        if s.predicts or s.synthetic_inputs:
            shapes[f"{name}.outputs"] = shape
            owners[f"{name}.outputs"] = (below if s.predicts else set()) | (above if s.synthetic_inputs else set())
    return shapes, owners


def auxiliary_tensors(cuts: Sequence[Cut], owner: Callable[[int], int]) -> tuple[Shapes, Owners]:
    """Return shapes and ranks of the parameters of all auxiliary networks, one network after the other.

    owner: as in `in_flight`.
    """
    shapes: Shapes = {}
    owners: Owners = {}
    for cut in cuts:
        for name, one in cut.networks.items():
            own = {f"cut{cut.number + 1}.{name}.{p.name}": p.shape for p in one.layout().parameters}
            shapes.update(own)
            owners.update({key: {owner(cut.side(name))} for key in own})
    return shapes, owners
