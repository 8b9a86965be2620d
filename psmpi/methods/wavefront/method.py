"""Recurrent layers as a wavefront: each rank has some layers, and hands sequences on chunk by chunk.

Sutskever, Vinyals, Le, "Sequence to sequence learning with neural networks" (2014), had a layer of an LSTM on each of
four GPUs; Appleyard, Kocisky, Blunsom, "Optimizing performance of recurrent neural networks on GPUs" (2016), go over
layers and steps in diagonals. The gradient is exact over the whole sequence: back-propagation is not truncated.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from psmpi.backend.reference import exponent_of
from psmpi.comm.transfers import Boundary, Message, Step
from psmpi.data import Batch, Resident
from psmpi.data.split import batch_targets
from psmpi.errors import UserError
from psmpi.layout import Ownership
from psmpi.methods.wavefront.lane import Lane
from psmpi.methods.wavefront.need import wavefront_needed
from psmpi.methods.wavefront.pipeline import Pipeline
from psmpi.methods.wavefront.settings import Settings, check_wavefront, deal, wavefront_notes
from psmpi.nn.layers.chain import Tape
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.objective import GRADIENT_LIMIT, Objective
from psmpi.nn.sequences import chunks
from psmpi.training.context import Context
from psmpi.training.descent import Descent
from psmpi.training.method import Exactness, Method
from psmpi.training.spans import check_tokens, chunk_spans

OPTIONS = ("--dataset", "digits:rows", "--model", "lstm", "--widths", "12", "12", "12", "12")
WIDE = ("--dataset", "digits:rows", "--model", "lstm", "--widths", "120", "120", "120", "120")


class Wavefront(Method):
    """Wavefront on one rank: its layers as one lane or several; the last rank also has the head, see `Lanes`.

    A minibatch goes up through all ranks chunk by chunk. The last rank computes the loss, and gradients come down from
    the last chunk to the first. Each rank steps its own weights.
    """

    name = "wavefront"
    summary = "recurrent layers on ranks, sequences in chunks"
    settings = (Settings,)
    skips = True
    sequences = "steps"
    usual_options = ("--dataset", "digits:rows", "--model", "lstm", "--widths", "64", "64", "64", "64")
    exactness = Exactness(options=OPTIONS, wide=WIDE)

    def __init__(self, context: Context):
        network, layout, dataset, ops = context.network, context.layout, context.dataset, context.ops
        s, size = context.settings(Settings), context.size
        if ops.on_device and s.skew > 1:
            raise UserError(f"--skew {s.skew} is for threads of the host: leave it out, or use --backend compiled")
        dealt = deal(network, size, s.skew, s.chunk_steps)
        super().__init__(context, Ownership(tuple(network.runs(layout, *dealt.layers(k)) for k in range(size))))
        self.world, self.batch = context.group(), context.config.data.batch_size
        self.first, self.last = self.rank == 0, self.rank == size - 1
        self.layers = dealt.layers(self.rank)
        self.edges = chunks(network.in_shape[1], dealt.steps)
        shard = self.shards[self.rank]
        self.w, self.g = (ops.zeros(shard.size, self.dtype) for _ in range(2))
        context.put_weights(shard, self.w)
        # The network over the steps of one chunk.
        cut = network.with_steps(dealt.steps)
        lanes = [self._lane(cut, layers) for layers in dealt.ranks[self.rank]]
        self.head: Model | None = None
        if self.last and dealt.head is not None:
            self.head = Model(cut, layout, *self._views(dealt.head), ops, layers=dealt.head)
        # Boundaries below each rank but the first, one for each chunk.
        units = [network.layers[dealt.layers(k)[0]].in_shape[0] for k in range(size)]
        self.cuts = [
            [Boundary(self.world, k - 1, k, units[k] * (b - a), self.dtype) for a, b in self.edges]
            for k in range(1, size)
        ]
        below, above = [None, *self.cuts, None][self.rank : self.rank + 2]
        self.pipeline = Pipeline(lanes, self.edges, below, above, self.dtype, ops)
        self.descent = Descent(context, shard, allsum=self.world.agree)
        self.state.vector("weights", self.w)
        self.state.optimizer(self.descent.optimizer)
        self.loss, self.metric = context.loss(), context.metric()
        self.objective = Objective(self.loss, self.head or lanes[-1].model)
        if self.head is not None:
            context.numbers.watch(self.objective)
        train = np.arange(dataset.train.n if self.first else 0)
        tests = np.arange(dataset.test.n if self.first else 0)
        self.train = Resident(dataset.train, train, self.dtype, ops)
        self.tests = Resident(dataset.test, tests, self.dtype, ops)
        check_tokens(network, self.train, "training")
        check_tokens(network, self.tests, "test")
        self.batches = network.evaluation_batches(dataset.test.n)
        # Report of all chunks together, for `_unscale`: the power of two that `_level` takes out of their derivatives.
        self.report = ops.zeros(4, np.dtype(np.float64))
        self.capacity = 0
        self.reserve(max(self.batch, *(at.stop - at.start for at in self.batches)))
        self._count()

    check, needed = staticmethod(check_wavefront), staticmethod(wavefront_needed)
    notes = staticmethod(wavefront_notes)

    def _views(self, layers: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return views of this rank's weights and gradient of some layers."""
        at = self.network.runs(self.layout, *layers).inside(self.shards[self.rank])
        assert at is not None
        return self.w[at], self.g[at]

    def _lane(self, network: Network, layers: tuple[int, int]) -> Lane:
        return Lane(network, self.layout, layers, *self._views(layers), len(self.edges), self.ops.beside())

    def _count(self) -> None:
        """Add the rank's memory besides weights to the account."""
        self.account.hold("gradients", self.g)
        self.account.hold("samples", self.train, self.tests)
        self.account.ask("activations", lambda: (self.x, *self.pipeline.inputs, *self.pipeline.lanes))
        self.account.ask("buffers", lambda: (self.pipeline, *self.scores))
        if self.last:
            self.account.hold("buffers", self.objective)
        head = self.head
        if head is not None:
            self.account.ask("activations", lambda: (head.activation_bytes,))
            self.account.ask("buffers", lambda: (head.buffer_bytes,))

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        if batch <= self.capacity:
            return
        self.capacity = batch
        self.pipeline.reserve(batch)
        self.x = self.ops.empty(prod(self.network.in_shape) * batch * self.first, self.dtype)
        self.scores: list[np.ndarray] = []
        if not self.last:
            return
        most = max(z - a for a, z in self.edges) * batch
        if self.head is not None:
            self.head.reserve(batch)
            self.objective.reserve(self.network.classes, batch)
            # The gradient of the last chunk's outputs; for the other chunks it is 0.
            self.scores = [self.ops.empty(self.pipeline.units * most, self.dtype)]
        else:
            self.objective.reserve(self.network.classes, most)
            sizes = [self.network.classes * (z - a) * batch for a, z in self.edges]
            self.scores = [self.ops.empty(size, self.dtype) for size in sizes]

    def step(self, batch: Batch, lr: float) -> None:
        b = len(batch)
        self.reserve(b)
        scale = 1 / self.dataset.train.count(batch.ids)
        targets = batch_targets(self.dataset.train.targets, batch.ids)
        exponents: list[float] = []
        loss = 0.0

        def derive(c: int, tape: Tape) -> None:
            """Compute the loss of a chunk's scores, and its derivatives."""
            nonlocal loss
            a, z = self.edges[c]
            self.objective.bring(np.ascontiguousarray(targets[..., a:z, :]))
            self.objective.losses(tape.scores, self.objective.targets(b), scale)
            dy = self.scores[c][: tape.scores.size].reshape(tape.scores.shape)
            dy[...] = self.objective.derivatives(tape.scores).reshape(dy.shape)
            loss += self.objective.value()
            exponents.append(float(self.objective.report.host[3]))

        self.objective.ids = batch.ids
        outputs = self._forward(self.train, batch.ids, derive if self.last and self.head is None else None)
        powers = self.last and self.head is None
        if self.head is not None:
            loss = self._derive_head(outputs, targets, scale)
        elif self.last:
            self._level(exponents)
        self.pipeline.backward(b, self._derivatives, self._unscale if powers else None)
        if powers:
            self._unscale(self.g)
        if self.descent.sound(loss, self.g):
            self.loss_sum += loss * b
            self.descent.step(self.w, self.g, lr)

    def _derive_head(self, outputs: np.ndarray, targets: np.ndarray, scale: float) -> float:
        """Return the loss of the head's scores; fill the gradients of the head and of the last chunk's outputs.

        outputs: (units, steps, b), of the last chunk.
        """
        assert self.head is not None
        tape = self.head.forward(outputs)
        self.objective.bring(np.ascontiguousarray(targets))
        dx = self.scores[0][: outputs.size].reshape(outputs.shape)
        self.objective.derive(tape, tape.scores, self.objective.targets(outputs.shape[-1]), scale, dx=dx)
        return self.objective.value()

    def _level(self, peaks: list[float]) -> None:
        """Take the same power of two out of the derivatives of all chunks; peaks: the largest of each."""
        powers = [exponent_of(peak) for peak in peaks]
        for power, dy in zip(powers, self.scores, strict=True):
            if power != max(powers):
                self.ops.scale(dy, 2.0 ** (power - max(powers)))
        self.report[3] = max(peaks)

    def _unscale(self, values: np.ndarray) -> None:
        """Multiply gradients by the power of two that `_level` has taken out of the derivatives."""
        self.ops.unscale(values, self.report, GRADIENT_LIMIT[self.dtype])

    def _derivatives(self, c: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return the gradient of the topmost outputs of chunk c, on the last rank; the caller may overwrite it."""
        dy = self.scores[c if self.head is None else 0][: prod(shape)].reshape(shape)
        if self.head is not None and c < len(self.edges) - 1:
            dy.fill(0)
        return dy

    def _forward(
        self, samples: Resident, ids: np.ndarray, scored: Callable[[int, Tape], None] | None = None
    ) -> np.ndarray:
        """Return the topmost layer's outputs for the last chunk of these samples; scored: see `Pipeline.forward`."""
        steps, b = None, len(ids)
        if self.first:
            whole = self.x[: prod(self.network.in_shape) * b].reshape(-1, b)
            samples.fetch(ids, whole)
            steps = whole.reshape(*self.network.in_shape, b)
        return self.pipeline.forward(b, steps, chunk_spans(samples, ids, self.edges, self.ops), scored)

    def test(self) -> dict[str, float]:
        totals = self.metric.zeros()
        with self.counter.paused():
            for at in self.batches:
                totals += self._test(np.arange(at.start, at.stop))
        return self.metric.scores(self.world.agree(totals))

    def _test(self, ids: np.ndarray) -> np.ndarray:
        """Return the metric's sums of test samples on the last rank, zeros on the others."""
        totals, targets = self.metric.zeros(), batch_targets(self.dataset.test.targets, ids)

        def score(c: int, tape: Tape) -> None:
            nonlocal totals
            a, z = self.edges[c]
            of_chunk = np.ascontiguousarray(targets[..., a:z, :])
            totals = totals + self.metric.sums(self.ops.host(tape.scores), of_chunk)

        outputs = self._forward(self.tests, ids, score if self.last and self.head is None else None)
        if self.head is not None:
            totals = self.metric.sums(self.ops.host(self.head.forward(outputs).scores), targets)
        return totals

    def messages(self, step: int, batch: int) -> list[Message]:
        every = [one for cut in self.cuts for one in cut]
        up = [message for one in every for message in one.messages(Step(batch))]
        return up + [message for one in every for message in one.messages(Step(batch), back=True)]

    def work(self) -> tuple[str, str, int]:
        names = [layer.name for layer in self.network.layers[slice(*self.layers)] if layer.linear or layer.inner]
        return "layers", names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", self.w.size

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.loss.clipped}
