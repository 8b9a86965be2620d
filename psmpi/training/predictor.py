"""Scores of samples from weights of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.control import Control
from psmpi.comm.group import Counter, Group
from psmpi.comm.protocol import World
from psmpi.comm.transfers import RowExchange
from psmpi.data import Resident, Split
from psmpi.layout import Layout, make_grid
from psmpi.nn.model import Model
from psmpi.nn.network import Network


class Predictor:
    """The scores of `classes` on one rank of `world`, where all ranks are workers of the score partition.

    The caller fills `w`, (part.size,), the weights of `part`. More ranks than classes share the samples; so do all
    ranks where the network cannot be partitioned.
    """

    def __init__(
        self,
        world: World,
        control: Control,
        network: Network,
        layout: Layout,
        classes: Sequence[int],
        dtype: np.dtype,
        ops: NumpyOps,
    ):
        self.network = network
        self.control, self.classes, self.dtype = control, tuple(classes), dtype
        rows = world.size if network.tie() is not None else 0
        grid = make_grid("scores", len(self.classes), world.size, rows)
        self.place = grid[world.rank]
        self.rows = 1 + grid[-1].row
        peers = [rank for rank, w in enumerate(grid) if w.row == self.place.row]
        counts = [len(grid[rank].classes) for rank in peers]
        self.score_exchange = RowExchange(Group(world, peers, Counter()), counts, dtype)
        # The ranks that gather what their row has found.
        self.reporters = [rank for rank, w in enumerate(grid) if w.column == 0]
        mine = [self.classes[k] for k in self.place.classes]
        self.part = layout.part(mine)
        self.w = np.empty(self.part.size, dtype)
        self.model = Model(network, layout, self.w, None, ops, mine)

    def calibrate(self, split: Split, count: int) -> None:
        """Let batch normalization use the statistics of `count` samples from all over a split."""
        count = min(count, split.n)
        # A file may be in the order of the classes.
        ids = np.arange(count) * split.n // count
        pieces = len(self.network.evaluation_batches(count))
        self.model.calibrate(self._fetch(split, ids[k::pieces]) for k in range(pieces))

    def _fetch(self, split: Split, ids: np.ndarray) -> np.ndarray:
        x = np.empty((split.features, len(ids)), self.dtype)
        Resident(split, ids, self.dtype).fetch(ids, x)
        return x

    def run(self, split: Split) -> np.ndarray | None:
        """Scores (n, classes) of all samples, on rank 0; None on the others."""
        batches = self.network.evaluation_batches(split.n)
        dealt = [[batches[k] for k in some] for some in np.array_split(np.arange(len(batches)), self.rows)]
        # First and behind the last sample of each row.
        edges = [(some[0].start, some[-1].stop) if some else (0, 0) for some in dealt]
        first, behind = edges[self.place.row]
        count = len(self.classes)
        found = np.empty((behind - first, count), self.dtype)
        for at in dealt[self.place.row]:
            x = self._fetch(split, np.arange(at.start, at.stop))
            scores = np.empty((count, x.shape[1]), self.dtype)
            self.score_exchange.forward(self.model.forward(x).scores, scores)
            found[at.start - first : at.stop - first] = scores.T
        if self.control.rank != 0:
            if self.place.column == 0 and len(found):
                self.control.send_to_first(found)
            return None
        everything = np.empty((split.n, count), self.dtype)
        for rank, (start, stop) in zip(self.reporters, edges, strict=True):
            if start < stop and rank != 0:
                self.control.receive_from(everything[start:stop], rank)
            elif start < stop:
                everything[start:stop] = found
        return everything
