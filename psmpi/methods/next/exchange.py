"""One exchange among agents: their vectors go to the neighbours' ranks, which sum them with the graph's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers import Message, Neighbours, Step
from psmpi.methods.next.graph import Graph, both, weights
from psmpi.methods.next.rules import halves


class Exchange:
    """Weighted sums over each agent and its neighbours, in the order of agents: the same bits on any number of ranks.

    sent: (agents of this rank, ...), the vectors that agents send; owners: the rank of each agent. Agents of one rank
    exchange vectors without messages.
    """

    def __init__(
        self, group: Group, graph: Graph, owners: Sequence[int], sent: np.ndarray, dtype: np.dtype, ops: NumpyOps
    ):  # fmt: skip
        self.graph, self.sent, self.ops = graph, sent, ops
        size = sent[0].size
        edges = both(graph.links)
        self.neighbours = Neighbours(group, edges, size, dtype, ops, owners)
        self.first = self.neighbours.first
        self.room = ops.empty(len(self.neighbours.sources) * size, dtype).reshape(-1, size)
        self.links: tuple[tuple[int, int], ...] | None = None
        self.plan(0)

    def plan(self, iteration: int) -> None:
        """Set the links to those that work in an iteration."""
        links = self.graph.active(iteration)
        if links != self.links:
            self.links = links
            self.neighbours.plan(both(links))
            self.weights = weights(self.graph.count, links)

    def run(self, iteration: int) -> None:
        """Send and receive the vectors of an iteration."""
        self.plan(iteration)
        count = len(self.sent)
        self.neighbours.forward(self.sent.reshape(count, -1), self.room[: len(self.neighbours.sources)])

    def terms(self, own: int) -> Iterator[tuple[float, np.ndarray]]:
        """Yield (weight, sent vector) of an agent of this rank and of its neighbours; own: its place on this rank."""
        at = dict(zip(self.neighbours.sources, self.room, strict=False))
        row = self.weights[self.first + own]
        for agent in np.flatnonzero(row).tolist():
            place = agent - self.first
            yield float(row[agent]), at[agent] if agent in at else self.sent[place].reshape(-1)

    def mix(self, out: np.ndarray) -> None:
        """Fill out (agents of this rank, ...) with the weighted sums of the sent vectors."""
        for own, mixed in enumerate(out):
            self.ops.combine(mixed.reshape(-1), *self.terms(own))

    def add_sparse(self, out: np.ndarray) -> None:
        """Add the weighted sums of sent components, see `halves`, to out (agents of this rank, size)."""
        for own, near in enumerate(out):
            for weight, row in self.terms(own):
                values, places = halves(row)
                near[places] += weight * values

    def messages(self, iteration: int) -> list[Message]:
        """Return the messages of an iteration's exchange."""
        self.plan(iteration)
        return self.neighbours.messages(Step(round=iteration))
