"""Sums over classes for each sample of a minibatch, where each rank of a row has the scores of some classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers import Message, RowExchange, Step, Sum
from psmpi.nn.losses import Loss


class ClassSums:
    """The exchange of sums over classes in a row of ranks: a few numbers a sample, whatever the number of classes.

    Summaries of `Loss.summarize` travel in the dtype of the scores, sums of terms in float64. counts: the number of
    classes of each rank. All arrays are arrays of `ops`.
    """

    def __init__(self, row: Group, loss: Loss, counts: Sequence[int], dtype: np.dtype, ops: NumpyOps):
        self.row, self.loss, self.dtype, self.ops = row, loss, np.dtype(dtype), ops
        # First class of each rank, counted from this rank's first class, as its labels are.
        self.starts = [start - sum(counts[: row.rank]) for start in accumulate(counts, initial=0)]
        sizes = [loss.summary_size(count) for count in counts]
        self.scores = Sum(row, 1, self.dtype, per_sample=True)
        self.rest = Sum(row, 1, np.dtype(np.float64), per_sample=True)
        self.gather = RowExchange(row, sizes, self.dtype) if loss.gathers else None
        self.size, self.sizes, self.capacity = len(loss.sums), sizes, -1
        self.begins = ops.put(np.array(self.starts, np.int64))

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        if batch > self.capacity:
            self.capacity = batch
            self.own = self.ops.empty(max(1, self.sizes[self.row.rank]) * batch, self.dtype)
            self.known = self.ops.empty(max(1, self.size) * batch, np.dtype(np.float64))
            self.all = self.ops.empty((sum(self.sizes) if self.gather else 0) * batch, self.dtype)

    @property
    def nbytes(self) -> int:
        return int(self.own.nbytes + self.known.nbytes + self.all.nbytes) if self.capacity > 0 else 0

    def summed(self, summary: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Merge the summaries of all ranks: (summary_size, b) float64 of this rank to (sums, b) float64 of the row."""
        b = summary.shape[1]
        self.reserve(b)
        own = self.own[: summary.size].reshape(summary.shape)
        own[...] = summary
        if self.gather is None:
            self.scores.backward(own, own)
            known = self.known[:b].reshape(1, b)
            known[...] = own
            return known
        gathered = self.all[: sum(self.sizes) * b].reshape(sum(self.sizes), b)
        self.gather.forward(own, gathered)
        merged = self.ops.fused("merge_normalizers")
        if merged is None:
            return self.loss.merge(gathered, self.starts, labels)
        known = self.known[: self.size * b].reshape(self.size, b)
        merged(gathered, self.begins, labels, known)
        return known

    def add(self, values: np.ndarray) -> None:
        """Sum `values` (b,) float64 over the row, in place."""
        self.rest.backward(values, values)

    def messages(self, step: Step) -> list[Message]:
        """The messages of the row in a training step."""
        messages = self.gather.messages(step) if self.gather is not None else []
        for name, transfer in (("label", self.scores), ("terms", self.rest)):
            if name in self.loss.sums and self.gather is None:
                messages += transfer.messages(step, back=True)
        return messages
