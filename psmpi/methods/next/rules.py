"""The rules of in-network training: the steps of agents between two exchanges, and the use of mixed vectors.

Vectors are those of all agents of a rank, (agents, size): w the weights, g their gradients, each of the agent's own
mean loss in the scale of the global one. `mixed` are the sums of the vectors that an agent and its neighbours sent,
with the graph's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.methods.next.settings import Settings
from psmpi.optim import Optimizer


@dataclass
class Agents:
    """The arrays of this rank's agents, and the functions that a rule calls.

    make: returns zeros like w. step(w, g, lr): the optimizer's step of all agents at once; g is overwritten. scalar:
    declares one of the scalars, which checkpoints hold. minimum(own, w, y): returns the minimum (size,) of an agent's
    convex model that linearises only the network; None for other models.
    """

    ops: NumpyOps
    w: np.ndarray
    g: np.ndarray
    make: Callable[[], np.ndarray]
    optimizer: Optimizer
    scalar: Callable[[str, float], None]
    scalars: dict[str, float | int]
    settings: Settings
    minimum: Callable[[int, np.ndarray, np.ndarray], np.ndarray] | None = None

    def step(self, w: np.ndarray, g: np.ndarray, lr: float) -> None:
        self.optimizer.step(w.reshape(-1), g.reshape(-1), lr, lambda values: values)

    def add(self, out: np.ndarray, *terms: tuple[float, np.ndarray]) -> None:
        """Compute out, the sum of one or two multiples of arrays, of which out may be one."""
        self.ops.combine(out.reshape(-1), *((factor, array.reshape(-1)) for factor, array in terms))


class Rule:
    """Base class of rules: the vectors that agents send, and the use of mixed vectors.

    vectors: the vectors of agents besides their weights, by name, (agents, size) each, kept in checkpoints.
    stored_vectors: their number. sent: the number of vectors of an exchange. tracked: the name of the vector whose mean
    over agents is that of their gradients, "" without one.
    """

    stored_vectors: ClassVar[int] = 0
    sent: ClassVar[int] = 1
    tracked: ClassVar[str] = ""

    def __init__(self, agents: Agents):
        self.a = agents
        self.vectors: dict[str, np.ndarray] = {}

    def begin(self) -> None:
        """Reset the vectors for new weights: at the start, and if a checkpoint lacks the vectors."""
        for vector in self.vectors.values():
            vector.fill(0)

    def move(self, out: Any, lr: float) -> None:
        """Step with the gradients g; fill out (agents, sent, size) for the exchange, None if there is none."""
        raise NotImplementedError

    def take(self, mixed: np.ndarray, lr: float) -> None:
        """Use the mixed vectors (agents, sent, size) of an exchange."""
        raise NotImplementedError


class Descent(Rule):
    """Adapt, then combine: z = the optimizer's step along an agent's own gradient; w = mixed z.

    With the optimizer sgd, the rule is decentralized gradient descent (Nedic and Ozdaglar, 2009; Chen and Sayed, 2012).
    """

    def move(self, out: Any, lr: float) -> None:
        out[:, 0] = self.a.w
        self._step(out, self.a.g, lr)

    def _step(self, out: np.ndarray, g: np.ndarray, lr: float) -> None:
        # The optimizer steps one vector of all agents, and the rows of `out` may not be contiguous.
        z = self.a.w
        self.a.step(z, g, lr)
        out[:, 0] = z

    def take(self, mixed: np.ndarray, lr: float) -> None:
        self.a.w[...] = mixed[:, 0]


class Tracking(Descent):
    """Gradient tracking: y = mixed y + g(new) - g(old), whose mean over agents is that of their gradients.

    z = the optimizer's step along y; w = mixed z (Di Lorenzo and Scutari, 2016). With Adam it is akin to GTAdam
    (Carnevale and others, 2022), which mixes first, and does not correct Adam's moments for their start.
    """

    kept, sent, tracked = 2, 2, "tracker"

    def __init__(self, agents: Agents):
        super().__init__(agents)
        self.y, self.last_g = agents.make(), agents.make()
        self.vectors = {"tracker": self.y, "gradient": self.last_g}

    def move(self, out: Any, lr: float) -> None:
        a = self.a
        self.y += a.g
        self.y -= self.last_g
        self.last_g[...] = a.g
        out[:, 1] = self.y
        # The optimizer overwrites the gradient that it is given.
        a.g[...] = self.y
        self._step(out, a.g, lr)

    def take(self, mixed: np.ndarray, lr: float) -> None:
        super().take(mixed, lr)
        self.y[...] = mixed[:, 1]


class Next(Tracking):
    """NEXT (Di Lorenzo and Scutari, 2016; Scardapane and Di Lorenzo, 2017): steps to the minimum wt of a convex model.

    The fully linearised model is y^T (w - w_i) + tau/2 |w - w_i|^2 + r(w), over a set; for the partially linearised one
    see `Inner`. z = w + a (wt - w), and a shrinks by mu.
    """

    def __init__(self, agents: Agents):
        super().__init__(agents)
        agents.scalar("shrink", 1.0)

    def begin(self) -> None:
        super().begin()
        self.a.scalars["shrink"] = 1.0
        for w in self.a.w:
            self.a.settings.terms.project(self.a.ops, w)

    def _step(self, out: np.ndarray, g: np.ndarray, lr: float) -> None:
        a, s = self.a, self.a.settings
        length = lr * float(a.scalars["shrink"])
        if a.minimum is not None:
            for own, (w, y) in enumerate(zip(a.w, g, strict=True)):
                y[...] = a.minimum(own, w, y)
        else:
            a.add(g, (-1 / s.tau, g), (1.0, a.w))
            for y in g:
                s.terms.nearest(a.ops, y, s.tau)
        # g holds the minima wt here.
        a.add(a.w, (1 - length, a.w), (length, g))
        out[:, 0] = a.w
        a.scalars["shrink"] = float(a.scalars["shrink"]) * max(0.0, 1 - s.mu * length)


class Extra(Rule):
    """EXTRA (Shi, Ling, Wu and Yin, 2015): w' = w + mixed w - (v + mixed v)/2 - a (g - g_v).

    v and g_v are weights and gradient of the last iteration; `carry` is (v + mixed v)/2 - a g_v.
    """

    stored_vectors = 1

    def __init__(self, agents: Agents):
        super().__init__(agents)
        self.carry = agents.make()
        self.vectors = {"carry": self.carry}

    def begin(self) -> None:
        self.carry[...] = self.a.w

    def move(self, out: Any, lr: float) -> None:
        out[:, 0] = self.a.w

    def take(self, mixed: np.ndarray, lr: float) -> None:
        a, m = self.a, mixed[:, 0]
        a.ops.scale(a.g.reshape(-1), -lr)
        m += a.w
        a.w[...] = m
        a.w -= self.carry
        a.w += a.g
        m *= 0.5
        self.carry[...] = m
        self.carry += a.g


class LocalSteps(Rule):
    """K-GT (Liu, Lin, Koloskova and Stich, 2023): steps along g + c, with an exchange every few steps.

    The correction c estimates the mean gradient over agents minus the agent's own; its mean over agents is 0.
    """

    stored_vectors = sent = 2

    def __init__(self, agents: Agents):
        super().__init__(agents)
        self.correction, self.start = agents.make(), agents.make()
        self.vectors = {"correction": self.correction, "start": self.start}
        agents.scalar("length", 0.0)

    def begin(self) -> None:
        self.correction.fill(0)
        self.start[...] = self.a.w
        self.a.scalars["length"] = 0.0

    def move(self, out: Any, lr: float) -> None:
        a = self.a
        a.g += self.correction
        a.add(a.w, (1.0, a.w), (-lr, a.g))
        a.scalars["length"] = float(a.scalars["length"]) + lr
        if out is not None:
            out[:, 0] = a.w
            self.start -= a.w
            out[:, 1] = self.start

    def take(self, mixed: np.ndarray, lr: float) -> None:
        a = self.a
        # c += (mixed z - z) / (sum of lr), with z the agent's weights at the last exchange minus those now.
        change = mixed[:, 1]
        change -= self.start
        length = float(a.scalars["length"])
        if length > 0:
            change *= 1 / length
            self.correction += change
        a.w[...] = mixed[:, 0]
        self.start[...] = a.w
        a.scalars["length"] = 0.0


class Choco(Rule):
    """CHOCO-SGD (Koloskova, Stich and Jaggi, 2019): agents send the largest components of w - known.

    known: the copy of this agent's weights that all neighbours have; near: the mixed sum of such copies. After the
    optimizer's step, w moves by `gossip_rate` times near - known. A message holds the values of some components, then
    their places, integers in the bits of numbers of the same size.
    """

    stored_vectors = 2

    def __init__(self, agents: Agents):
        super().__init__(agents)
        self.known, self.near = agents.make(), agents.make()
        self.vectors = {"known": self.known, "near": self.near}

    def move(self, out: Any, lr: float) -> None:
        a = self.a
        a.step(a.w, a.g, lr)
        a.add(a.g, (1.0, a.w), (-1.0, self.known))
        for row, change, known in zip(out.reshape(len(out), -1), a.g, self.known, strict=True):
            values, places = halves(row)
            host = a.ops.host(change)
            at = np.sort(np.argpartition(np.abs(host), host.size - values.size)[host.size - values.size :])
            values[...] = change[at]
            places[...] = a.ops.put(at.astype(places.dtype))
            known[at] += values

    def take(self, mixed: np.ndarray, lr: float) -> None:
        """Move the weights; `mixed` is `near` itself."""
        a = self.a
        a.add(a.g, (1.0, self.near), (-1.0, self.known))
        a.add(a.w, (1.0, a.w), (a.settings.gossip_rate, a.g))


def halves(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return views of the values and of the places (integers) in a message of `Choco`."""
    count = row.size // 2
    return row[:count], row[count:].view(np.int32 if row.dtype.itemsize == 4 else np.int64)


def sent_components(size: int, density: float) -> int:
    """Return how many of `size` components `Choco` sends."""
    return max(1, round(density * size))


RULES: dict[str, type[Rule]] = {
    "tracking": Tracking, "next": Next, "dgd": Descent, "extra": Extra, "choco": Choco, "kgt": LocalSteps,
}  # fmt: skip
