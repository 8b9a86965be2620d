"""Multigrid reduction in time (MGRIT) on one rank, given a function that makes one step, and the neighbours' messages.

Full approximation scheme for u_{i+1} = Phi_i(u_i) with u_0 given (Guenther et al., arXiv 1812.04352; XBraid). Every
m-th point of a level, m the coarsening factor, is a C-point and a point of the next level; the others are F-points.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import Protocol

import numpy as np

from psmpi.backend import NumpyOps

# march(stride, j, x, out): apply this rank's j-th step that spans `stride` steps of the finest level to x, into out.
March = Callable[[int, int, np.ndarray, np.ndarray], None]


class Waiting(Protocol):
    """A message under way."""

    def finish(self) -> None:
        """Wait until the message is complete."""


class Neighbours(Protocol):
    """The ranks with the previous and the next steps; at the ends of the row, messages are empty."""

    def send(self, values: np.ndarray) -> Waiting:
        """Begin to send to the next rank; `values` must not be written before the message is finished."""

    def receive(self, into: np.ndarray) -> Waiting:
        """Begin to receive from the previous rank; `finish` returns when `into` is filled. Empty on the first rank."""


class Cycle:
    """V-cycles over this rank's steps.

    store: buffer for the states, of at least (steps + 1) * size numbers, see `shape`. Points of coarser levels are
    views of those of the finest level. relaxations: C-relaxations of each cycle, on each level but the coarsest; 1 is
    FCF.

    residuals: for each cycle of the last pass, two sums over this rank's C-points of the finest level: of
    |u_jm - Phi(u_jm-1)|^2 before the coarse correction, and of |u_jm|^2.
    """

    def __init__(self, march: March, neighbours: Neighbours, store: np.ndarray, relaxations: int, ops: NumpyOps):
        self.march, self.neighbours, self.relaxations, self.ops, self.store = march, neighbours, relaxations, ops, store
        # Right-hand sides g of the coarser levels, and room for two states.
        self.rhs = self.room = store[:0]
        self.sent: list[Waiting] = []
        self.residuals: list[tuple[float, float]] = []

    def reserve(self, steps: int, size: int, factors: tuple[int, ...]) -> None:
        """Make room for shapes of up to `steps` steps and states of up to `size` numbers, with these factors."""
        counts = [steps // stride for stride in _strides(factors)[1:]]
        self.rhs = self.ops.empty(sum(counts) * size, self.store.dtype)
        self.room = self.ops.empty(2 * size if factors else 0, self.store.dtype)

    def shape(self, steps: int, size: int, factors: tuple[int, ...]) -> np.ndarray:
        """Set the shape of the next passes; return the states (steps + 1, size).

        The states are the points between this rank's steps and at both ends: the first is a copy of the last point of
        the previous rank. factors: for each level but the coarsest, the number of its steps that are one step of the
        next level, 2 or more. Raise ValueError unless their product divides the steps.
        """
        self.factors, self.strides = factors, _strides(factors)
        if steps % self.strides[-1]:
            raise ValueError(f"{steps} steps are not a multiple of {self.strides[-1]}")
        states: np.ndarray = self.store[: (steps + 1) * size].reshape(-1, size)
        self.u, self.g, at = [states[::stride] for stride in self.strides], [], 0
        for u in self.u[1:]:
            count = (len(u) - 1) * size
            self.g.append(self.rhs[at : at + count].reshape(-1, size))
            at += count
        self.pair = self.room[: 2 * size].reshape(-1, size)
        return states

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without the states."""
        return int(self.room.nbytes + self.rhs.nbytes)

    def run(self, cycles: int) -> None:
        """Make a pass of `cycles` cycles from the present states; on the first rank, the first state is given."""
        self.residuals = []
        for number in range(cycles if self.factors else 1):
            # A cycle ends with an F-relaxation, so the next one does not begin with another.
            self._cycle(0, relaxed=number > 0)
        self._settle()

    def _cycle(self, level: int, relaxed: bool = False) -> None:
        if level == len(self.factors):
            self._solve(level)
            return
        if not relaxed:
            self._relax(level)
        for _ in range(self.relaxations):
            self._relax_points(level)
        self._restrict(level)
        self._cycle(level + 1)
        self._relax(level)

    def _step(self, level: int, j: int, out: np.ndarray) -> None:
        """Apply step j of a level to the point before it, into out."""
        self.march(self.strides[level], j, self.u[level][j], out)
        if level:
            out += self.g[level - 1][j]

    def _solve(self, level: int) -> None:
        """March through the coarsest level, one rank after the other."""
        u = self.u[level]
        self._settle()
        self.neighbours.receive(u[0]).finish()
        for j in range(len(u) - 1):
            self._step(level, j, u[j + 1])
        self.sent.append(self.neighbours.send(u[-1]))

    def _relax(self, level: int, arrival: Waiting | None = None) -> None:
        """F-relaxation; the interval after the first point comes last. arrival: the message with the first point."""
        u, m = self.u[level], self.factors[level]
        for first in range(len(u) - 1 - m, -1, -m):
            if first == 0 and arrival is not None:
                arrival.finish()
            for j in range(first, first + m - 1):
                self._step(level, j, u[j + 1])

    def _relax_points(self, level: int) -> None:
        """C-relaxation, the last point first, then F-relaxation."""
        u, m = self.u[level], self.factors[level]
        self._settle()
        arrival = self.neighbours.receive(u[0])
        for j in range(len(u) - 1, 0, -m):
            self._step(level, j - 1, u[j])
            if j == len(u) - 1:
                self.sent.append(self.neighbours.send(u[-1]))
        self._relax(level, arrival)

    def _restrict(self, level: int) -> None:
        """Compute g of the next level: v_j - Phi^c(v_{j-1}) + r_j with r_j the residual at point j m."""
        u, m = self.u[level], self.factors[level]
        fine, coarse = self.pair
        squares = np.zeros(2)
        for j, g in enumerate(self.g[level]):
            v = u[(j + 1) * m]
            self._step(level, (j + 1) * m - 1, fine)
            # r_j, then v_j + r_j - Phi^c(v_{j-1}).
            self.ops.combine(g, (1.0, fine), (-1.0, v))
            if level == 0:
                squares += self.ops.squared_norm(g), self.ops.squared_norm(v)
            self.march(self.strides[level + 1], j, u[j * m], coarse)
            self.ops.combine(g, (1.0, g), (1.0, v), (-1.0, coarse))
        if level == 0:
            self.residuals.append((float(squares[0]), float(squares[1])))

    def _settle(self) -> None:
        """Wait until all sent arrays may be written again."""
        for one in self.sent:
            one.finish()
        self.sent.clear()


def _strides(factors: tuple[int, ...]) -> list[int]:
    """Return the number of steps of the finest level that a step of each level spans."""
    return list(accumulate(factors, mul, initial=1))


def exact_cycles(steps: int, factors: tuple[int, ...], relaxations: int) -> int:
    """Return the number of cycles after which all points are exact.

    k cycles make the points up to k (relaxations + 1) m + m - 1 exact (derived).
    """
    return -(-steps // ((relaxations + 1) * factors[0])) if factors else 1


def evaluations(steps: int, ranks: int, factors: tuple[int, ...], relaxations: int, cycles: int) -> int:
    """Return the critical path of a pass over `steps` steps in all, in steps: its time over that of a step (derived).

    With two levels, factor m and one relaxation, the first cycle takes 3 n + N / m, where n of all N steps are a
    rank's. A further cycle takes n (1 - 1/m) fewer. It does not wait for other ranks on the coarsest level: a rank
    begins the next cycle while later ranks still march there, so N / m counts once, and n / m in further cycles.
    """

    def cycle(level: int, n: int, relaxed: bool) -> int:
        if level == len(factors):
            return n
        m = factors[level]
        between = n - n // m
        return between * (1 - relaxed) + relaxations * n + 2 * (n // m) + cycle(level + 1, n // m, False) + between

    own = steps // ranks
    coarsest = own // _strides(factors)[-1]
    return sum(cycle(0, own, number > 0) for number in range(cycles if factors else 1)) + (ranks - 1) * coarsest
