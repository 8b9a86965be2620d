"""The worker of a part of a network: its subnetwork, samples, element losses and their gradient."""

from __future__ import annotations

from math import ceil, sqrt

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.bridge import Bridge
from psmpi.comm.group import Group
from psmpi.comm.transfers import Message, Step
from psmpi.config import Config
from psmpi.data import Batch, Resident
from psmpi.layout import Roles, Worker
from psmpi.nn.device_tiles import DeviceTiledObjective, has_device_tiles
from psmpi.nn.layers.chain import Tape
from psmpi.nn.layers.workspace import WHOLE
from psmpi.nn.losses import Loss
from psmpi.nn.metric import ScorePart
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.objective import Objective
from psmpi.nn.tiles import TiledObjective, is_tiled
from psmpi.training.class_sums import ClassSums
from psmpi.training.context import Context
from psmpi.training.evaluator import evaluate, evaluate_by_tiles
from psmpi.training.remembered import Remembered
from psmpi.training.spans import check_tokens, make_span, recorder
from psmpi.training.trunk import Trunk


def by_tiles(config: Config, network: Network, loss: Loss, place: Worker, batch: int, ops: NumpyOps) -> bool:
    """Whether a worker computes scores and losses of minibatches of up to `batch` by tiles of classes."""
    o = config.objective
    if place.elements is not None or o.psl_weights != "none" or o.class_weights:
        return False
    if ops.on_device:
        return has_device_tiles(network, len(place.classes), batch, loss, ops)
    return is_tiled(network, len(place.classes), batch, ops, loss.task)


class ElementWorker:
    """One column of one replica row: it computes with w_part and fills g_part, both (part.size,).

    With the score partition the row exchanges a few numbers a sample, the sums over classes that the loss needs
    (`ClassSums`). With the pair partition the loss uses this worker's classes alone, and only samples of these classes
    are read. tests: whether this worker tests samples. trunk: number of first layers that the row computes on slices
    (`Trunk`). samples: ids of the training samples that this rank may need, all by default; others are not read. tiles:
    whether scores of many classes are computed tile by tile.
    """

    def __init__(
        self,
        context: Context,
        place: Worker,
        roles: Roles,
        row: Group,
        w_part: np.ndarray,
        g_part: np.ndarray,
        tests: bool = True,
        trunk: int = 0,
        samples: np.ndarray | None = None,
        tiles: bool = True,
    ):
        network, dataset, ops = context.network, context.dataset, context.ops
        self.place, self.rows, self.dataset = place, roles.rows, dataset
        self.dtype, self.ops, self.g_part = context.dtype, ops, g_part
        share = -(-context.config.data.batch_size // roles.rows)
        batches = network.evaluation_batches(dataset.test.n) if tests else []
        most = max(share, *(at.stop - at.start for at in batches), 1)
        peers = [w for w in roles.workers if w is not None and w.row == place.row]
        single = len(peers) == 1
        self.trunk: Trunk | None = None
        layers = None
        if trunk and not single:
            self.trunk = Trunk(context, row, trunk, place.classes, w_part, g_part)
            layers = trunk, len(network.layers)
        self.loss, self.metric = context.loss(), context.metric()
        tiled = tiles and by_tiles(context.config, network, self.loss, place, most, ops)
        self.model = Model(
            network, context.layout, w_part, g_part, ops, place.classes, layers=layers, beside=layers is not None,
            tiled=tiled,
        )  # fmt: skip
        self.classes = np.array(place.classes)
        # This worker's number of each class, -1 of others.
        self.numbers = np.full(dataset.outputs, -1)
        self.numbers[self.classes] = np.arange(len(self.classes))
        self.sums: ClassSums | None = None
        if place.elements is None and not single:
            counts = [len(w.classes) for w in peers]
            # Sums are made where the loss is computed.
            host = self.loss.fused(ops) is None
            group = context.group(row.ranks, bridge=Bridge()) if host else row
            self.sums = ClassSums(group, self.loss, counts, self.dtype, NumpyOps() if host else ops)
        objective = DeviceTiledObjective if ops.on_device else TiledObjective
        self.objective = (objective if tiled else Objective)(self.loss, self.model, self.sums)
        # The samples' losses at their last visits, set by the method if the steps are divided by them.
        self.remembered: Remembered | None = None
        # Ranks whose losses need no sums over classes detect a loss that is not finite without the others.
        context.numbers.watch(self.objective, row if self.objective.others is not None else None, self.own_gradient)
        record = recorder(network, ops)
        self.forward_pass, self.backward_pass = record(self._forward), record(self._backward)
        self.derive_pass = self.objective.record(self._derive)

        samples = np.arange(dataset.train.n) if samples is None else samples
        self.pairs: np.ndarray | None = None
        self.mask: np.ndarray | None = None
        if place.elements is not None:
            self.pairs = np.zeros((len(place.classes),) * 2, bool)
            for i, j in place.elements:
                self.pairs[self.numbers[i], self.numbers[j]] = self.pairs[self.numbers[j], self.numbers[i]] = True
            samples = samples[self.numbers[dataset.train.labels[samples]] >= 0]
            # On the device, if the loss is computed there.
            self.mask = ops.put(self.pairs)
        self.train = Resident(dataset.train, samples, self.dtype, ops)
        check_tokens(network, self.train, "training")
        # Whole minibatches, the same on any number of rows.
        self.test_batches = [batches[k] for k in np.array_split(np.arange(len(batches)), self.rows)[place.row]]
        # Pairs give a class to several workers: in a test the first one of the row counts its score.
        first = np.full(dataset.outputs, len(peers))
        for w in reversed(peers):
            first[np.array(w.classes, int)] = w.column
        self.tested = np.flatnonzero(first[self.classes] == place.column)
        self.part: ScorePart | None = None
        if not single:
            classes = self.classes[self.tested]
            numbers = np.arange(dataset.outputs) - self.classes[0]
            if place.elements is not None:
                numbers.fill(-1)
                numbers[classes] = np.arange(len(classes))
            counts = [int(np.count_nonzero(first == w.column)) for w in peers]
            others = context.group(row.ranks, bridge=Bridge())
            sums = ClassSums(others, self.metric.loss, counts, self.dtype, NumpyOps())
            self.part = ScorePart(classes, numbers, sums, place.column == 0)
        columns = np.concatenate(
            [np.arange(0), *(self._fetched(np.arange(at.start, at.stop)) for at in self.test_batches)]
        )
        self.test_ids = columns if self.tested.size else columns[:0]
        self.test_samples = Resident(dataset.test, self.test_ids, self.dtype, ops)
        check_tokens(network, self.test_samples, "test")
        # Samples and factor of the last minibatch.
        self.last, self.capacity, self.x = 0, 0, np.empty(0)
        self.span = WHOLE
        if self.pairs is not None:
            # Mean plus four standard deviations of the number of samples of its classes in a minibatch.
            mean = share * len(samples) / dataset.train.n
            share = min(share, len(samples), ceil(mean + 4 * sqrt(mean)))
        self.reserve(max(1, share, *(at.stop - at.start for at in self.test_batches)))

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        if batch <= self.capacity:
            return
        self.capacity = batch
        self.features = int(np.prod(self.dataset.shape))
        self.model.reserve(batch)
        if self.trunk is not None:
            self.trunk.reserve(batch)
        else:
            self.x = self.ops.empty(self.features * batch, self.dtype)
        self.objective.reserve(len(self.classes), max(1, self.model.steps) * batch)
        if self.sums is not None:
            self.sums.reserve(batch)

    def memory(self) -> dict[str, int]:
        """Bytes that the worker holds besides weights and gradients, by purpose."""
        sums = self.sums.nbytes if self.sums is not None else 0
        below, more, tail = self.x.nbytes, 0, self.objective.tail
        if self.trunk is not None:
            below, more = self.trunk.activation_bytes, self.trunk.buffer_bytes
        return {
            "activations": below + self.model.activation_bytes + (tail.activation_bytes if tail is not None else 0),
            "buffers": self.model.buffer_bytes + self.objective.nbytes + sums + more,
            "samples": self.train.nbytes + self.test_samples.nbytes,
        }

    def element_losses(self, batch: Batch, own: Batch | None = None) -> float:
        """Fill g_part with this worker's share of the gradient of the mean loss over a batch.

        The share is that of its row's slice of the batch, or of `own`, and of its own elements, with the factor 1/b of
        the whole batch. Returns a share of the loss; the shares of all workers add up to the loss of the batch.
        """
        scale = 1 / self.dataset.train.count(batch.ids)
        if own is None:
            own = batch.share(self.place.row, self.rows)
        # The constant term of a sample's loss belongs to no pair: the first worker of the row counts it.
        constant = 0.0
        if self.pairs is not None:
            if self.place.column == 0:
                constant = scale * self.loss.constants(self._divisors(own.ids), len(own))
            own = Batch(own.ids[self.numbers[self.dataset.train.labels[own.ids]] >= 0])
        self.last = b = len(own)
        if b == 0:
            self.g_part.fill(0)
            return constant
        self.reserve(b)
        self._bring(self.train, own.ids)
        self.objective.ids = own.ids
        targets = self.train.targets(own.ids)
        self.objective.bring(self._own_targets(targets), self.loss.sample_weights(targets))
        self.loss.divisors = self._divisors(own.ids)
        self.tape = self.forward_pass(b)
        try:
            if self.objective.others is None:
                self.derive_pass(b, scale)
            else:
                self._losses(b, scale)
                self.backward_pass(b)
        except FloatingPointError:
            if self.trunk is not None:
                # Other ranks of the row, whose elements are finite, wait for this rank's share.
                self.trunk.dx(b).fill(0)
                self.trunk.backward(b)
                self.trunk.await_error_of_others()
            raise
        if self.trunk is not None:
            self.trunk.backward(b)
        if self.remembered is not None:
            self.remembered.note(own.ids, self.loss.rests)
        return self.objective.value() + constant

    def _fetched(self, ids: np.ndarray) -> np.ndarray:
        """The ids of a minibatch whose samples this rank reads itself."""
        return ids if self.trunk is None else ids[self.trunk.share(len(ids))]

    def _bring(self, samples: Resident, ids: np.ndarray) -> np.ndarray:
        """Write the model's inputs (inputs, b) of a minibatch to the buffer of the passes; returns them."""
        if self.trunk is None:
            batch = samples.batch(ids, self.x)
            self.span = make_span(batch.lengths, self.ops)
            inputs: np.ndarray = batch.inputs
            return inputs
        self.span = make_span(samples.lengths(ids), self.ops)
        features = self.trunk.forward(samples, ids)
        self.objective.trunk = self.trunk.model, self.trunk.slice
        return features

    def _divisors(self, ids: np.ndarray) -> np.ndarray | None:
        return None if self.remembered is None else self.remembered.values[ids]

    def _own_targets(self, targets: np.ndarray) -> np.ndarray:
        """Labels counted from this worker's first class (of pairs: by its own numbers), or values of its outputs."""
        if self.dataset.task != "classes":
            values: np.ndarray = targets[self.classes]
            return values
        if targets.ndim == 2:
            # Labels of steps, -1 for steps that do not count; all ranks have all classes.
            return targets
        own: np.ndarray = targets - self.classes[0] if self.pairs is None else self.numbers[targets]
        return own

    def own_gradient(self) -> np.ndarray:
        """Compute this rank's share of the gradient of the last minibatch again, without messages; returns g_part.

        Sums over ranks may have overwritten g_part. With a trunk on slices, gradients of other ranks' elements are left
        out.
        """
        finished, self.model.finished = self.model.finished, None
        if self.last:
            # Backward uses up what some layers keep of a pass.
            self.tape = self._forward(self.last)
            self.objective.again(self.tape, self._dx(self.last))
            if self.trunk is not None:
                self.trunk.backward(self.last, own_only=True)
        self.model.finished = finished
        return self.g_part

    def _forward(self, b: int) -> Tape:
        """Forward pass of b samples to the scores of the model's classes."""
        if self.trunk is not None:
            return self.model.forward(self.trunk.all(b), None, self.span)
        return self.model.forward(self.x[: self.features * b].reshape(self.features, b), None, self.span)

    def _dx(self, b: int) -> np.ndarray | None:
        """Buffer of the gradient of the inputs, which a trunk on slices needs; None without."""
        return None if self.trunk is None else self.trunk.dx(b).reshape(*self.model.in_shape, b)

    def _losses(self, b: int, scale: float) -> None:
        """Compute the derivatives of the scores."""
        self.objective.losses(self.tape.scores, self.objective.targets(b), scale, self.mask)

    def _backward(self, b: int) -> None:
        """Fill g_part from the derivatives of b samples."""
        self.objective.backward(self.tape, self._dx(b))

    def _derive(self, b: int, scale: float) -> None:
        """Fill g_part from the scores of b samples."""
        self._losses(b, scale)
        self._backward(b)

    def messages(self, batch: int) -> list[Message]:
        """The messages of its row in a step on `batch` samples of all rows."""
        share = len(Batch(np.arange(batch)).share(self.place.row, self.rows))
        if not share:
            return []
        messages = self.trunk.messages(share) if self.trunk is not None else []
        return messages + (self.sums.messages(Step(share)) if self.sums is not None else [])

    def test(self) -> np.ndarray:
        """This rank's share of the metric's sums over the row's slice of the test split."""
        tail = self.objective.tail
        if tail is not None:
            return evaluate_by_tiles(
                self.metric, self.test_batches, tail, self._test_features, self.test_targets, self.classes, self.part
            )
        return evaluate(self.metric, self.test_batches, self.test_scores, self.test_targets, self.ops, self.part)

    def _test_features(self, ids: np.ndarray) -> np.ndarray:
        """Features (inputs, b) of test samples, from which scores are computed tile by tile."""
        features: np.ndarray = self.model.forward(self._bring(self.test_samples, ids), None, self.span).scores
        return features

    def test_targets(self, ids: np.ndarray) -> np.ndarray:
        """Labels of test samples, or values of the outputs tested here."""
        targets: np.ndarray = self.dataset.test.targets[ids].T
        return targets if self.dataset.task == "classes" else targets[self.classes[self.tested]]

    def test_scores(self, ids: np.ndarray) -> np.ndarray:
        """The scores (classes tested here, b) of test samples."""
        if not self.tested.size:
            return np.empty((0, len(ids)), self.dtype)
        scores: np.ndarray = self.model.forward(self._bring(self.test_samples, ids), None, self.span).scores
        if len(self.tested) == len(scores):
            return scores
        return self.ops.put(self.ops.host(scores)[self.tested])
