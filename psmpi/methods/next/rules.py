"""What agents do between two exchanges, and with what neighbours sent: the rules of in-network training.

Vectors are of all agents of a rank, (agents, size): w the weights, g their gradients, each of the agent's own mean loss
in the scale of the global one. `mixed` are sums of what the agent and its neighbours sent, by the graph's weights.
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
    """What a rule works with: the arrays of this rank's agents, and how to step along a gradient.

    make: zeros like w. step(w, g, lr): the optimizer's, of all agents at once; g is used up. scalar: declares one of
    the scalars, which checkpoints hold. minimum(own, w, y): of the convex model of one of the agents, (size,),
    where the network alone is linearised.
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
        """out = the sum of one or two multiples of arrays, of which out may be one."""
        self.ops.combine(out.reshape(-1), *((factor, array.reshape(-1)) for factor, array in terms))


class Rule:
    """The base class: what is sent, and what becomes of what is mixed.

    vectors: what an agent has besides its weights, by name, (agents, size) each, kept in checkpoints; kept: how many.
    sent: vectors that an exchange sends. tracked: which of the vectors has the mean over agents of the
    gradients, if one does.
    """

    kept: ClassVar[int] = 0
    sent: ClassVar[int] = 1
    tracked: ClassVar[str] = ""

    def __init__(self, agents: Agents):
        self.a = agents
        self.vectors: dict[str, np.ndarray] = {}

    def begin(self) -> None:
        """Take up weights that are new: at the start, and where a checkpoint lacks the vectors."""
        for vector in self.vectors.values():
            vector.fill(0)

    def move(self, out: Any, lr: float) -> None:
        """Go on from the gradients g; fill out (agents, sent, size), where there is an exchange, else None."""
        raise NotImplementedError

    def take(self, mixed: np.ndarray, lr: float) -> None:
        """Take what the exchange has mixed, (agents, sent, size)."""
        raise NotImplementedError


class Descent(Rule):
    """Adapt, then combine: z = the optimizer's step along an agent's own gradient; w = mixed z.

    With plain gradient descent it is decentralized gradient descent (Nedic and Ozdaglar, 2009; Chen and Sayed, 2012).
    """

    def move(self, out: Any, lr: float) -> None:
        out[:, 0] = self.a.w
        self._step(out, self.a.g, lr)

    def _step(self, out: np.ndarray, g: np.ndarray, lr: float) -> None:
        # One vector of all agents for the optimizer: rows of `out` may lie apart.
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
        self.y, self.before = agents.make(), agents.make()
        self.vectors = {"tracker": self.y, "gradient": self.before}

    def move(self, out: Any, lr: float) -> None:
        a = self.a
        self.y += a.g
        self.y -= self.before
        self.before[...] = a.g
        out[:, 1] = self.y
        # The optimizer uses up the gradient that it is given.
        a.g[...] = self.y
        self._step(out, a.g, lr)

    def take(self, mixed: np.ndarray, lr: float) -> None:
        super().take(mixed, lr)
        self.y[...] = mixed[:, 1]


class Next(Tracking):
    """NEXT (Di Lorenzo and Scutari, 2016; Scardapane and Di Lorenzo, 2017): to the minimum wt of a convex model.

    Fully linearised, it is y^T (w - w_i) + tau/2 |w - w_i|^2 + r(w), over a set; partially, see `Inner`. z = w + a (wt
    - w), and a shrinks by mu.
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
        # g is the minimum now.
        a.add(a.w, (1 - length, a.w), (length, g))
        out[:, 0] = a.w
        a.scalars["shrink"] = float(a.scalars["shrink"]) * max(0.0, 1 - s.mu * length)


class Extra(Rule):
    """EXTRA (Shi, Ling, Wu and Yin, 2015): w' = w + mixed w - (v + mixed v)/2 - a (g - g_v), v the weights before.

    The last three terms of one iteration but for g are `carry` of the next: (w + mixed w)/2 - a g.
    """

    kept = 1

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
    """K-GT (Liu, Lin, Koloskova and Stich, 2023): steps along g + c, and an exchange every few of them.

    c, the correction, is what an agent's gradients lack of the mean over agents; its mean over agents is 0.
    """

    kept = sent = 2

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
        # c += (mixed z - z) / (sum of lr), z what an agent has gone.
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
    """CHOCO-SGD (Koloskova, Stich and Jaggi, 2019): agents send the largest components of what others do not know.

    known: what all neighbours think that this agent's weights are; near: the mixed sum of these. After the optimizer's
    step w goes by `gossip_rate` of near - known. What is sent are the values of some components, then their places, as
    the bits of numbers of the same size.
    """

    kept = 2

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
        """Here mixed is `near`."""
        a = self.a
        a.add(a.g, (1.0, self.near), (-1.0, self.known))
        a.add(a.w, (1.0, a.w), (a.settings.gossip_rate, a.g))


def halves(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values and the places (integers) of what Choco sends."""
    count = row.size // 2
    return row[:count], row[count:].view(np.int32 if row.dtype.itemsize == 4 else np.int64)


def sent_components(size: int, density: float) -> int:
    """How many of so many components Choco sends."""
    return max(1, round(density * size))


RULES: dict[str, type[Rule]] = {
    "tracking": Tracking, "next": Next, "dgd": Descent, "extra": Extra, "choco": Choco, "kgt": LocalSteps,
}  # fmt: skip
