"""Scores of samples by a network of which each rank holds a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.backend import NumpyOps
from psmpi.checkpoint import Contents
from psmpi.comm.control import Control
from psmpi.comm.group import Counter, Group
from psmpi.comm.protocol import World
from psmpi.config import Data
from psmpi.data import Identity, Resident, Split, identify_split, open_split, split_differences
from psmpi.errors import UserError
from psmpi.layout import Layout, make_grid
from psmpi.nn.cut import couples, tail_of
from psmpi.nn.layers.workspace import Span
from psmpi.nn.metric import largest
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.tiles import is_tiled, make_tail
from psmpi.training.spans import check_tokens

# Samples in a minibatch of tests, from which batch normalization takes statistics; means of fewer samples have a
# standard error of over 3 %.
FEW = 1000


def known_targets(split: Split, contents: Contents, outputs: int, dataset: str, path: Path) -> npt.NDArray[Any] | None:
    """The targets of samples to predict, None without targets.

    outputs: number of outputs of the checkpoint; dataset, path: names of samples and checkpoint, for messages.
    UserError for targets of another kind than those of the training.
    """
    targets = split.targets if split.task == "regression" or split.labels.max(initial=-1) >= 0 else None
    if targets is not None and split.task != contents.task:
        has, learnt = (
            "integers, which are labels" if split.task == "classes" else "floating point numbers, which are values",
            "values" if split.task == "classes" else "classes",
        )
        raise UserError(
            f"{dataset} has {has}, and checkpoint {path} predicts {learnt}: give the data set that fits with --dataset"
        )
    if targets is not None and split.by_step != contents.by_step:
        has, learnt = ("a step", "a sequence") if split.by_step else ("a sequence", "a step")
        raise UserError(
            f"{dataset} has a target {has}, and checkpoint {path} predicts one {learnt}: give the data set "
            "that fits with --dataset"
        )
    if targets is not None and split.task == "regression" and targets.shape[-1] != outputs:
        raise UserError(
            f"{dataset} has {targets.shape[-1]} values a sample, checkpoint {path} predicts {outputs}: "
            "give the data set that fits with --dataset"
        )
    if split.task == "classes" and split.labels.max(initial=-1) >= outputs:
        raise UserError(
            f"{dataset} has the label {split.labels.max()}, checkpoint {path} knows the classes "
            f"0-{outputs - 1}: give the data set that fits with --dataset"
        )
    return targets


def calibration_split(
    trained: Data, dataset: str, data_dir: str, contents: Contents, path: Path, share: tuple[int, int] = (0, 1)
) -> Split:
    """The training split of the data set that the checkpoint at `path` was trained on, for `--calibrate`.

    dataset, data_dir: the place of the data set now, both empty if it has not moved. contents: of the checkpoint.
    share: the part of the samples to compare, see `psmpi.data.identify_split`. UserError for other samples than those
    of the training.
    """
    name = dataset or trained.dataset
    split = open_split(name, data_dir or trained.data_dir, "train", *trained.source[2:], names=contents.called)
    known = Identity.of(contents.data).train if contents.data else None
    other = known is not None and bool(split_differences(known, identify_split(split, share), "training"))
    if split.shape != contents.in_shape or other:
        raise UserError(
            f"--calibrate: {name} has not the training samples, of shape {contents.in_shape}, that checkpoint {path} "
            "was trained on: bring back that data set, or say where it is with --data-dir"
        )
    return split


def calibration_notes(count: int, samples: int) -> list[str]:
    """Notes on `--calibrate` with `count` samples of a training split of `samples`.

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
    some = [ids[k::pieces] for k in range(pieces)]
    model.calibrate((fetch(split, one, dtype) for one in some), (span_of(split, one) for one in some))


def span_of(split: Split, ids: np.ndarray) -> Span:
    """The steps of the sequences `ids` (b,) of a split, in host memory."""
    return Span(None if split.lengths is None else split.lengths[ids])


def fetch(split: Split, ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The samples `ids` (b,) of a split, (features, b)."""
    x = np.empty((split.features, len(ids)), dtype)
    Resident(split, ids, dtype).fetch(ids, x)
    return x


class Predictor:
    """One rank that computes scores of `classes`; all ranks of `world` are workers of the score partition.

    The caller fills `w` (part.size,), the weights of `part`. More ranks than classes share the samples, and so do all
    ranks if the network cannot be partitioned. top: number of largest scores to find for each sample, for very many
    classes tile by tile; 0: all scores, or the values of a regression.
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
        top: int,
    ):
        self.network, self.scores_per_sample = network, max(1, network.steps)
        self.control, self.dtype, self.top = control, dtype, top
        rows = world.size if network.tie() is not None else 0
        grid = make_grid("scores", len(classes), world.size, rows)
        self.place = grid[world.rank]
        self.rows = 1 + grid[-1].row
        peers = [rank for rank, w in enumerate(grid) if w.row == self.place.row]
        counts = [min(top, len(grid[rank].classes)) if top else len(grid[rank].classes) for rank in peers]
        self.group, self.counts = Group(world, peers, Counter()), counts
        # Number of values of a sample that rank 0 receives, and their types.
        self.width = min(top, sum(counts)) if top else sum(counts)
        self.kinds: list[np.dtype] = [dtype, *([np.dtype(np.int64)] if top else [])]
        # The ranks that gather the results of their row.
        self.reporters = [rank for rank, w in enumerate(grid) if w.column == 0]
        held = classes[self.place.classes[0] : self.place.classes[-1] + 1]
        self.own_classes = np.array(held, np.int64)
        self.part = layout.part(held)
        self.w = np.empty(self.part.size, dtype)
        most = max(at.stop - at.start for at in network.evaluation_batches(FEW))
        tail = tail_of(network)
        # Fixed statistics are those of all classes, so that tiles do not apply.
        fixes = tail is not None and couples(network, tail)
        tiled = top > 0 and not fixes and is_tiled(network, len(held), most, ops, "classes")
        self.model = Model(network, layout, self.w, None, ops, held, tiled=tiled)
        self.tail = make_tail(self.model) if tiled else None

    def run(self, split: Split, take: Callable[..., None] | None) -> None:
        """Call take(at, scores), on rank 0 alone, for the samples `at` (a slice) of each minibatch, in any order.

        scores: (b, classes) of the dtype. With `top` the call is take(at, scores, classes) with the largest scores and
        their classes, (b, top) each, see `largest`. If each step of sequences has scores, steps take the place of
        samples, in order.
        """
        batches = self.network.evaluation_batches(split.n)
        dealt = [[batches[k] for k in some] for some in np.array_split(np.arange(len(batches)), self.rows)]
        queue = dealt[self.place.row]
        # One minibatch of each row at a time, so that no rank holds more than one.
        for turn in range(max(map(len, dealt))):
            arrays = self._find(split, queue[turn]) if turn < len(queue) else []
            if take is None:
                for array in arrays:
                    self.control.send_to_first(array)
                continue
            for rank, some in zip(self.reporters, dealt, strict=True):
                if turn < len(some):
                    at = slice(some[turn].start * self.scores_per_sample, some[turn].stop * self.scores_per_sample)
                    take(at, *(arrays if rank == 0 else self._receive(at, rank)))

    def _find(self, split: Split, at: slice) -> list[np.ndarray]:
        """The results (samples, ...) of the row for the samples `at`, on its first rank; [] on its other ranks."""
        ids = np.arange(at.start, at.stop)
        samples, x = Resident(split, ids, self.dtype), np.empty((split.features, len(ids)), self.dtype)
        check_tokens(self.network, samples, "given")
        samples.fetch(ids, x)
        span = span_of(split, ids)
        arrays = [self._scores(x, span)] if self.top == 0 else self._largest(x, span)
        b, first = arrays[0].shape[1], self.place.column == 0
        gathered = [np.empty((sum(self.counts) if first else 0, b), array.dtype) for array in arrays]
        sizes = [n * b for n in self.counts]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        for own, room in zip(arrays, gathered, strict=True):
            if first:
                room[: len(own)] = own
            if self.group.size > 1:
                self.group.gatherv(own, room, sizes, starts)
        if not first:
            return []
        if self.top:
            gathered = list(largest(gathered[0], self.top, gathered[1]))
        return [np.ascontiguousarray(array.T) for array in gathered]

    def _scores(self, x: np.ndarray, span: Span) -> np.ndarray:
        """Scores (outputs, b) of samples (features, b); if each step has scores (outputs, b * steps)."""
        y: np.ndarray = self.model.forward(x, None, span).scores
        return np.ascontiguousarray(y.transpose(0, 2, 1)).reshape(len(y), -1) if self.model.steps else y

    def _largest(self, x: np.ndarray, span: Span) -> list[np.ndarray]:
        """The largest of this rank's scores, and their classes, (top, b) each."""
        y = self._scores(x, span)
        tiles = [(0, y)] if self.tail is None else self.tail.tiles(y.reshape(-1, x.shape[1]))
        scores, classes = np.empty((0, y.shape[-1]), self.dtype), np.empty((0, y.shape[-1]), np.int64)
        for first, tile in tiles:
            more, at = largest(tile, self.top)
            # Tiles are in the order of their classes.
            scores = np.concatenate([scores, more])
            classes = np.concatenate([classes, self.own_classes[first + at]])
            scores, classes = largest(scores, self.top, classes)
        return [scores, classes]

    def _receive(self, at: slice, rank: int) -> list[np.ndarray]:
        """The results of another row for the samples `at`, from its first rank."""
        arrays: list[np.ndarray] = [np.empty((at.stop - at.start, self.width), kind) for kind in self.kinds]
        for array in arrays:
            self.control.receive_from(array, rank)
        return arrays
