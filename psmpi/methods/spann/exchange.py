"""Layers that exchange units of the same samples between ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from psmpi.comm.transfers import Halo, Sum
from psmpi.layout import Classes
from psmpi.nn.layers.base import OVER, Layer, Part, Site, Stage
from psmpi.nn.layers.uses import Uses, joined, single


@dataclass(frozen=True)
class Ghosts(Layer):
    """Halo exchange: from a rank's own units to the units that the rank needs, perhaps none.

    classes: of the network; halo: the transfer, None in a network that only describes a rank.
    """

    classes: int
    halo: Halo | None = field(default=None, compare=False, repr=False)

    moves_gradient: ClassVar[bool] = True
    exchanges: ClassVar[bool] = True

    def sources(self, uses: Uses) -> Uses:
        """Return uses by all scores, as other ranks may use units that this rank does not use."""
        return joined([(0, self.in_shape[0], single(Classes.of(range(self.classes))))])

    def present(self, inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.ones(self.out_shape[0], bool)

    def part(self, stage: Stage, site: Site) -> Part:
        return GhostsPart(stage, site)


class GhostsPart(Part):
    """x (own units, b) -> y (needed units, b)."""

    layer: Ghosts

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert self.layer.halo is not None and y is not None
        self.layer.halo.forward(x, y)
        return y, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        assert self.layer.halo is not None
        if dx is None:
            # A rank without units of the layer before still sends gradients to other ranks.
            dx = x[:0]
        self.layer.halo.backward(dy, dx)
        return dx


@dataclass(frozen=True)
class Total(Layer):
    """All-reduce of units over ranks; transfer: None in a network that only describes a rank."""

    transfer: Sum | None = field(default=None, compare=False, repr=False)

    place: ClassVar[str] = OVER

    def part(self, stage: Stage, site: Site) -> Part:
        return TotalPart(stage, site)


class TotalPart(Part):
    """x (units, b) -> the sum of x over ranks; the gradient of x is that of the sum."""

    layer: Total

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert self.layer.transfer is not None
        total = x if y is None else y
        self.layer.transfer.backward(x, total)
        return total, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        return dy
