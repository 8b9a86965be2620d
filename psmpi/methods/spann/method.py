"""Spatial domain decomposition: ranks have domains of every layer, or parts of a sparse network, and exchange halos.

Long and Gupta, "Scalable massively parallel artificial neural networks", J. Aerospace Computing, Information, and
Communication 5(1) (2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.comm.bridge import Bridge
from psmpi.comm.transfers import Message, Step, Sum
from psmpi.data import Batch, Resident
from psmpi.methods.spann.local import Transfers, largest, local_network
from psmpi.methods.spann.need import spann_needed
from psmpi.methods.spann.plan import chains
from psmpi.methods.spann.settings import Settings, check_spann, partitioned, plan_of, spann_notes
from psmpi.nn.layers.chain import Tape
from psmpi.nn.layers.sparse import Sparse
from psmpi.nn.model import Model
from psmpi.nn.objective import GRADIENT_LIMIT
from psmpi.training.context import Context
from psmpi.training.dealt_scores import DealtScores
from psmpi.training.descent import Descent
from psmpi.training.method import Exactness, Method


def shared_owners(context: Context) -> dict[str, np.ndarray]:
    """Broadcast the owners that `partitioned` finds on rank 0; return them on all ranks."""
    layers = [layer for chain in chains(context.network) for layer in chain]
    if context.size == 1 or not layers:
        return {}
    sizes = [layer.units for layer in layers]
    # Ranks plus 1, as the broadcast of a rehearsed start brings zeros.
    shared = np.zeros(sum(sizes))
    if context.rank == 0:
        _fill(shared, layers, context)
    context.uncounted().bcast(shared)
    if not shared.all():
        _fill(shared, layers, context)
    pieces = np.split(shared.astype(np.int32) - 1, np.cumsum(sizes)[:-1])
    return {layer.name: piece for layer, piece in zip(layers, pieces, strict=True)}


def _fill(shared: np.ndarray, layers: Sequence[Sparse], context: Context) -> None:
    owners = partitioned(context.size, context.network, context.config)
    shared[:] = np.concatenate([owners[layer.name] for layer in layers])
    shared += 1


class SpatialDomains(Method):
    """Spatial domains on one rank: its units of each layer, all of their weights, and all samples of a minibatch.

    w: the weights of the rank's units, which no other rank has; g: their gradient, with --in-place that of one layer at
    a time.
    """

    name = "spann"
    summary = "domains of layers on ranks, halos between them"
    settings = (Settings,)
    skips = weighs_classes = True
    usual_options = ("--model", "slabs", "--loss", "nll")
    exactness = Exactness(wide=("--model", "slabs", "--widths", "640", "640"))

    def __init__(self, context: Context):
        network, ops, dataset = context.network, context.ops, context.dataset
        self.plan = plan = plan_of(context.size, network, context.config, shared_owners(context))
        super().__init__(context, plan.ownership(context.layout))
        shard = self.shards[self.rank]
        self.w = ops.zeros(shard.size, self.dtype)
        context.put_weights(shard, self.w)
        self.world, host = context.group(), context.group(bridge=Bridge())
        self.transfers = Transfers(self.world, self.dtype, ops)
        self.local = local_network(plan, self.rank, self.transfers)
        own = self.local.layout()
        self.in_place = context.settings(Settings).in_place
        # After the used weights, rank 0 has those that no score depends on, whose gradient is 0.
        used, self.rest = slice(own.size), slice(own.size, shard.size)
        self.g = ops.zeros(largest(self.local) if self.in_place else shard.size, self.dtype)
        self.model = Model(
            self.local, own, self.w[used], self.g[used], ops, across=host.allreduce if context.size > 1 else None,
            apart=self.in_place,
        )  # fmt: skip
        # With --in-place: the slice of each part's weights, and the learning rate of the step.
        self.slices, self.lr = self.model.slices, 0.0
        if self.in_place:
            self.model.finished = self._step_layer
        self.scores = DealtScores(context, self.model, self.world, host, plan.scores, self.world)
        self.descent = Descent(context, shard, allsum=self.world.agree, world=self.world)
        self.optimizer: Any = self.descent.optimizer
        self._declare()
        inputs = plan.inputs[self.rank]
        features = None if len(inputs) == dataset.train.features else inputs
        self.train, self.tests = (
            Resident(split, np.arange(split.n), self.dtype, ops, features) for split in (dataset.train, dataset.test)
        )
        self.account.hold("samples", self.train, self.tests)
        self.batches = network.evaluation_batches(dataset.test.n)
        most = max(context.config.data.batch_size, *(at.stop - at.start for at in self.batches))
        self.x = ops.empty(len(inputs) * most, self.dtype)
        self.model.reserve(most)
        for halo in self.transfers.halos:
            halo.reserve(most)
        self.scores.reserve(most)

    check, needed, notes = staticmethod(check_spann), staticmethod(spann_needed), staticmethod(spann_notes)

    def _declare(self) -> None:
        """Declare the state, and account for memory."""
        self.state.vector("weights", self.w)
        self.state.optimizer(self.descent.optimizer)
        self.account.hold("gradients", self.g)
        self.account.ask("activations", lambda: (self.x, self.model.activation_bytes))
        patterns = [layer.pattern for layer in self.local.layers if isinstance(layer, Sparse)]
        self.account.ask("buffers", lambda: (self.model.buffer_bytes, *self.transfers.halos, *patterns))
        self.scores.account(self.account)

    def step(self, batch: Batch, lr: float) -> None:
        if self.in_place:
            self.lr = lr
            self.optimizer.begin()
            self._step_rest()
        else:
            self.g[self.rest].fill(0)
        loss = self._gradient(batch.ids, 1 / self.dataset.train.count(batch.ids))
        if self.descent.sound(loss, self.g):
            self.loss_sum += loss * len(batch)
            if not self.in_place:
                self.descent.step(self.w, self.g, lr)

    def _step_rest(self) -> None:
        """Step the weights that no score depends on, piece by piece: weight decay may change them."""
        for start in range(self.rest.start, self.rest.stop, self.g.size):
            at = slice(start, min(start + self.g.size, self.rest.stop))
            g = self.g[: at.stop - at.start]
            g.fill(0)
            self.optimizer.step_piece(self.w, g, self.lr, at)

    def _step_layer(self, number: int) -> None:
        """Step the weights of part `number`, whose gradient is at the start of g."""
        if number in self.slices:
            at = self.slices[number]
            g = self.g[: at.stop - at.start]
            self._unscale(g)
            self.optimizer.step_piece(self.w, g, self.lr, at)

    def _unscale(self, g: np.ndarray) -> None:
        self.ops.unscale(g, self.scores.objective.report.array, GRADIENT_LIMIT[self.dtype])

    def _gradient(self, ids: np.ndarray, scale: float) -> float:
        """Fill g with the gradient of the minibatch's loss; return this rank's share of the loss."""
        tape = self._forward(self.train, ids)
        self.model.backward(tape, self.scores.derivatives(tape, self.train, ids, scale))
        if not self.in_place:
            self._unscale(self.g)
        return self.scores.value()

    def _forward(self, samples: Resident, ids: np.ndarray) -> Tape:
        """Forward pass of a minibatch."""
        x = self.x[: self.local.in_shape[0] * len(ids)].reshape(-1, len(ids))
        samples.fetch(ids, x)
        return self.model.forward(x)

    def test(self) -> dict[str, float]:
        totals = self.scores.metric.zeros()
        with self.counter.paused():
            for at in self.batches:
                ids = np.arange(at.start, at.stop)
                scores = self.ops.host(self._forward(self.tests, ids).scores)
                self.scores.add_sums(totals, scores, self.tests, ids)
        return self.scores.metric.scores(self.world.agree(totals))

    def messages(self, step: int, batch: int) -> list[Message] | None:
        """Return the messages of all ranks in their exchanges."""
        messages: list[Message] = []
        for halo in self.transfers.halos:
            messages += halo.messages(Step(batch)) + halo.messages(Step(batch), back=True)
        for total in self.transfers.totals:
            messages += total.messages(Step(batch), back=True)
        wide = np.dtype(np.float64)
        for layer in self.local.layers if self.world.size > 1 else ():
            for numbers in layer.unit_sums:
                messages += Sum(self.world, numbers * batch, wide).messages(Step(), back=True)
        return messages + self.scores.messages(batch)

    def work(self) -> tuple[str, str, int]:
        scores = self.plan.scores
        if scores is None:
            return f"part {self.rank} of {self.world.size}", "all", self.w.size
        first = sum(scores[: self.rank])
        return f"part {self.rank} of {self.world.size}", f"{first}-{first + scores[self.rank] - 1}", self.w.size

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.scores.loss.clipped}
