"""Scores of samples from weights of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.checkpoint import Contents
from psmpi.comm.control import Control
from psmpi.comm.group import Counter, Group
from psmpi.comm.protocol import World
from psmpi.comm.transfers import RowExchange
from psmpi.config import Data
from psmpi.data import Identity, Resident, Split, identify_split, open_split, split_differences
from psmpi.errors import UserError
from psmpi.layout import Layout, make_grid
from psmpi.nn.model import Model
from psmpi.nn.network import Network

# As many as tests in training take their statistics from; the means of fewer are over 3 % of a standard deviation off.
FEW = 1000


def calibration_split(
    trained: Data, dataset: str, data_dir: str, contents: Contents, path: Path, share: tuple[int, int] = (0, 1)
) -> Split:
    """The training split of the data set that the checkpoint at `path` was trained on, for `--calibrate`.

    dataset, data_dir: where the data set is now, both empty where it is still in its place. contents: of the
    checkpoint. share: which part of the samples to compare, see `psmpi.data.identify_split`. UserError for other
    samples than those that it was trained on.
    """
    name = dataset or trained.dataset
    split = open_split(name, data_dir or trained.data_dir, "train", trained.split_seed)
    known = Identity.of(contents.data).train if contents.data else None
    other = known is not None and bool(split_differences(known, identify_split(split, share), "training"))
    if split.shape != contents.in_shape or other:
        raise UserError(
            f"--calibrate: {name} has not the training samples, of shape {contents.in_shape}, that checkpoint {path} "
            "was trained on: bring back that data set, or say where it is with --data-dir"
        )
    return split


def calibration_notes(count: int, samples: int) -> list[str]:
    """What to tell of `--calibrate` with `count`, where the training split has so many `samples`.

    The mean of n samples has the standard error σ / √n, whatever their distribution, if σ is their standard deviation;
    channels of convolutions, with their many positions, have a smaller one.
    """
    if count > samples:
        return [f"note: --calibrate {count}: the training split has {samples:,} samples, and all of them are taken"]
    if count >= min(FEW, samples):
        return []
    off = f"{100 / sqrt(count):.0f} %"
    return [
        f"warning: --calibrate {count}: means of so few samples are up to about {off} of a standard deviation off, and "
        f"each score with them: take more, as with --calibrate {min(10_000, samples)}"
    ]


def calibrate(model: Model, split: Split, count: int, dtype: np.dtype) -> None:
    """Let the batch normalization of a model use the statistics of `count` samples from all over a split."""
    count = min(count, split.n)
    # A file may be in the order of the classes.
    ids = np.arange(count) * split.n // count
    pieces = len(model.network.evaluation_batches(count))
    model.calibrate(fetch(split, ids[k::pieces], dtype) for k in range(pieces))


def fetch(split: Split, ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The samples `ids` (b,) of a split, (features, b)."""
    x = np.empty((split.features, len(ids)), dtype)
    Resident(split, ids, dtype).fetch(ids, x)
    return x


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
            x = fetch(split, np.arange(at.start, at.stop), self.dtype)
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
