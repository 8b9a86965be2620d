"""Multigrid reduction in time (MGRIT) on one rank: pure, over steps that are marched and values that are passed on.

Full approximation scheme for u_{i+1} = Phi_i(u_i) with u_0 given (Guenther et al., arXiv 1812.04352; XBraid). Every
m-th point of a level, m the factor, is a C-point, and the points of the next level; the others are F-points.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import Protocol

import numpy as np

from psmpi.backend import NumpyOps

# step(stride, j, x, out): out = the j-th of this rank's steps that span `stride` steps of the finest level, of x.
March = Callable[[int, int, np.ndarray, np.ndarray], None]


class Waiting(Protocol):
    """A message under way."""

    def finish(self) -> None:
        """Wait until it is done."""


class Neighbours(Protocol):
    """The ranks with the steps before this one's and behind them; messages of ends that have none are nothing."""

    def send(self, values: np.ndarray) -> Waiting:
        """Begin to send to the rank behind; values are not to be written before it is finished."""

    def receive(self, into: np.ndarray) -> Waiting:
        """Begin to receive from the rank before; elsewhere than on the first rank `into` is filled when finished."""


class Cycle:
    """V-cycles over this rank's steps.

    store: room for the states, of at least as many numbers as `shape` says. Points of coarser levels are views of those
    of the finest. relaxations: C-relaxations of each cycle on each level but the coarsest; 1 is FCF.

    residuals: of each cycle of the last pass the sum of |u_jm - Phi(u_jm-1)|^2 over this rank's C-points of the finest
    level before the coarse correction, and of |u_jm|^2.
    """

    def __init__(self, march: March, neighbours: Neighbours, store: np.ndarray, relaxations: int, ops: NumpyOps):
        self.march, self.neighbours, self.relaxations, self.ops, self.store = march, neighbours, relaxations, ops, store
        # What is added to the steps of coarser levels, and room for two states.
        self.more = self.room = store[:0]
        self.sent: list[Waiting] = []
        self.residuals: list[tuple[float, float]] = []

    def reserve(self, steps: int, size: int, factors: tuple[int, ...]) -> None:
        """Make room for shapes of no more steps and numbers, and these factors."""
        counts = [steps // stride for stride in _strides(factors)[1:]]
        self.more = self.ops.empty(sum(counts) * size, self.store.dtype)
        self.room = self.ops.empty(2 * size if factors else 0, self.store.dtype)

    def shape(self, steps: int, size: int, factors: tuple[int, ...]) -> np.ndarray:
        """Go on with so many steps of states of `size` numbers; returns these, (steps + 1, size).

        The points are those between this rank's steps and at both ends: the first is a copy of the last of the rank
        before. factors: of each level but the coarsest, how many of its steps are one of the next, 2 or more; their
        product divides the steps.
        """
        self.factors, self.strides = factors, _strides(factors)
        if steps % self.strides[-1]:
            raise ValueError(f"{steps} steps are not a multiple of {self.strides[-1]}")
        states: np.ndarray = self.store[: (steps + 1) * size].reshape(-1, size)
        self.u, self.g, at = [states[::stride] for stride in self.strides], [], 0
        for u in self.u[1:]:
            count = (len(u) - 1) * size
            self.g.append(self.more[at : at + count].reshape(-1, size))
            at += count
        self.two = self.room[: 2 * size].reshape(-1, size)
        return states

    @property
    def nbytes(self) -> int:
        """Bytes besides the states."""
        return int(self.room.nbytes + self.more.nbytes)

    def run(self, cycles: int) -> None:
        """A pass: so many cycles from the states as they are, the first of them on the first rank given."""
        self.residuals = []
        for number in range(cycles if self.factors else 1):
            # After a cycle all F-points are those that a relaxation would make.
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
        """The value that step j of a level makes of the point before it."""
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
        """F-relaxation, the interval behind the first point last; arrival: of that point."""
        u, m = self.u[level], self.factors[level]
        for first in range(len(u) - 1 - m, -1, -m):
            if first == 0 and arrival is not None:
                arrival.finish()
            for j in range(first, first + m - 1):
                self._step(level, j, u[j + 1])

    def _relax_points(self, level: int) -> None:
        """C-relaxation, the last point first, and F-relaxation."""
        u, m = self.u[level], self.factors[level]
        self._settle()
        arrival = self.neighbours.receive(u[0])
        for j in range(len(u) - 1, 0, -m):
            self._step(level, j - 1, u[j])
            if j == len(u) - 1:
                self.sent.append(self.neighbours.send(u[-1]))
        self._relax(level, arrival)

    def _restrict(self, level: int) -> None:
        """g of the next level: v_j - Phi^c(v_{j-1}) + r_j with r_j the residual at point j m."""
        u, m = self.u[level], self.factors[level]
        fine, coarse = self.two
        found = np.zeros(2)
        for j, g in enumerate(self.g[level]):
            v = u[(j + 1) * m]
            self._step(level, (j + 1) * m - 1, fine)
            # r_j, then v_j + r_j - Phi^c(v_{j-1}).
            self.ops.combine(g, (1.0, fine), (-1.0, v))
            if level == 0:
                found += self.ops.squared_norm(g), self.ops.squared_norm(v)
            self.march(self.strides[level + 1], j, u[j * m], coarse)
            self.ops.combine(g, (1.0, g), (1.0, v), (-1.0, coarse))
        if level == 0:
            self.residuals.append((float(found[0]), float(found[1])))

    def _settle(self) -> None:
        """Wait until what was sent may be written again."""
        for one in self.sent:
            one.finish()
        self.sent.clear()


def _strides(factors: tuple[int, ...]) -> list[int]:
    """Steps of the finest level that a step of each level spans."""
    return list(accumulate(factors, mul, initial=1))


def exact_cycles(steps: int, factors: tuple[int, ...], relaxations: int) -> int:
    """Cycles after which all points are exact (derived): k of them make points up to k (relaxations + 1) m + m - 1."""
    return -(-steps // ((relaxations + 1) * factors[0])) if factors else 1


def evaluations(steps: int, ranks: int, factors: tuple[int, ...], relaxations: int, cycles: int) -> int:
    """Steps that follow one another in a pass of so many steps in all: its time over that of a step (derived).

    With two levels of factor m and one relaxation 3 n + N / m in the first cycle, n a rank's steps of all N. Further
    ones have n (1 - 1/m) less, and wait for no other rank on the coarsest level: a rank begins the next cycle while
    those behind it still march there, so that N / m counts once, and later n / m.
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
