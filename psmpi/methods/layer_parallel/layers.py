"""Residual layers of one rank as steps of a march: forward, adjoint, and gradients of their weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.layout import Layout
from psmpi.methods.layer_parallel.plan import inside
from psmpi.nn.layers.chain import Room, Tape, room_bytes
from psmpi.nn.layers.residual import ResidualPart
from psmpi.nn.model import Model
from psmpi.nn.network import Network


class Layers:
    """The residual layers `stage` (first, behind the last) of a network, over their weights w and gradient g.

    A state is (numbers,), the outputs (units, ..., b) of a layer. The pass of a layer through its branch is kept: its
    adjoint is taken at the state that the layer has seen last, of whatever step size.
    """

    def __init__(
        self,
        network: Network,
        layout: Layout,
        stage: tuple[int, int],
        w: np.ndarray,
        g: np.ndarray,
        ops: NumpyOps,
    ):
        self.model, self.ops, self.w = Model(network, layout, w, g, ops, layers=stage), ops, w
        self.parts: list[ResidualPart] = [part for part in self.model.parts if isinstance(part, ResidualPart)]
        self.shape, self.units = self.model.in_shape, self.model.size
        self.rooms: list[Room] = []
        self.none = ops.empty(0, w.dtype)
        self.kept: list[Tape | None] = [None] * len(self.parts)
        runs = network.runs(layout, *stage)
        # Where each layer's weights are in w.
        self.slices = [inside(network, layout, (k, k + 1), runs) for k in range(*stage)]

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        self.model.chain.reserve(batch)
        self.model.chain.reserve_backward(batch, wanted=True)
        self.rooms = [part.chain.room(batch) for part in self.parts]
        self.scratch = self.ops.empty(self.units * batch, self.w.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes besides weights, gradients and what the passes keep."""
        arrays = [array for part in self.parts for array in part.arrays()]
        return int(self.scratch.nbytes + self.model.space.nbytes + sum(array.nbytes for array in arrays))

    @property
    def kept_bytes(self) -> int:
        """Bytes of what the passes keep."""
        return sum(sum(room_bytes(room)) for room in self.rooms)

    def forward(self, layer: int, factor: float, x: np.ndarray, out: np.ndarray) -> None:
        """out = x + factor h F(x), a step of layer number `layer` of this rank's."""
        part = self.parts[layer]
        _, self.kept[layer] = part.forward(self._shaped(x), self._shaped(out), (self.rooms[layer], self.none), factor)

    def backward(self, layer: int, factor: float, x: np.ndarray, out: np.ndarray) -> None:
        """out = x + factor h J^T x with J the derivative of the branch where the layer's pass was last."""
        part, tape = self.parts[layer], self.kept[layer]
        assert tape is not None
        out[...] = x
        dy = self._shaped(out)
        found = part.backward(tape.outputs[0], dy, tape, dy, dy, None, factor)
        if found is not dy:
            dy[...] = found

    def gradient(self, layer: int, factor: float, x: np.ndarray) -> None:
        """Write the gradient of the layer's weights, given that of its outputs, x."""
        part, tape = self.parts[layer], self.kept[layer]
        assert tape is not None
        dy = self._shaped(self.scratch[: x.size])
        dy[...] = self._shaped(x)
        part.backward(tape.outputs[0], dy, tape, dy, None, part.g, factor)

    def march(self, x: np.ndarray, spare: Sequence[np.ndarray]) -> np.ndarray:
        """The outputs of all layers, one after the other, of x; in one of two arrays like it, or x itself."""
        for layer in range(len(self.parts)):
            self.forward(layer, 1.0, x, spare[layer % 2])
            x = spare[layer % 2]
        return x

    def _shaped(self, state: np.ndarray) -> np.ndarray:
        return state.reshape(*self.shape, -1)
