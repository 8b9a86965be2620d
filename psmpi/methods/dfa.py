"""Direct feedback alignment: ranks hold runs of layers, and all update at once after one broadcast of the output error.

Noekland, "Direct feedback alignment provides learning in deep neural networks" (2016). One step: activations go from
rank to rank, the last one broadcasts the derivative e of the loss with respect to the scores, and every hidden layer
takes B e for the gradient of its output, B fixed and random; no gradient goes from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod, sqrt
from typing import Annotated, ClassVar, Literal

import numpy as np

from psmpi.comm.transfers import Boundary, Message, Spread, Step
from psmpi.config import Config, Least
from psmpi.data import Batch, Dataset, Resident
from psmpi.errors import UserError
from psmpi.layout import Ownership
from psmpi.nn.cut import split_layers
from psmpi.nn.layers.base import VIEW
from psmpi.nn.layers.chain import Tape, leaves
from psmpi.nn.model import Model
from psmpi.nn.network import Network
from psmpi.nn.objective import Objective
from psmpi.registry import WHOLE
from psmpi.training.checks import check_first_order, check_layers, check_slices
from psmpi.training.context import Context, check_optimizer, configured_loss
from psmpi.training.descent import Descent
from psmpi.training.evaluator import evaluate
from psmpi.training.method import Exactness, Method
from psmpi.training.need import Need, added, derivatives_needed, passes_needed, samples_needed, vectors_needed

# Most test samples over which the alignment is measured.
ALIGNED = 256


@dataclass(frozen=True)
class Settings:
    """Direct feedback alignment (dfa)."""

    table: ClassVar[str] = "dfa"
    results: ClassVar[bool] = True

    feedback: Literal["normal", "uniform", "shared"] = "normal"
    """Random feedback matrices, from the error to each hidden layer.

    normal: normal entries
    uniform: uniform entries (Noekland 2016)
    shared: rows of one matrix for all layers (Launay et al.)
    """
    feedback_seed: Annotated[int, Least(0)] = 0
    """Seed of the feedback matrices."""
    feedback_scale: float = 1.0
    """Factor on the feedback matrices. It acts as a learning rate of the hidden layers."""


@dataclass(frozen=True)
class Hidden:
    """A layer with weights and the layers without that follow: steps `first` to `last` of the model, `width` outputs.

    number: among this rank's layers with weights, from 0.
    """

    number: int
    first: int
    last: int
    width: int


def feedback(kind: str, outputs: int, width: int, widest: int, seed: int, number: int) -> np.ndarray:
    """Return B (width, outputs) float64 of a hidden layer, from the seed and the layer's number alone.

    normal: independent N(0, 1) / sqrt(outputs width); uniform: U(-1, 1) / sqrt(width) (Noekland); shared: the first
    rows of one matrix of N(0, 1) / sqrt(outputs widest) for all layers, times sqrt(widest / width) (Launay, Poli and
    Krzakala 2019).
    """
    if kind == "shared":
        drawn = np.random.default_rng([seed, 0]).standard_normal((widest, outputs))
        return drawn[:width] / sqrt(outputs * width)
    rng = np.random.default_rng([seed, 1 + number])
    if kind == "uniform":
        return rng.uniform(-1, 1, (width, outputs)) / sqrt(width)
    return rng.standard_normal((width, outputs)) / sqrt(outputs * width)


class DirectFeedback(Method):
    """Direct feedback alignment on one rank: a run of layers, with their weights and optimizer state."""

    name = "dfa"
    summary = "layers on ranks, direct feedback of the error"
    settings = (Settings,)
    skips = True
    exactness = Exactness(options=("--model", "mlp", "--widths", "20", "20", "20", "20"))

    def __init__(self, context: Context):
        network, layout, dataset = context.network, context.layout, context.dataset
        stages = split_layers(network, context.size)
        super().__init__(context, Ownership(tuple(network.runs(layout, *stage) for stage in stages)))
        ops, options = self.ops, context.settings(Settings)
        self.batch = context.config.data.batch_size
        self.world = context.group()
        self.first, self.last = self.rank == 0, self.rank == context.size - 1
        # A boundary below each rank but the first, and the broadcast of the error.
        units = [int(np.prod(network.layers[first].in_shape)) for first, _ in stages]
        self.cuts = [Boundary(self.world, k - 1, k, units[k], self.dtype) for k in range(1, context.size)]
        self.below, self.above = [None, *self.cuts, None][self.rank : self.rank + 2]
        self.errors = Spread(self.world, network.classes, self.dtype, context.size - 1, per_sample=True)
        shard = self.shards[self.rank]
        self.w, self.g = (ops.zeros(shard.size, self.dtype) for _ in range(2))
        self.model = Model(network, layout, self.w, self.g, ops, layers=stages[self.rank])
        self.descent = Descent(context, shard, allsum=self.world.agree)
        context.put_weights(shard, self.w)
        self.state.vector("weights", self.w)
        self.state.optimizer(self.descent.optimizer)
        self.account.hold("gradients", self.g)
        self.loss, self.metric = context.loss(), context.metric()
        self.objective = Objective(self.loss, self.model)
        self.numbers.watch(self.objective)
        self.forward_pass, self.backward_pass = ops.record(self._compute), ops.record(self._learn)
        self.error_pass = self.objective.record(self._differentiate)
        # Diagnostics must not move the buffers of recorded passes.
        self.diagnostic_ops = ops.separate()
        # Bound on derivatives of the loss, so that their products stay finite.
        self.limit = float(np.finfo(self.dtype).max) ** 0.25
        self.layers = self._layers()
        # Layers with weights below this rank's, and in the whole network.
        self.offset = sum(layer.linear for layer in network.layers[: stages[self.rank][0]])
        self.depth = len(network.linear)
        widest = max(widths(network)[:-1], default=1)
        self.back = [
            ops.put(feedback(
                options.feedback, network.classes, one.width, widest, options.feedback_seed, self.offset + one.number
            ).astype(self.dtype) * self.dtype.type(options.feedback_scale))
            for one in self.hidden
        ]  # fmt: skip
        # Only the first rank reads samples.
        samples = np.arange(dataset.train.n if self.first else 0)
        tests = np.arange(dataset.test.n if self.first else 0)
        self.train = Resident(dataset.train, samples, self.dtype, ops)
        self.tests = Resident(dataset.test, tests, self.dtype, ops)
        self.account.hold("buffers", *self.back)
        self.account.hold("samples", self.train, self.tests)
        self.account.ask("activations", lambda: (self.x, self.model.activation_bytes))
        self.account.ask("buffers", lambda: (self.error, self.signal, self.model.buffer_bytes))
        if self.last:
            self.account.hold("buffers", self.objective)
        self.inputs = int(np.prod(self.model.in_shape))
        self.capacity = 0
        self.batches = network.evaluation_batches(dataset.test.n)
        largest = max(at.stop - at.start for at in self.batches)
        self.reserve(max(self.batch, largest, min(ALIGNED, dataset.test.n)))

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        depth = len(network.linear)
        if size > depth:
            raise UserError(
                f"--method dfa gives each rank at least one layer with weights, and --model {network.name} has {depth} "
                f"of these for {size} ranks: start {depth} ranks or fewer, or use --method {WHOLE}"
            )
        check_slices(network, config.data.batch_size, 1, "ranks")
        check_layers(network, config)
        check_first_order(config, "needs gradients of the loss, which direct feedback does not compute")
        scale = config.of(Settings).feedback_scale
        if not 0 < scale <= 1e6:
            raise UserError(f"--feedback-scale {scale}: expected a number above 0 and up to 1e6")
        configured_loss(config, dataset)
        check_optimizer(config, network.layout(), ())

    @classmethod
    def needed(cls, size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
        layout, dtype, needs = network.layout(), np.dtype(config.model.dtype), []
        tests = [at.stop - at.start for at in network.evaluation_batches(dataset.test.n)]
        batch = max(config.data.batch_size, *tests)
        for stage in split_layers(network, size):
            first, last = stage[0] == 0, stage[1] == len(network.layers)
            shard = network.runs(layout, *stage).size
            linear = [layer for layer in leaves(network.layers[slice(*stage)]) if layer.linear]
            # Columns of `classes` numbers: the error of each sample, and the rows of the feedback matrices.
            numbers = batch + sum(prod(layer.out_shape) for layer in (linear[:-1] if last else linear))
            needs.append(
                added(
                    vectors_needed(config, layout, shard, shard, shard),
                    passes_needed(config, network, batch, layers=stage),
                    {"buffers": dtype.itemsize * network.classes * numbers},
                    derivatives_needed(config, batch * network.classes * last),
                    samples_needed(dataset, dataset.train.n * first, dataset.test.n * first, config.data.batch_size),
                )
            )
        return needs

    @staticmethod
    def warnings(size: int, network: Network, config: Config) -> Iterator[str]:
        if any(len(layer.out_shape) > 1 for layer in network.linear):
            yield "convolutions learn poorly by direct feedback: their weights are shared, and cannot align"
        narrow = [width for width in widths(network)[:-1] if width < network.classes]
        if narrow:
            yield (
                f"a hidden layer of {min(narrow)} units is narrower than the {network.classes} scores: it cannot align"
            )

    def _layers(self) -> list[Hidden]:
        """Return this rank's layers with weights, each with the following layers without weights."""
        parts = self.model.parts
        # As in the cut between ranks, a layer that `leads` joins the layer with weights after it.
        starts = [k - (k > 0 and parts[k - 1].layer.leads) for k, part in enumerate(parts) if part.layer.linear]
        # Leading layers without weights join the first group.
        starts[0] = 0
        if self.first:
            # Below its first stage with weights, the network needs no gradient.
            starts[0] = self.model.chain.lowest
        ends = [k - 1 for k in (*starts[1:], len(parts))]
        return [
            Hidden(number, first, last, parts[last].size)
            for number, (first, last) in enumerate(zip(starts, ends, strict=True))
        ]

    @property
    def hidden(self) -> list[Hidden]:
        """This rank's layers that take feedback: all but the network's last."""
        return self.layers[:-1] if self.last else self.layers

    def reserve(self, batch: int) -> None:
        """Make room for minibatches of up to `batch` samples."""
        if batch <= self.capacity:
            return
        self.capacity = batch
        self.model.reserve(batch)
        self.x = self.ops.empty(self.inputs * batch, self.dtype)
        self.error = self.ops.empty(self.network.classes * batch, self.dtype)
        if self.last:
            self.objective.reserve(self.network.classes, batch)
        self.signal = self.ops.empty(max((one.width for one in self.hidden), default=0) * batch, self.dtype)

    def step(self, batch: Batch, lr: float) -> None:
        b = len(batch)
        self.reserve(b)
        self._forward(self.train, batch.ids)
        self.objective.ids = batch.ids
        if self.last:
            self.objective.bring(self.train.targets(batch.ids))
            self.error_pass(b)
        error = self._error(b)
        self.errors.forward(error, error)
        self.backward_pass(b)
        loss = self.objective.value() if self.last else 0.0
        if self.descent.sound(loss, self.g):
            self.loss_sum += loss * b
            self.descent.step(self.w, self.g, lr)

    def _forward(self, samples: Resident, ids: np.ndarray) -> np.ndarray:
        """Return the outputs of this rank's last layer: receive the inputs from the rank below, send the outputs up."""
        b = len(ids)
        x = self.x[: self.inputs * b].reshape(self.inputs, b)
        if self.below is None:
            samples.fetch(ids, x)
        else:
            self.below.forward(None, x)
        self.tape = self.forward_pass(x.shape[1])
        y: np.ndarray = self.tape.scores
        if self.above is not None:
            self.above.forward(y, None)
        return y

    def _compute(self, b: int) -> Tape:
        """Forward pass through this rank's layers."""
        return self.model.forward(self.x[: self.inputs * b].reshape(self.inputs, b))

    def _error(self, b: int) -> np.ndarray:
        """View (classes, b) of the error e."""
        return self.error[: self.network.classes * b].reshape(-1, b)

    def _differentiate(self, b: int) -> None:
        """Compute e, the derivatives of the mean loss with respect to the scores, clipped to `limit`."""
        scores, error = self.tape.scores, self._error(b)
        derivatives = self.objective.losses(scores, self.objective.targets(b), 1 / b)
        if self.ops.on_device:
            self.ops.cast_scores(derivatives, error, self.objective.report.array)
            self.ops.unscale(error, self.objective.report.array, self.limit)
        else:
            np.copyto(error, np.clip(derivatives, -self.limit, self.limit), casting="same_kind")

    def _learn(self, b: int) -> None:
        """Fill the gradient: of hidden layers from B e, of the network's last one from e."""
        error = self._error(b)
        for one, matrix in zip(self.hidden, self.back, strict=True):
            signal = self.signal[: one.width * b].reshape(one.width, b)
            self.ops.matmul(matrix, error, signal)
            dy = signal.reshape(self.tape.outputs[one.last + 1].shape)
            self.model.backward(self.tape, dy, first=one.first, last=one.last)
        if self.last:
            # Backward overwrites its argument, so it takes a copy of e.
            own = self.objective.cast[: error.size].reshape(error.shape)
            own[...] = error
            self.model.backward(self.tape, own, first=self.layers[-1].first, last=self.layers[-1].last)

    def test(self) -> dict[str, float]:
        with self.counter.paused():
            sums = evaluate(self.metric, self.batches, self._test_scores, self.tests.targets, self.ops)
        return self.metric.scores(self.world.agree(sums))

    def _test_scores(self, ids: np.ndarray) -> np.ndarray | None:
        scores = self._forward(self.tests, ids)
        return scores if self.last else None

    def diagnostics(self) -> dict[str, list[float]]:
        """Return the mean cosine between feedback and gradient of each hidden layer, over the first test samples."""
        with self.counter.paused():
            cosines = self.world.agree(self._alignment())
        return {"alignment": [round(float(c), 6) for c in cosines[: self.depth - 1]]}

    def _alignment(self) -> np.ndarray:
        """Return the cosines (hidden layers of the network,): those of this rank's layers, 0 for others."""
        ids = np.arange(min(ALIGNED, self.dataset.test.n))
        b = len(ids)
        self.reserve(b)
        scores = self._forward(self.tests, ids)
        error = self._error(b)
        if self.last:
            derivatives = np.empty(error.shape)
            self.metric.loss.value(self.ops.host(scores), self.tests.targets(ids), 1 / b, derivatives)
            error[...] = self.diagnostic_ops.put(np.clip(derivatives, -self.limit, self.limit).astype(self.dtype))
        self.errors.forward(error, error)
        cosines = np.zeros(max(1, self.depth - 1))
        # The gradient comes from the rank above, and goes down layer by layer.
        if self.above is None:
            above = self._copy(error)
        else:
            received = np.empty((int(np.prod(self.tape.scores.shape[:-1])), b), self.dtype)
            self.above.backward(None, received)
            above = self.diagnostic_ops.put(received)
        back = list(zip(self.hidden, self.back, strict=True))
        for one in reversed(self.layers):
            shape = self.tape.outputs[one.last + 1].shape
            for hidden, matrix in back:
                if hidden is one:
                    signal = self.signal[: one.width * b].reshape(one.width, b)
                    self.ops.matmul(matrix, error, signal)
                    cosines[self.offset + one.number] = self._cosine(one, self._copy(above), signal)
            x = self.tape.outputs[one.first]
            below = self.diagnostic_ops.empty(x.size, self.dtype).reshape(x.shape)
            self.model.backward(self.tape, above.reshape(shape), first=one.first, last=one.last, dx=below)
            above = below.reshape(-1, b)
        if self.below is not None:
            self.below.backward(self.ops.host(above), None)
        return cosines

    def _copy(self, array: np.ndarray) -> np.ndarray:
        copy = self.diagnostic_ops.empty(array.size, self.dtype).reshape(array.shape)
        copy[...] = array
        return copy

    def _cosine(self, one: Hidden, gradient: np.ndarray, signal: np.ndarray) -> float:
        """Return the mean over samples of the cosine between gradient and feedback of a layer's output.

        Both (width, b) are first multiplied by the activation's derivative, in place.
        """
        last = one.last
        while self.model.parts[last].layer.place == VIEW:
            last -= 1
        kind, y = self.model.parts[last].activation, self.tape.outputs[last + 1]
        for v in (gradient, signal):
            self.ops.activate_back(kind, y.reshape(v.shape), v)
        a, d = (self.ops.host(v).astype(np.float64) for v in (gradient, signal))
        sizes = np.sqrt((a * a).sum(axis=0) * (d * d).sum(axis=0))
        return float(np.where(sizes > 0, (a * d).sum(axis=0) / np.where(sizes > 0, sizes, 1), 0.0).mean())

    def messages(self, step: int, batch: int) -> list[Message]:
        return [message for one in (*self.cuts, self.errors) for message in one.messages(Step(batch))]

    def work(self) -> tuple[str, str, int]:
        names = [layer.name for layer in self.network.linear]
        own = names[self.offset : self.offset + len(self.layers)]
        return "layers", own[0] if len(own) == 1 else f"{own[0]} to {own[-1]}", self.w.size

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.loss.clipped}


def widths(network: Network) -> list[int]:
    """Return the number of outputs of each layer with weights, after the layers without weights that follow it."""
    counts: list[int] = []
    for layer in network.layers:
        size = int(np.prod(layer.out_shape))
        if layer.linear:
            counts.append(size)
        elif counts:
            counts[-1] = size
    return counts
