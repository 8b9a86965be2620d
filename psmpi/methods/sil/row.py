"""One row of the parts of the method `sil`: outputs from part to part, gradients back, and counts of their costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers import Boundary, Message, Spread, Step
from psmpi.data import Resident
from psmpi.methods.sil.part import TrainedPart
from psmpi.methods.sil.plan import Assignment
from psmpi.training.context import Context


class Row:
    """This rank's parts in its row, and the cuts between all parts of the row.

    train: the training samples, where part 0 is. macs, handed_bytes: multiply-accumulate operations and bytes sent from
    part to part, this rank's since the start; past: those of all ranks up to the last checkpoint.
    """

    def __init__(
        self,
        context: Context,
        parts: dict[int, TrainedPart],
        assignment: Assignment,
        stages: list[tuple[int, int]],
        world: Group,
        peers: Group,
        train: Resident,
    ):
        network, n = context.network, context.dataset.train.n
        self.parts, self.assignment, self.world, self.train = parts, assignment, world, train
        self.row = context.rank % assignment.rows
        # Boundaries after each part but the last, in this row; for each part here, a broadcast from each row.
        units = [int(np.prod(network.layers[stop - 1].out_shape)) for _, stop in stages]
        at = [assignment.rank(k, self.row) for k in range(len(stages))]
        self.boundaries = [Boundary(world, at[k], at[k + 1], units[k], context.dtype) for k in range(len(stages) - 1)]
        self.shared = {
            k: [Spread(peers, part.inputs, context.dtype, row, per_sample=True) for row in range(assignment.rows)]
            for k, part in parts.items()
        }
        # Pieces in which all training samples are handed over. Normalization needs samples from the whole data set in
        # each piece, as a data set may be sorted by class.
        self.pieces = network.evaluation_batches(n)
        if network.normalized:
            self.pieces = [slice(k, None, len(self.pieces)) for k in range(len(self.pieces))]
        self.earlier_counts, self.macs, self.handed_bytes = (0, 0), 0, 0
        self.count = n

    def fetch(self, samples: Resident, ids: np.ndarray) -> np.ndarray | None:
        """Return samples (inputs, b) on part 0's rank, else None."""
        if 0 not in self.parts:
            return None
        x = self.parts[0].room(len(ids))
        samples.fetch(ids, x)
        return x

    def pass_on(self, k: int, x: np.ndarray | None, b: int) -> np.ndarray | None:
        """Return the outputs (units, b) of part k for inputs x on the rank of this row's part k + 1, else None."""
        part, after, y = self.parts.get(k), self.parts.get(k + 1), None
        if part is not None:
            assert x is not None
            y = part.forward(x)
            self.macs += part.cost.forward * b
        if part is not None and after is not None:
            return y
        received = None if after is None else after.room(b)
        self.boundaries[k].forward(y, received)
        self.handed_bytes += 0 if y is None else y.nbytes
        return received

    def pass_back(self, k: int, dx: np.ndarray | None, b: int) -> np.ndarray | None:
        """Return the gradient of part k's outputs on its rank, else None; dx: that of part k + 1's inputs."""
        part, after = self.parts.get(k), self.parts.get(k + 1)
        if part is not None and after is not None:
            return dx
        received = None if part is None else part.objective.cast[: part.units * b].reshape(part.units, b)
        sent = dx if after is not None else None
        self.boundaries[k].backward(sent, received)
        self.handed_bytes += 0 if sent is None else sent.nbytes
        return received

    def hand_over(self, first: int, last: int) -> None:
        """Store, in each part after `first` up to `last`, the outputs of the part before for all training samples.

        Rows process pieces in turn. All rows of a part need all pieces, so the row that has a piece broadcasts it.
        """
        if first >= last:
            return
        for number, at in enumerate(self.pieces):
            ids, row = np.arange(self.count)[at], number % self.assignment.rows
            x = None
            if row == self.row and first == 0:
                x = self.fetch(self.train, ids)
            elif row == self.row and first in self.parts:
                x = self.parts[first].room(len(ids))
                self.parts[first].samples.fetch(ids, x)
            for k in range(first, last):
                if row == self.row:
                    x = self.pass_on(k, x, len(ids))
                after = self.parts.get(k + 1)
                if after is not None:
                    x = after.room(len(ids)) if x is None else x
                    self.shared[k + 1][row].forward(x, x)
                    after.stored[at] = x.T

    def handed_over(self, first: int, last: int) -> list[Message]:
        """Return the messages of `hand_over`, those of this row and of its parts."""
        messages = []
        for number, at in enumerate(self.pieces):
            step, row = Step(len(range(*at.indices(self.count)))), number % self.assignment.rows
            for k in range(first, last):
                messages += self.boundaries[k].messages(step) if row == self.row else []
                messages += self.shared[k + 1][row].messages(step) if k + 1 in self.shared else []
        return messages

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Context manager for work that is not part of the training: operations and bytes do not count."""
        before = self.macs, self.handed_bytes
        with self.world.counter.paused():
            yield
        self.macs, self.handed_bytes = before

    def totals(self) -> tuple[int, int]:
        """Return the MACs and the bytes sent from part to part, of all ranks since the first start."""
        # In two halves, as the sums are float64, which holds integers up to 2^53.
        halves = np.array([divmod(n, 1 << 32) for n in (self.macs, self.handed_bytes)], np.float64)
        (macs, macs_low), (handed, handed_low) = self.world.agree(halves.reshape(-1)).reshape(2, 2).astype(int).tolist()
        return self.earlier_counts[0] + (macs << 32) + macs_low, self.earlier_counts[1] + (handed << 32) + handed_low
