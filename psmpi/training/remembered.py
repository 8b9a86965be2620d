"""Divisors of the derivatives of training samples: one plus each sample's loss at its last visit."""

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

    S is the sum of a sample's terms over the other classes, see `PSL`; each worker computes the share of its classes.
    An epoch visits each sample once, so the shares are summed at its end. group: the workers, None on other ranks; each
    worker writes an equal share of the samples into checkpoints, as rows of a table.
    """

    def __init__(
        self, group: Group | None, workers: Sequence[int], ranks: int, samples: int, dtype: np.dtype, state: State
    ):
        self.group = group
        spans = np.array_split(np.arange(samples), len(workers))
        self.counts = [len(span) for span in spans]
        held = samples if group is not None else 0
        self.values, self.shares, self.visited = np.ones(held, dtype), np.zeros(held, dtype), np.zeros(held, bool)
        # Shares are limited, so that the sum over all workers is finite.
        self.most = float(np.finfo(dtype).max) / (1 + len(workers))
        self.own = slice(0, 0)
        if group is not None:
            starts = [0, *accumulate(self.counts)]
            self.own = slice(starts[group.rank], starts[group.rank + 1])
            self.exchange = RowExchange(group, self.counts, dtype)
        of = dict(zip(workers, (tuple(span.tolist()) for span in spans), strict=True))
        state.rows = TableRows(tuple(of.get(rank, ()) for rank in range(ranks)))
        state.not_restored = "the divisors of these samples: they start at 1"
        state.account.hold("samples", self.values, self.shares, self.visited)
        state.table("remembered", self.values[self.own].reshape(-1, 1))

    def note(self, ids: np.ndarray, sums: np.ndarray | None) -> None:
        """Keep this worker's shares of S of the samples `ids` (b,). sums: (b,) float64, None after a failed loss."""
        self.shares[ids] = np.nan if sums is None else np.minimum(sums, self.most)

    def visit(self, ids: np.ndarray, kept: bool) -> None:
        """End a step on the samples `ids` of all workers; kept: whether the step was made, so that shares count."""
        if self.group is None:
            return
        if kept:
            self.visited[ids] = True
        else:
            self.shares[ids] = 0

    def settle(self) -> None:
        """Sum the shares since the last call and update `values`. All workers call it."""
        if self.group is None:
            return
        remote, own = np.empty(self.counts[self.group.rank], self.values.dtype), self.values[self.own].copy()
        self.exchange.backward(self.shares.reshape(-1, 1), remote)
        # A share that is NaN on one worker makes the sum NaN, and the old value stays.
        np.add(remote, 1, out=own, where=self.visited[self.own] & np.isfinite(remote))
        self.exchange.forward(own, self.values.reshape(-1, 1))
        self.shares.fill(0)
        self.visited.fill(False)

    def drain(self) -> None:
        """Bring the table up to date for a checkpoint; the messages are not counted."""
        if self.group is not None:
            with self.group.counter.paused():
                self.settle()

    def restored(self) -> None:
        """Continue from this rank's rows of a restored table."""
        self.shares.fill(0)
        self.visited.fill(False)
        self.drain()

    def messages(self) -> list[Message]:
        """The messages at the end of an epoch; [] on a rank without a group."""
        if self.group is None:
            return []
        return [*self.exchange.messages(Step()), *self.exchange.messages(Step(), back=True)]
