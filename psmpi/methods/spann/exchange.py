"""Layers in which ranks exchange what they have of the same samples."""

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
    """The units that a rank needs, perhaps none, from those that it and others have.

    classes: of the network; halo: None where nothing is computed.
    """

    classes: int
    halo: Halo | None = field(default=None, compare=False, repr=False)

    moves_gradient: ClassVar[bool] = True
    exchanges: ClassVar[bool] = True

    def sources(self, uses: Uses) -> Uses:
        """All scores, for other ranks may use what this one does not."""
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
            # The first layer of a rank that has none of the units before, which has gradients for others all the same.
            dx = x[:0]
        self.layer.halo.backward(dy, dx)
        return dx


@dataclass(frozen=True)
class Total(Layer):
    """Sums over ranks, which all of them have; transfer: None where nothing is computed."""

    transfer: Sum | None = field(default=None, compare=False, repr=False)

    place: ClassVar[str] = OVER

    def part(self, stage: Stage, site: Site) -> Part:
        return TotalPart(stage, site)


class TotalPart(Part):
    """Each rank's x (units, b) -> their sum; the gradient of the sum is that of each."""

    layer: Total

    def forward(self, x: np.ndarray, y: np.ndarray | None, room: Any) -> tuple[np.ndarray, Any]:
        assert self.layer.transfer is not None
        found = x if y is None else y
        self.layer.transfer.backward(x, found)
        return found, None

    def backward(
        self, x: np.ndarray, y: np.ndarray, kept: Any, dy: np.ndarray, dx: np.ndarray | None, into: Any
    ) -> np.ndarray:
        return dy
