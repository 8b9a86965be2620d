"""One rank's residual layers, solved by cycles: states forwards, adjoints backwards, then gradients."""

from __future__ import annotations

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers import Boundary, Message, Spread, Step
from psmpi.methods.layer_parallel.cycle import Cycle
from psmpi.methods.layer_parallel.layers import Layers
from psmpi.methods.layer_parallel.line import Line, messages_of_cycle


class Solver:
    """Solver for states and adjoints of this rank's `steps` layers; group: the ranks of its row.

    states, adjoints: buffers for (steps + 1) states of the largest minibatch each; adjoints lie from the last point to
    the first. stride: above 1, only every `stride`-th layer marches, with `stride` times the step size.
    """

    def __init__(
        self,
        layers: Layers,
        steps: int,
        group: Group,
        states: np.ndarray,
        adjoints: np.ndarray,
        relaxations: int,
        ops: NumpyOps,
    ):
        self.layers, self.steps, self.ops, self.group = layers, steps, ops, group
        ranks, dtype, self.relaxations = range(group.size - 1), states.dtype, relaxations
        self.boundaries = [Boundary(group, r, r + 1, layers.units, dtype) for r in ranks]
        lines = [Line(self.boundaries, group.rank, back) for back in (False, True)]
        self.forward_cycle = Cycle(self._forward, lines[0], states, relaxations, ops)
        self.adjoint_cycle = Cycle(self._adjoint, lines[1], adjoints, relaxations, ops)
        # Broadcasts of the first state and of the last adjoint, from which cold passes begin.
        self.first = Spread(group, layers.units, dtype, 0, per_sample=True)
        self.last = Spread(group, layers.units, dtype, group.size - 1, per_sample=True)
        self.stride = 1

    def reserve(self, batch: int, factors: tuple[int, ...]) -> None:
        """Make room for minibatches of up to `batch` samples."""
        for cycle in (self.forward_cycle, self.adjoint_cycle):
            cycle.reserve(self.steps, self.layers.units * batch, factors)

    @property
    def nbytes(self) -> int:
        """Bytes of the cycles' buffers, without states, adjoints and layers."""
        return self.forward_cycle.nbytes + self.adjoint_cycle.nbytes

    def begin(self, b: int, stride: int, factors: tuple[int, ...]) -> None:
        """Set the shape of the next passes: b samples, every `stride`-th layer, and the factors between levels."""
        self.stride, self.factors, count, size = stride, factors, self.steps // stride, self.layers.units * b
        self.count = count
        self.u = self.forward_cycle.shape(count, size, factors)
        self.w = self.adjoint_cycle.shape(count, size, factors)

    def forward(self, cycles: int, warm: bool) -> np.ndarray:
        """Solve for the states; return this rank's last state.

        A warm pass begins from the states of the last pass, a cold one from copies of the first state. The caller sets
        u[0] on the first rank of the row.
        """
        self._start(self.u, self.first, warm)
        return self.more_forward(cycles)

    def more_forward(self, cycles: int) -> np.ndarray:
        """Run further cycles on the states; return this rank's last state."""
        self.forward_cycle.run(cycles)
        last: np.ndarray = self.u[-1]
        return last

    def backward(self, cycles: int, warm: bool) -> np.ndarray:
        """Solve for the adjoints of the last forward pass; return the adjoint of this rank's first point.

        The caller sets w[0] on the last rank of the row.
        """
        self._linearize()
        self._start(self.w, self.last, warm)
        self.adjoint_cycle.run(cycles)
        adjoint: np.ndarray = self.w[-1]
        return adjoint

    def _linearize(self) -> None:
        """Repeat the forward pass of the last layer of each interval; the other tapes belong to the present states."""
        m, out = self.factors[0] if self.factors else 0, self.layers.scratch[: self.u.shape[1]]
        for j in range(m - 1, self.count, m) if m else ():
            self._forward(1, j, self.u[j], out)

    def gradients(self) -> None:
        """Write the gradients of the weights, from states and adjoints."""
        for j in range(self.count):
            self.layers.gradient(j * self.stride, self.stride, self.w[self.count - 1 - j])

    def _start(self, states: np.ndarray, spread: Spread, warm: bool) -> None:
        if warm or not self.factors:
            return
        spread.forward(states[0], states[0])
        for state in states[1:]:
            state[...] = states[0]

    def _forward(self, stride: int, j: int, x: np.ndarray, out: np.ndarray) -> None:
        stride *= self.stride
        self.layers.forward(j * stride, stride, x, out)

    def _adjoint(self, stride: int, j: int, x: np.ndarray, out: np.ndarray) -> None:
        """Adjoint step of the layer at the left end of an interval, whose last pass was at the state there."""
        left = self.count - (j + 1) * stride
        self.layers.backward(left * self.stride, stride * self.stride, x, out)

    def messages(self, b: int, cycles: tuple[int, int], cold: tuple[bool, bool], levels: int) -> list[Message]:
        """Return the messages of the row in a forward and an adjoint pass on b samples."""
        messages = []
        for back, (spread, is_cold, count) in enumerate(zip((self.first, self.last), cold, cycles, strict=True)):
            if is_cold and levels > 1:
                messages += spread.messages(Step(b))
            each = (count if levels > 1 else 1) * messages_of_cycle(levels, self.relaxations)
            for boundary in self.boundaries:
                messages += each * boundary.messages(Step(b), back=bool(back))
        return messages
