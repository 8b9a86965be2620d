"""A run of layers that goes over sequences chunk by chunk, and back."""

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
    """What a lane has of one chunk: room for the pass, and its tape; `room` is kept from minibatch to minibatch."""

    room: Room = field(default_factory=lambda: Room(0))
    tape: Tape | None = None


class Lane:
    """The layers [first, behind) of a network whose sequences have the steps of a chunk at most.

    w, g: views of the rank's vectors, over these layers' runs of the flat vector. Its workspace is its own, so that
    lanes may work at the same time.
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
        """Make room for minibatches of up to `batch` samples, of all chunks."""
        for chunk in self.chunks:
            chunk.room, chunk.tape = Room(0), None
        for chunk in self.chunks:
            chunk.room = self.model.open(batch)
        self.model.reserve_backward(batch)

    def forward(self, c: int, x: np.ndarray, span: Span) -> np.ndarray:
        """The outputs (units, steps, b) of chunk c for x (in_units, steps, b); both stay until its `backward`."""
        tape = self.chunks[c].tape = self.model.forward(x, self.chunks[c].room, span)
        return tape.scores

    def backward(self, c: int, dy: np.ndarray, dx: np.ndarray | None, add: bool) -> None:
        """Write the gradient of chunk c into g, or add it, from that of its outputs, dy, which is used up.

        dx (in_units, steps, b): filled with the gradient of the inputs. Chunks come last first.
        """
        tape = self.chunks[c].tape
        assert tape is not None
        self.model.backward(tape, dy, dx=dx, add=add)

    @property
    def nbytes(self) -> int:
        """Bytes of outputs and what else chunks keep."""
        return sum(sum(room_bytes(chunk.room)) for chunk in self.chunks)
