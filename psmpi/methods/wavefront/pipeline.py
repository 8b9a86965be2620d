"""Chunks of time on one rank: up through its lanes and on to the rank above, and their gradients down again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.transfers import Boundary, Handle
from psmpi.methods.wavefront.lane import Lane
from psmpi.methods.wavefront.schedule import RING, back_diagonals, diagonals
from psmpi.nn.layers.chain import Tape
from psmpi.nn.layers.workspace import Span


class Pipeline:
    """A rank's lanes, and its messages with the ranks below and above.

    edges: (first step, stop) of each chunk; below, above: the boundary of each chunk, None at the ends. Several lanes
    compute the cells of a diagonal at the same time, a thread each; only the caller's thread sends and receives.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        edges: Sequence[tuple[int, int]],
        below: Sequence[Boundary] | None,
        above: Sequence[Boundary] | None,
        dtype: np.dtype,
        ops: NumpyOps,
    ):
        self.lanes, self.edges, self.below, self.above, self.dtype, self.ops = lanes, edges, below, above, dtype, ops
        self.units = lanes[-1].units
        self.team = ThreadPoolExecutor(len(lanes), "psmpi-skew") if len(lanes) > 1 else None
        self.inputs: list[np.ndarray] = []
        self.passed: list[np.ndarray] = []
        self.incoming: list[np.ndarray] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without the chunks' inputs, outputs and tapes."""
        held = sum(lane.model.buffer_bytes for lane in self.lanes)
        return int(held + sum(array.nbytes for array in (*self.passed, *self.incoming)))

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        empty, lanes, most = self.ops.empty, self.lanes, max(b - a for a, b in self.edges)
        for lane in lanes:
            lane.reserve(batch)
        # Inputs of each chunk.
        self.inputs = [empty(lanes[0].in_units * (b - a) * batch, self.dtype) for a, b in self.edges]
        # Gradients of inputs: RING of the lowest lane, which are sent down; two in turn of each other lane.
        rings = [RING if self.below is not None else 0, *[2] * (len(lanes) - 1)]
        self.passed = [
            empty(count * lane.in_units * most * batch, self.dtype) for count, lane in zip(rings, lanes, strict=True)
        ]
        count = min(RING, len(self.edges)) if self.above is not None else 0
        self.incoming = [empty(self.units * most * batch, self.dtype) for _ in range(count)]

    def forward(
        self,
        b: int,
        steps: np.ndarray | None,
        spans: Sequence[Span],
        scored: Callable[[int, Tape], None] | None = None,
    ) -> np.ndarray:
        """Process all chunks of b samples; return the topmost outputs (units, steps, b) of the last chunk.

        steps (in_units, steps, b): the samples, on the lowest rank. scored(c, tape): called on the topmost rank with
        the topmost tape of each chunk before the next chunk begins.
        """
        count, lanes = len(self.edges), self.lanes
        inputs = [
            room[: lanes[0].in_units * (z - a) * b].reshape(-1, z - a, b)
            for room, (a, z) in zip(self.inputs, self.edges, strict=True)
        ]
        arriving: list[Handle] = []
        if self.below is not None:
            arriving = [cut.begin(None, x, c) for c, (cut, x) in enumerate(zip(self.below, inputs, strict=True))]
        else:
            assert steps is not None
            for x, (a, z) in zip(inputs, self.edges, strict=True):
                x[...] = steps[:, a:z]
        # For each chunk its inputs, then the outputs of the lanes so far.
        outputs = [[x] for x in inputs]
        leaving: list[Handle] = []

        def work(lane: int, c: int) -> None:
            outputs[c].append(lanes[lane].forward(c, outputs[c][-1], spans[c]))

        for cells in diagonals(len(lanes), count):
            if arriving and cells[0][0] == 0:
                arriving[cells[0][1]].finish()
            self._work(cells, work)
            top, c = cells[-1]
            if top < len(lanes) - 1:
                continue
            if self.above is not None:
                leaving.append(self.above[c].begin(outputs[c][-1], None, c))
            elif scored is not None:
                tape = lanes[-1].chunks[c].tape
                assert tape is not None
                scored(c, tape)
        for handle in leaving:
            handle.finish()
        return outputs[-1][-1]

    def backward(
        self,
        b: int,
        derivatives: Callable[[int, tuple[int, ...]], np.ndarray],
        finish: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        """Back-propagate through all chunks of the last `forward`, the last chunk first; fill the lanes' gradients.

        derivatives(c, shape): called on the topmost rank; returns the gradient of the topmost outputs of chunk c, which
        is overwritten. finish: applied in place to the gradients before they are sent to the rank below.
        """
        count, lanes = len(self.edges), self.lanes
        top, ring = len(lanes) - 1, len(self.incoming)
        arriving: dict[int, Handle] = {}
        leaving: list[Handle | None] = [None] * RING

        def above(c: int) -> np.ndarray:
            """Return the array with the gradient of the topmost outputs of chunk c."""
            a, z = self.edges[c]
            shape = self.units, z - a, b
            return self.incoming[c % ring][: prod(shape)].reshape(shape) if ring else derivatives(c, shape)

        def below(lane: int, c: int) -> np.ndarray | None:
            """Return the array for the gradient of a lane's inputs of chunk c; None if no rank below needs it."""
            size = RING if lane == 0 else 2
            if lane == 0 and self.below is None:
                return None
            a, z = self.edges[c]
            rows = self.passed[lane].reshape(size, -1)
            dx: np.ndarray = rows[c % size][: lanes[lane].in_units * (z - a) * b].reshape(-1, z - a, b)
            return dx

        def expect(c: int) -> None:
            if self.above is not None and c >= 0:
                arriving[c] = self.above[c].begin_back(None, above(c), c)

        def work(lane: int, c: int) -> None:
            dy = above(c) if lane == top else below(lane + 1, c)
            assert dy is not None
            lanes[lane].backward(c, dy, below(lane, c), c < count - 1)

        for c in range(count - 1, count - 1 - ring, -1):
            expect(c)
        for cells in back_diagonals(len(lanes), count):
            (lane, c), (lowest, down) = cells[0], cells[-1]
            if lane == top and ring:
                arriving.pop(c).finish()
            sends = lowest == 0 and self.below is not None
            if sends and (waiting := leaving[down % RING]) is not None:
                waiting.finish()
            self._work(cells, work)
            if lane == top:
                expect(c - ring)
            if sends:
                dx = below(0, down)
                assert self.below is not None and dx is not None
                if finish is not None:
                    finish(dx)
                leaving[down % RING] = self.below[down].begin_back(dx, None, down)
        for handle in leaving:
            if handle is not None:
                handle.finish()

    def _work(self, cells: list[tuple[int, int]], work: Callable[[int, int], None]) -> None:
        """Compute the cells of a diagonal, at the same time if there are threads."""
        if self.team is None or len(cells) == 1:
            for lane, c in cells:
                work(lane, c)
            return
        for future in [self.team.submit(work, lane, c) for lane, c in cells]:
            future.result()
