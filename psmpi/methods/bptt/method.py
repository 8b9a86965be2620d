"""Truncated back-propagation through time, and synthetic gradients of the future beyond the truncation.

Williams and Peng, "An efficient gradient-based algorithm for on-line training of recurrent network trajectories"
(1990); Jaderberg and others, "Decoupled neural interfaces using synthetic gradients" (2017), section 2.2: a network
predicts the gradient of a window's last states from these states, and learns from the gradient that the next window
returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from psmpi.backend.reference import exponent_of
from psmpi.comm.buckets import Bucket, Buckets
from psmpi.comm.transfers import Message
from psmpi.config import Config
from psmpi.data import Batch, Dataset
from psmpi.layout import Runs
from psmpi.methods.bptt.future import Future, carries
from psmpi.methods.bptt.settings import (
    Settings,
    bptt_notes,
    bptt_warnings,
    check_bptt,
    future_network,
    windows,
)
from psmpi.nn.layers.chain import Tape
from psmpi.nn.layers.recurrent import RecurrentPart
from psmpi.nn.layers.workspace import Span
from psmpi.nn.metric import sequences_right
from psmpi.nn.network import Network
from psmpi.nn.objective import GRADIENT_LIMIT
from psmpi.nn.sequences import count_states
from psmpi.training.auxiliary import Auxiliary
from psmpi.training.context import Context
from psmpi.training.evaluator import evaluate
from psmpi.training.method import Exactness
from psmpi.training.need import Need, added, vectors_needed
from psmpi.training.replica import Replica, Sums
from psmpi.training.spans import chunk_spans

OPTIONS = ("--dataset", "digits:rows", "--model", "lstm", "--widths", "10", "--unroll", "3", "--future", "synthetic")
WIDE = ("--widths", "120", "120", "--unroll", "4", "--backend", "numpy")


@dataclass(frozen=True)
class Sequences:
    """This rank's slice of a minibatch: ids (b,), inputs (features, steps, b), targets, lengths (b,) or None, spans."""

    ids: np.ndarray
    x: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray | None
    spans: list[Span]

    def __len__(self) -> int:
        return len(self.ids)


class TruncatedBackPropagation(Replica):
    """Truncated back-propagation on one rank: a slice of each minibatch, and an optimizer step after each window.

    The model of the whole network makes the passes, each over the steps of a window. Spaces of checkpoints: `bptt`,
    weights of the network that predicts gradients; `bptt_m` and so on, vectors of its optimizer; every rank has all.
    """

    name = "bptt"
    summary = "truncated back-propagation through time, data parallel"
    settings = (Settings, Sums)
    tiles = False
    advice = "use --allreduce ring"
    usual_options = (
        "--dataset", "repeat_copy:3", "--model", "lstm", "--widths", "64", "--unroll", "3", "--future", "synthetic",
        "--future-hidden", "128", "--loss", "nll", "--epochs", "3", "--batch-size", "50", "--lr", "0.003",
    )  # fmt: skip
    exactness = Exactness(options=OPTIONS, wide=WIDE)

    def __init__(self, context: Context):
        s = context.settings(Settings)
        predictor = future_network(context.network, s)
        self.edges = windows(context.network, s)
        # `summed` also holds the gradient of the predicting network, and the sum of squares of returned gradients.
        super().__init__(context, predictor.layout().size + 1 if predictor is not None else 0)
        self.keep_state()
        self.model, self.objective = self.worker.model, self.worker.objective
        self.parts = [part for part in self.model.walk() if isinstance(part, RecurrentPart)]
        self.future: Future | None = None
        self.rate = s.future_lr
        if predictor is not None:
            self._add_future(context, Auxiliary, predictor)
        # The first window returns no gradient that was predicted, so its all-reduce carries only the trained network's.
        sizes = [self.layout.size, *([self.summed.size] if len(self.edges) > 1 else [])]
        how = context.settings(Sums).allreduce
        self.sums = [
            Buckets(self.world, self.by_host, self.summed[:n], [Bucket(0, n, 0)], how, self.own_sums) for n in sizes
        ]
        self.account.ask("buffers", lambda: tuple(self.sums))
        self.account.ask("activations", lambda: (self.window_x,))
        self.capacity, self.window_x = 0, self.ops.empty(0, self.dtype)
        self.reserve(max(1, -(-context.config.data.batch_size // context.size)))
        self.right, self.measured = np.zeros(2), {}  # type: np.ndarray, dict[str, Any]

    def _add_future(self, context: Context, kind: type[Auxiliary], network: Any) -> None:
        """Make the network that predicts gradients, and declare its state."""
        w, layout = self.ops.zeros(network.layout().size, self.dtype), network.layout()
        predictor = kind(context.config, network, w, self.summed[self.layout.size : -1], self.ops, "future", zero=True)
        self.future = Future(predictor, self.parts)
        everyone = [Runs(((0, layout.size),))] * context.size
        lost = "the network that predicts gradients, with these options: it starts from initial weights"
        self.state.space("bptt", [w], self.dtype, layout, everyone, "weights", lost)
        lost = "the optimizer of the network that predicts gradients: it starts from zeros"
        for name, vector in predictor.optimizer.vectors.items():
            self.state.space(
                f"bptt_{name}", [vector], self.dtype, layout, everyone, "optimizer", lost, of_optimizer=True
            )
        self.state.scalar("fits", 0)
        self.state.scalar("future_square", 0.0)
        self.account.hold("optimizer", *predictor.optimizer.work, predictor.optimizer.scratch)
        self.account.hold("buffers", self.future)

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        check_bptt(network, dataset, config)
        super().check(size, network, dataset, config)

    @classmethod
    def needed(cls, size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
        s, layout = config.of(Settings), network.layout()
        item, share = np.dtype(config.model.dtype).itemsize, config.data.batch_size // size
        longest = max(b - a for a, b in windows(network, s))
        extra: Need = {"activations": item * network.in_shape[0] * longest * share}
        predictor = future_network(network, s)
        if predictor is not None:
            layout = predictor.layout()
            extra = added(extra, vectors_needed(config, layout, layout.size, layout.size, layout.size))
            extra = added(extra, {"buffers": 2 * item * count_states(network.layers) * share})
        return [added(one, extra) for one in super().needed(size, network, dataset, config)]

    @staticmethod
    def notes(size: int, network: Network, config: Config) -> Iterator[str]:
        yield from bptt_notes(network, config.of(Settings))

    @staticmethod
    def warnings(size: int, network: Network, config: Config) -> Iterator[str]:
        yield from Replica.warnings(size, network, config)
        yield from bptt_warnings(config)

    def reserve(self, batch: int) -> None:
        """Make room for slices of up to `batch` samples."""
        if batch <= self.capacity:
            return
        self.capacity = batch
        self.worker.reserve(batch)
        longest = max(b - a for a, b in self.edges)
        self.window_x = self.ops.empty(self.network.in_shape[0] * longest * batch, self.dtype)
        if self.future is not None:
            self.future.reserve(batch)

    def step(self, batch: Batch, lr: float) -> None:
        own, count = batch.share(self.rank, self.world.size), self.dataset.train.count(batch.ids)
        slice_ = self._take(own) if len(own) else None
        loss = 0.0
        if self.future is not None:
            self.future.square = float(self.scalars["future_square"])
        for c in range(len(self.edges)):
            self.summed.fill(0)
            share = self._window(c, slice_, count) if slice_ is not None else 0.0
            self.g[self.unused].fill(0)
            self.sums[c > 0].finish()
            if self.descent.sound(share, self.g):
                self.descent.step(self.w, self.g, lr)
                if self.future is not None and c > 0:
                    self._fit(self.future, lr, len(batch))
            loss += share
        self.loss_sum += loss * len(batch)

    def _take(self, own: Batch) -> Sequences:
        """Return the samples of this rank's slice."""
        self.reserve(len(own))
        train, ids = self.worker.train, own.ids
        x = train.batch(ids, self.worker.x).inputs.reshape(*self.network.in_shape, len(ids))
        return Sequences(ids, x, train.targets(ids), train.lengths(ids), chunk_spans(train, ids, self.edges, self.ops))

    def _fit(self, future: Future, lr: float, b: int) -> None:
        """Step the network that predicts gradients along the summed gradient of (1/b) |predicted - returned|^2."""
        if future.square:
            share = lr / self.context.config.optimization.lr
            rate = self.rate * share if self.rate else future.network.bearable(lr)
            future.network.step(rate, 2 / b, int(self.scalars["fits"]), self.descent.allsum)
            self.scalars["fits"] += 1
        future.note(float(self.ops.host(self.summed[-1:])[0]) / (b * future.network.inputs))
        self.scalars["future_square"] = future.square

    def _window(self, c: int, own: Sequences, count: int) -> float:
        """Fill g with this rank's share of the gradient of window c, and M's gradient; return the share of the loss."""
        (a, z), b, span = self.edges[c], len(own), own.spans[c]
        if c:
            # The optimizer has changed the weights since the window before.
            for part in self.parts:
                part.prepare()
        x = self.window_x[: self.network.in_shape[0] * (z - a) * b].reshape(-1, z - a, b)
        x[...] = own.x[:, a:z]
        tape = self.model.forward(x, None, span)
        share, dy = self._losses(tape, own, a, z, 1 / count)
        power = exponent_of(float(self.objective.report.host[3])) if dy is not None else 0
        if dy is None:
            dy = self.model.space.take("derivatives", *tape.scores.shape)
            dy.fill(0)
        if not span.ends:
            if self.future is not None:
                self.future.predict(b, 2.0**-power / count, self._go_on(own, z))
            else:
                for _, carry in carries(self.parts, b, states=False):
                    carry.fill(0)
        self.model.backward(tape, dy)
        if power:
            limit, report = GRADIENT_LIMIT[self.dtype], self.objective.report.array
            self.ops.unscale(self.worker.g_part, report, limit)
            for _, carry in carries(self.parts, b, states=False):
                self.ops.unscale(carry, report, limit)
        if self.future is not None:
            if c:
                self.summed[-1:].fill(self.future.fit(b, float(count), self._go_on(own, a)))
            if not span.ends:
                self.future.remember(b)
        return share

    def _go_on(self, own: Sequences, step: int) -> np.ndarray | None:
        """Return (b,): 1 for sequences that have step number `step`, 0 for others; None if all sequences have it."""
        if own.lengths is None or (own.lengths > step).all():
            return None
        return self.ops.put((own.lengths > step).astype(self.dtype))

    def _losses(self, tape: Tape, own: Sequences, a: int, z: int, scale: float) -> tuple[float, np.ndarray | None]:
        """Return this rank's share of the loss in the steps [a, z), and the derivatives of the scores.

        With one target a sequence, only sequences whose last step is in [a, z) have a loss there. The derivatives are
        scaled as the objective reports; None if no sequence has a loss in these steps.
        """
        targets, scores, ids, at = own.targets, tape.scores, own.ids, None
        if self.network.steps:
            targets = np.ascontiguousarray(targets[..., a:z, :])
        else:
            steps = self.network.in_shape[1]
            last = np.full(len(own), steps) if own.lengths is None else own.lengths
            ending = np.flatnonzero((last > a) & (last <= z))
            if not len(ending):
                return 0.0, None
            if len(ending) < len(own):
                at, ids, targets = self.ops.put(ending), ids[ending], np.ascontiguousarray(targets[..., ending])
                scores = self.ops.empty(len(scores) * len(ending), self.dtype).reshape(len(scores), -1)
                scores[...] = tape.scores[:, at]
        self.objective.ids = ids
        self.objective.bring(targets)
        if self.network.steps and not self.objective.columns:
            return 0.0, None
        self.objective.losses(scores, self.objective.targets(len(ids)), scale)
        share, dy = self.objective.value(), self.objective.derivatives(scores).reshape(scores.shape)
        if at is not None:
            some, dy = dy, self.model.space.take("derivatives", *tape.scores.shape)
            dy.fill(0)
            dy[:, at] = some
        return share, dy

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        if self.future is not None and fresh & self.state.spaces.keys():
            self.scalars["fits"], self.scalars["future_square"] = 0, 0.0
            self.future.network.begin(weights="bptt" in fresh)

    def test(self) -> dict[str, float]:
        self.verify(self.w)
        if self.future is not None:
            self.verify(self.future.network.w)
        worker, self.right = self.worker, np.zeros(2)
        sums = evaluate(worker.metric, worker.test_batches, self._test_scores, worker.test_targets, self.ops)
        own_sums = np.concatenate([self.right, self.future.error if self.future is not None else np.zeros(2)])
        totals = self.world.agree(np.concatenate([sums, own_sums]))
        self._report(totals[len(sums) :])
        return worker.metric.scores(totals[: len(sums)])

    def _test_scores(self, ids: np.ndarray) -> np.ndarray:
        """Return the scores of test samples; count the sequences whose steps are all right."""
        scores = self.worker.test_scores(ids)
        if self.network.steps and self.dataset.task == "classes":
            self.right += sequences_right(self.ops.host(scores), self.worker.test_targets(ids)), len(ids)
        return scores

    def _report(self, sums: np.ndarray) -> None:
        """Set the diagnostics from sums over ranks.

        sums: (4,), sequences that are right, all sequences, |predicted - returned|^2 and |returned|^2.
        """
        right, n, misfit, size = sums
        self.measured = {}
        if n:
            self.measured["sequence_accuracy"] = round(float(right / n), 6)
        if self.future is not None:
            self.measured["future_error"] = round(float(np.sqrt(misfit / size)), 6) if size > 0 else None
            self.future.error = np.zeros(2)

    def diagnostics(self) -> dict[str, Any]:
        """Share of the test's sequences whose steps are all right; |predicted - returned| / |returned| of gradients."""
        return self.measured

    def messages(self, step: int, batch: int) -> list[Message] | None:
        if not self.same_sums:
            return None
        return [one for c in range(len(self.edges)) for one in self.sums[c > 0].messages()]
