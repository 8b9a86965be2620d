"""A worker that computes with a part of a network: subnetwork, samples, element losses and their gradient."""

from __future__ import annotations

from math import ceil, sqrt

import numpy as np

from psmpi.comm.group import Group
from psmpi.comm.transfers import Message, RowExchange, Step, Sum
from psmpi.data import Batch, Resident
from psmpi.layout import Roles, Worker
from psmpi.nn.layers.chain import Tape
from psmpi.nn.model import Model
from psmpi.nn.objective import Objective
from psmpi.training.context import Context
from psmpi.training.evaluator import evaluate


class ElementWorker:
    """Computes with w_part and fills g_part, both (part.size,), for one column of one replica row.

    With the score partition the row exchanges scores and the loss sees all classes; with the pair partition the loss
    sees only this worker's classes, and only samples of these are read. Without `tests` it has no samples to test.
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
    ):
        network, dataset, ops = context.network, context.dataset, context.ops
        self.place, self.rows, self.dataset = place, roles.rows, dataset
        self.dtype, self.ops, self.g_part = context.dtype, ops, g_part
        self.model = Model(network, context.layout, w_part, g_part, ops, place.classes)
        self.loss, self.metric = context.loss(), context.metric()
        self.objective = Objective(self.loss, self.model)
        # Of pairs a worker's loss is that of its own scores.
        context.numbers.watch(self.objective, row if place.elements is None else None, self.own_gradient)
        self.forward_pass, self.backward_pass = ops.record(self._forward), self.objective.record(self._backward)
        peers = [w for w in roles.workers if w is not None and w.row == place.row]
        # Of training and tests with the score partition; of tests with the pair partition.
        self.score_exchange = RowExchange(row, [len(w.classes) for w in peers], self.dtype)
        self.score_sum = Sum(row, dataset.outputs, self.dtype, per_sample=True)
        self.own = slice(place.classes[0], place.classes[-1] + 1)
        # In an evaluation, a class's scores come from the first worker of the row that computes them.
        first = {c: w.column for w in reversed(peers) for c in w.classes}
        self.reports = [(k, c) for k, c in enumerate(place.classes) if first[c] == place.column]

        samples = np.arange(dataset.train.n)
        self.pairs: np.ndarray | None = None
        self.mask: np.ndarray | None = None
        if place.elements is not None:
            # The loss of a pair worker knows its own classes only, numbered from 0.
            self.number = np.full(dataset.outputs, -1)
            self.number[list(place.classes)] = np.arange(len(place.classes))
            self.pairs = np.zeros((len(place.classes),) * 2, bool)
            for i, j in place.elements:
                self.pairs[self.number[i], self.number[j]] = self.pairs[self.number[j], self.number[i]] = True
            samples = samples[self.number[dataset.train.labels] >= 0]
            # Where the loss is computed.
            self.mask = ops.put(self.pairs)
        self.train = Resident(dataset.train, samples, self.dtype, ops)
        # Whole minibatches, the same on any number of rows.
        batches = network.evaluation_batches(dataset.test.n) if tests else []
        self.test_batches = [batches[k] for k in np.array_split(np.arange(len(batches)), self.rows)[place.row]]
        mine = np.concatenate([np.arange(0), *(np.arange(at.start, at.stop) for at in self.test_batches)])
        self.test_ids = mine if self.pairs is None or self.reports else mine[:0]
        self.test_samples = Resident(dataset.test, self.test_ids, self.dtype, ops)
        # Samples and factor of the last minibatch.
        self.last, self.capacity = (0, 1.0), 0
        share = -(-context.config.data.batch_size // self.rows)
        if self.pairs is not None:
            # As many samples of its classes as hardly ever meet in a minibatch.
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
        self.x = self.ops.empty(self.features * batch, self.dtype)
        self.scores = self.ops.empty(self.dataset.outputs * batch, self.dtype)
        self.objective.reserve(self.dataset.outputs, batch)

    def memory(self) -> dict[str, int]:
        """Bytes of what it holds besides weights and gradients, by what for."""
        own = self.scores.nbytes + self.objective.nbytes
        return {
            "activations": self.x.nbytes + self.model.activation_bytes,
            "buffers": self.model.buffer_bytes + own,
            "samples": self.train.nbytes + self.test_samples.nbytes,
        }

    def element_losses(self, batch: Batch, own: Batch | None = None) -> float:
        """Fill g_part with this worker's share of the gradient of the mean loss over a batch.

        The share is that of its row's slice of the batch, or of `own`, and of its own elements, with the factor 1/b of
        the whole batch. Returns a share of the loss; the shares of all workers add up to the loss of the batch.
        """
        scale = 1 / len(batch)
        if own is None:
            own = batch.share(self.place.row, self.rows)
        # What every sample adds whatever the weights belongs to no pair: the row's first worker counts it.
        constant = scale * len(own) * self.loss.constant if self.pairs is not None and self.place.column == 0 else 0.0
        if self.pairs is not None:
            own = Batch(own.ids[self.number[self.dataset.train.labels[own.ids]] >= 0])
        self.last = b, _ = len(own), scale
        if b == 0:
            self.g_part.fill(0)
            return constant
        self.reserve(b)
        own = self.train.batch(own.ids, self.x)
        assert own.targets is not None
        self.objective.ids = own.ids
        self.objective.bring(own.targets if self.pairs is None else self.number[own.targets])
        self.tape = self.forward_pass(b)
        if self.pairs is None:
            self._share(self.tape.scores)
        self.backward_pass(b, scale)
        loss = self.objective.value()
        # With the score partition every worker of the row has seen the whole loss.
        return loss + constant if self.pairs is not None or self.place.column == 0 else 0.0

    def own_gradient(self) -> np.ndarray:
        """g_part of the last minibatch once more, at the same weights, whatever sums over ranks have made of it."""
        (b, scale), finished, self.model.finished = self.last, self.model.finished, None
        if b:
            self._backward(b, scale)
        self.model.finished = finished
        return self.g_part

    def _forward(self, b: int) -> Tape:
        """The pass that gives the scores of the model's classes."""
        return self.model.forward(self.x[: self.features * b].reshape(self.features, b))

    def _backward(self, b: int, scale: float) -> None:
        """From the scores, the row's or this worker's own, to g_part."""
        if self.pairs is None:
            scores, own = self.scores[: self.dataset.outputs * b].reshape(-1, b), self.own
        else:
            scores, own = self.tape.scores, slice(0, len(self.place.classes))
        self.objective.derive(self.tape, scores, self.objective.targets(b), scale, own, self.mask)

    def _share(self, output: np.ndarray) -> np.ndarray:
        """All classes' scores (classes, b), from each column's own (its classes, b)."""
        b = output.shape[1]
        scores = self.scores[: self.dataset.outputs * b].reshape(-1, b)
        self.score_exchange.forward(output, scores)
        return scores

    def messages(self, batch: int) -> list[Message]:
        """The messages of its row in a step on `batch` samples of all rows."""
        share = len(Batch(np.arange(batch)).share(self.place.row, self.rows))
        return self.score_exchange.messages(Step(share)) if self.pairs is None and share else []

    def test(self) -> np.ndarray:
        """The metric's sums over the row's slice of the test split; 0 but on its first worker."""
        return evaluate(self.metric, self.test_batches, self._test_scores, self.test_samples.targets, self.ops)

    def _test_scores(self, ids: np.ndarray) -> np.ndarray | None:
        """All classes' scores (classes, b) of test samples, on the row's first worker."""
        scores = self.scores[: self.dataset.outputs * len(ids)].reshape(-1, len(ids))
        output = None
        if len(self.test_ids):
            output = self.model.forward(self.test_samples.batch(ids, self.x).inputs).scores
        if self.pairs is None:
            assert output is not None
            scores = self._share(output)
        else:
            scores.fill(0)
            for k, c in self.reports:
                assert output is not None
                scores[c] = output[k]
            self.score_sum.backward(scores, scores)
        return scores if self.place.column == 0 else None
