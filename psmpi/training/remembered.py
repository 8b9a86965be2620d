"""What PSL divides the derivatives of each training sample by: its own value when the sample was last visited."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers import Message, RowExchange, Step
from psmpi.layout import TableRows
from psmpi.training.state import State


class Remembered:
    """values (samples,): 1 + S of each sample at its last visit, 1 before the first; the same on all workers.

    S is the sum of a sample's terms over the other classes, see `PSL`, of which each worker finds that of its own. A
    sample is visited once an epoch, so these shares can wait for its end to be added up. group: the workers, of which
    each writes an equal share of the samples into checkpoints, as rows of a table; None on other ranks.
    """

    def __init__(
        self, group: Group | None, workers: Sequence[int], ranks: int, samples: int, dtype: np.dtype, state: State
    ):
        self.group = group
        spans = np.array_split(np.arange(samples), len(workers))
        self.counts = [len(span) for span in spans]
        held = samples if group is not None else 0
        self.values, self.found, self.visited = np.ones(held, dtype), np.zeros(held, dtype), np.zeros(held, bool)
        # What all workers together may find is finite.
        self.most = float(np.finfo(dtype).max) / (1 + len(workers))
        self.own = slice(0, 0)
        if group is not None:
            starts = [0, *accumulate(self.counts)]
            self.own = slice(starts[group.rank], starts[group.rank + 1])
            self.exchange = RowExchange(group, self.counts, dtype)
        of = dict(zip(workers, (tuple(span.tolist()) for span in spans), strict=True))
        state.rows = TableRows(tuple(of.get(rank, ()) for rank in range(ranks)))
        state.lost = "what the loss remembers of these samples: it begins at 1"
        state.account.hold("samples", self.values, self.found, self.visited)
        state.table("remembered", self.values[self.own].reshape(-1, 1))

    def note(self, ids: np.ndarray, sums: np.ndarray | None) -> None:
        """Keep the shares of S of samples `ids` (b,): sums (b,) float64, None of a failed loss."""
        self.found[ids] = np.nan if sums is None else np.minimum(sums, self.most)

    def visit(self, ids: np.ndarray, kept: bool) -> None:
        """End a step on samples `ids` of all workers; what was found of them counts only where it is `kept`."""
        if self.group is None:
            return
        if kept:
            self.visited[ids] = True
        else:
            self.found[ids] = 0

    def settle(self) -> None:
        """Take up what was found since the last call; all workers call it."""
        if self.group is None:
            return
        found, own = np.empty(self.counts[self.group.rank], self.values.dtype), self.values[self.own].copy()
        self.exchange.backward(self.found.reshape(-1, 1), found)
        # What is no number on one worker is none in the sum.
        np.add(found, 1, out=own, where=self.visited[self.own] & np.isfinite(found))
        self.exchange.forward(own, self.values.reshape(-1, 1))
        self.found.fill(0)
        self.visited.fill(False)

    def drain(self) -> None:
        """Bring the table up to date, which is no part of the training."""
        if self.group is not None:
            with self.group.counter.paused():
                self.settle()

    def restored(self) -> None:
        """Go on from the table, of which this rank has its rows."""
        self.found.fill(0)
        self.visited.fill(False)
        self.drain()

    def messages(self) -> list[Message]:
        """The messages of the end of an epoch; a rank without a group knows of none."""
        if self.group is None:
            return []
        return [*self.exchange.messages(Step()), *self.exchange.messages(Step(), back=True)]
