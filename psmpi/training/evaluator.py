"""The test of a network whose ranks hold a shard each: layer by layer, so that no rank ever holds all weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

from psmpi.backend import Mirror, NumpyOps
from psmpi.comm.group import Group
from psmpi.comm.transfers import Gather
from psmpi.data import Resident, Split
from psmpi.layout import Runs
from psmpi.nn.cut import cut_stages, has_head, tail_of
from psmpi.nn.layers.chain import leaves
from psmpi.nn.metric import Metric, ScorePart
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.tail import Tail, classes_at_once
from psmpi.nn.tiles import is_tiled, make_tail, tail_numbers
from psmpi.training.spans import check_tokens, make_span


def evaluate(
    metric: Metric,
    batches: Iterable[slice],
    scores: Callable[[np.ndarray], np.ndarray | None],
    targets: Callable[[np.ndarray], np.ndarray],
    ops: NumpyOps,
    part: ScorePart | None = None,
) -> np.ndarray:
    """The metric's sums over minibatches of test samples, each a run of ids.

    scores(ids): scores (outputs, b) of all outputs, or of `part`, as an array of `ops`; None if another rank counts
    them. targets(ids): targets in host memory.
    """
    totals = metric.zeros()
    for at in batches:
        ids = np.arange(at.start, at.stop)
        values = scores(ids)
        if values is not None:
            totals += metric.sums(ops.host(values), targets(ids), part)
    return totals


def evaluate_by_tiles(
    metric: Metric,
    batches: Iterable[slice],
    tail: Tail,
    features: Callable[[np.ndarray], np.ndarray],
    targets: Callable[[np.ndarray], np.ndarray],
    classes: np.ndarray,
    part: ScorePart | None = None,
) -> np.ndarray:
    """`evaluate` without an array of all scores: `tail` makes those of `classes` from features(ids), (inputs, b)."""
    totals = metric.zeros()
    for at in batches:
        ids = np.arange(at.start, at.stop)
        outputs = features(ids).reshape(-1, len(ids))
        totals += metric.sums_by_tiles(tail, outputs, targets(ids), classes, part)
    return totals


class Evaluator:
    """The metric's sums over a split, of which each rank of `group` takes some minibatches.

    shards: of the group's ranks; weights: the mirror of this rank's shard. One rank uses the network as it is. Several
    ranks gather the weights of one layer at a time, or of all layers if these take less memory than the outputs of
    layers. Scores are not kept; scores of very many classes are computed tile by tile.
    """

    def __init__(
        self, network: Network, group: Group, shards: Sequence[Runs], weights: Mirror, split: Split, metric: Metric,
        ops: NumpyOps,
    ):  # fmt: skip
        # A separate stream: tests allocate memory, which recorded training steps may not.
        self.ops = ops = ops.separate()
        self.group, self.network, self.layout = group, network, network.layout()
        self.weights, self.metric, self.dtype, self.split = weights, metric, weights.host.dtype, split
        batches = network.evaluation_batches(split.n)
        dealt = [[batches[k] for k in some] for some in np.array_split(np.arange(len(batches)), group.size)]
        self.batches = dealt[group.rank]
        ids = np.concatenate([np.arange(0), *(np.arange(at.start, at.stop) for at in self.batches)])
        self.samples = Resident(split, ids, self.dtype, ops)
        check_tokens(network, self.samples, "test")
        # The size of the largest minibatch of all ranks, so that all ranks decide alike.
        self.most = max((at.stop - at.start for at in batches), default=0)
        tiled = metric.loss.weights == "none" and is_tiled(network, network.classes, self.most, ops, split.task)
        # Layers are gathered one after the other, so private layers of a class cannot be computed together.
        tiled = tiled and (group.size == 1 or has_head(network))
        self.classes = np.arange(network.classes) if tiled else None
        # The first rank has the largest share; all ranks use it, and so decide alike.
        ways = [[(0, len(network.layers))], *([cut_stages(network)] if group.size > 1 else [])]
        self.stages = min(ways, key=lambda stages: self._need(stages, dealt[0]))
        self.gathers: dict[tuple[int, int], tuple[Runs, Gather]] = {}
        for stage in self.stages if group.size > 1 else ():
            runs = network.runs(self.layout, *stage) - self.layout.dead
            self.gathers[stage] = runs, Gather(group, shards, runs, self.dtype)
        self.whole: Model | None = None
        if group.size == 1:
            whole = Runs(((0, self.layout.size),))
            at = (whole - self.layout.dead).inside(whole)
            assert at is not None
            self.whole = Model(network, self.layout, weights.array[at], None, ops, tiled=tiled)

    def run(self) -> np.ndarray:
        """The metric's sums over this rank's minibatches."""
        # Lazily: with a single stage, one minibatch at a time.
        held: Any = map(self._sample, self.batches)
        spans = [make_span(self.samples.lengths(np.arange(at.start, at.stop)), self.ops) for at in self.batches]
        *before, last = self.stages
        for stage in before:
            held = list(held)
            model = self._gathered(stage)
            for k, x in enumerate(held):
                # Each output takes the place of its input, so that both exist for one minibatch only.
                held[k] = self._kept(model.forward(x, None, spans[k]).scores)
        model, targets = self.whole or self._gathered(last), self.samples.targets
        passes = (model.forward(x, None, span).scores for x, span in zip(held, spans, strict=True))
        if self.classes is None:
            return evaluate(self.metric, self.batches, lambda _: next(passes), targets, self.ops)
        return evaluate_by_tiles(
            self.metric, self.batches, make_tail(model), lambda _: next(passes), targets, self.classes
        )

    def _sample(self, at: slice) -> np.ndarray:
        x = self.ops.empty(self.split.features * (at.stop - at.start), self.dtype).reshape(self.split.features, -1)
        self.samples.fetch(np.arange(at.start, at.stop), x)
        return x

    def _kept(self, y: np.ndarray) -> np.ndarray:
        kept = self.ops.empty(y.size, self.dtype).reshape(-1, y.shape[-1])
        kept[...] = y.reshape(kept.shape)
        return kept

    def _gathered(self, stage: tuple[int, int]) -> Model:
        """The model of the layers of a stage, whose weights all ranks gather."""
        runs, gather = self.gathers[stage]
        w = self.ops.mirror(self.ops.empty(runs.size, self.dtype))
        gather.forward(self.weights.host, w.host)
        w.push()
        w.settle()
        tiled = self.classes is not None and stage == self.stages[-1]
        return Model(self.network, self.layout, w.array, None, self.ops, layers=stage, tiled=tiled)

    def _need(self, stages: Sequence[tuple[int, int]], batches: Sequence[slice]) -> int:
        """Peak bytes: gathered weights, outputs between stages, and the activations of one minibatch."""
        samples, most = sum(at.stop - at.start for at in batches), 0
        for first, later in stages:
            tail = tail_of(self.network) if self.classes is not None and later == len(self.network.layers) else None
            last = later if tail is None else tail[0]
            sizes = [prod(layer.out_shape) for layer in leaves(self.network.layers[first:last])]
            held = samples * prod(self.network.layers[first].in_shape)
            if later < len(self.network.layers):
                held = max(held, samples * sizes[-1])
            if tail is not None:
                numbers = tail_numbers(self.network, tail)
                sizes.append(numbers * classes_at_once(self.network.classes, self.most * numbers))
            weights = self.network.runs(self.layout, first, later).size if self.group.size > 1 else 0
            most = max(most, held + self.most * sum(sizes) + weights)
        return most * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """The most bytes that a test needs at a time, besides the shard."""
        return self._need(self.stages, self.batches) + self.samples.nbytes
