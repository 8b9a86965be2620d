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
    """The residual layers `stage` (first, stop) of a network, over their weights w and gradient g.

    A state is flat, (numbers,): the outputs (units, ..., b) of a layer. Each layer keeps the tape of its last forward
    pass, and takes its adjoint at the state of that pass, for any step size.
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
        self.tapes: list[Tape | None] = [None] * len(self.parts)
        runs = network.runs(layout, *stage)
        # Slice of each layer's weights in w.
        self.slices = [inside(network, layout, (k, k + 1), runs) for k in range(*stage)]

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        self.model.chain.reserve(batch)
        self.model.chain.reserve_backward(batch, wanted=True)
        self.rooms = [part.chain.room(batch) for part in self.parts]
        self.scratch = self.ops.empty(self.units * batch, self.w.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without weights, gradients and tapes."""
        arrays = [array for part in self.parts for array in part.arrays()]
        return int(self.scratch.nbytes + self.model.space.nbytes + sum(array.nbytes for array in arrays))

    @property
    def kept_bytes(self) -> int:
        """Bytes of the tapes."""
        return sum(sum(room_bytes(room)) for room in self.rooms)

    def forward(self, layer: int, factor: float, x: np.ndarray, out: np.ndarray) -> None:
        """Compute out = x + factor h F(x), a step of this rank's layer number `layer`."""
        part = self.parts[layer]
        _, self.tapes[layer] = part.forward(self._shaped(x), self._shaped(out), (self.rooms[layer], self.none), factor)

    def backward(self, layer: int, factor: float, x: np.ndarray, out: np.ndarray) -> None:
        """Compute out = x + factor h J^T x, J the derivative of the branch at the state of the layer's last pass."""
        part, tape = self.parts[layer], self.tapes[layer]
        assert tape is not None
        out[...] = x
        dy = self._shaped(out)
        dx = part.backward(tape.outputs[0], dy, tape, dy, dy, None, factor)
        if dx is not dy:
            dy[...] = dx

    def gradient(self, layer: int, factor: float, x: np.ndarray) -> None:
        """Write the gradient of the layer's weights, given x, the gradient of its outputs."""
        part, tape = self.parts[layer], self.tapes[layer]
        assert tape is not None
        dy = self._shaped(self.scratch[: x.size])
        dy[...] = self._shaped(x)
        part.backward(tape.outputs[0], dy, tape, dy, None, part.g, factor)

    def march(self, x: np.ndarray, spare: Sequence[np.ndarray]) -> np.ndarray:
        """Return the outputs of all layers, one after the other, for x: one of the two arrays `spare`, like x, or x."""
        for layer in range(len(self.parts)):
            self.forward(layer, 1.0, x, spare[layer % 2])
            x = spare[layer % 2]
        return x

    def _shaped(self, state: np.ndarray) -> np.ndarray:
        return state.reshape(*self.shape, -1)
