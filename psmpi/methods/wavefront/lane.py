"""A run of layers that processes sequences chunk by chunk, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.layout import Layout
from psmpi.nn.layers.chain import Room, Tape, room_bytes
from psmpi.nn.layers.workspace import Span
from psmpi.nn.model import Model
from psmpi.nn.network import Network


@dataclass
class Chunk:
    """Room and tape of one chunk of a lane; `room` stays from minibatch to minibatch."""

    room: Room = field(default_factory=lambda: Room(0))
    tape: Tape | None = None


class Lane:
    """The layers [first, stop) of a network whose sequences have at most the steps of a chunk; count: of chunks.

    w, g: views of the rank's vectors, over these layers' runs of the flat vector. ops: with a workspace for this lane
    alone, so that lanes may compute at the same time.
    """

    def __init__(
        self,
        network: Network,
        layout: Layout,
        layers: tuple[int, int],
        w: np.ndarray,
        g: np.ndarray,
        count: int,
        ops: NumpyOps,
    ):
        self.model, self.layers = Model(network, layout, w, g, ops, layers=layers), layers
        self.chunks = [Chunk() for _ in range(count)]
        self.in_units, self.units = self.model.in_shape[0], network.layers[layers[1] - 1].out_shape[0]

    def reserve(self, batch: int) -> None:
        """Make room for all chunks of minibatches of up to `batch` samples."""
        for chunk in self.chunks:
            chunk.room, chunk.tape = Room(0), None
        for chunk in self.chunks:
            chunk.room = self.model.open(batch)
        self.model.reserve_backward(batch)

    def forward(self, c: int, x: np.ndarray, span: Span) -> np.ndarray:
        """Return the outputs (units, steps, b) of chunk c for x (in_units, steps, b); both stay until `backward`."""
        tape = self.chunks[c].tape = self.model.forward(x, self.chunks[c].room, span)
        return tape.scores

    def backward(self, c: int, dy: np.ndarray, dx: np.ndarray | None, add: bool) -> None:
        """Write or add the gradient of chunk c to g, from the gradient dy of its outputs, which is overwritten.

        dx (in_units, steps, b): filled with the gradient of the inputs. The caller goes from the last chunk to the
        first.
        """
        tape = self.chunks[c].tape
        assert tape is not None
        self.model.backward(tape, dy, dx=dx, add=add)

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks' outputs and tapes."""
        return sum(sum(room_bytes(chunk.room)) for chunk in self.chunks)
