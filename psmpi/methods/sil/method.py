"""Synthetic intermediate labels: runs of layers that are trained separately, on a random vector for each class.

Karadag and Topaloglu, "Partitioned Neural Network Training via Synthetic Intermediate Labels", arXiv 2403.11204. The
outputs of each part but the last learn a fixed random vector of the sample's class, those of the last part the class. A
part learns from the outputs of the finished part before it, handed over once, and no gradient goes from part to part.
The paper leaves some choices open, which are psmpi's own: distances over the units and the square of the labels' scale,
the network's own activations, more than two parts, several ranks a part, and all schedules but `stored`.
"""

from __future__ import annotations

from collections.abc import Set
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.comm.transfers import Message, Step, Sum
from psmpi.data import Batch, Resident
from psmpi.errors import UserError
from psmpi.layout import Ownership, Runs
from psmpi.methods.sil.part import TrainedPart
from psmpi.methods.sil.plan import (
    Assignment,
    Phase,
    Settings,
    check_sil,
    count_parts,
    cut_activation,
    plan_phases,
    sil_needed,
    warnings,
)  # fmt: skip
from psmpi.methods.sil.row import Row
from psmpi.nn.cut import split_layers
from psmpi.training.context import Context
from psmpi.training.descent import no_sum
from psmpi.training.evaluator import evaluate
from psmpi.training.method import Exactness, Method
from psmpi.training.replica import verify
from psmpi.training.state import Places

# Key of the noise on labels, which separates it from other draws from the seed.
NOISE = 0x6E6F6973


# A task for tests: four parts in turn and one epoch of all as one network.
OPTIONS = (
    "--parts", "4", "--model", "mlp", "--widths", "20", "20", "20", "--epochs", "5", "--recovery-epochs", "1"
)  # fmt: skip


class SyntheticLabels(Method):
    """Synthetic intermediate labels on one rank: one or more parts, with their weights and optimizer state.

    parts: this rank's parts, by number from 0. With several ranks a part, each of them is a row: it takes its slice of
    each minibatch, and sends to the same row of the next part.
    """

    name = "sil"
    summary = "runs of layers on ranks, synthetic intermediate labels"
    settings = (Settings,)
    nccl = skips = True
    exactness = Exactness(options=OPTIONS)

    def __init__(self, context: Context):
        network, layout, dataset, ops = context.network, context.layout, context.dataset, context.ops
        s, config = context.settings(Settings), context.config
        self.count = count_parts(context.size, network, s.parts)
        self.assignment, self.stages = Assignment(context.size, self.count), split_layers(network, self.count)
        runs = [network.runs(layout, *stage) for stage in self.stages]
        held = self.assignment.parts_of(context.rank)
        # All rows of a part hold its shard; the first row writes checkpoints.
        intervals = (
            [one for k in self.assignment.parts_of(rank) for one in runs[k].intervals] for rank in range(context.size)
        )
        super().__init__(context, Ownership(tuple(map(Runs.union, intervals))))
        self.clip, self.mode = config.optimization.clip, s.hand_over
        self.seed, self.noise = s.labels_seed, s.labels_noise * s.labels_scale
        self.phases = plan_phases(self.count, config.run.epochs, s)
        self.per_epoch = -(-dataset.train.n // config.data.batch_size)
        self.row = self.rank % self.assignment.rows
        self.world = context.group()
        self.peers = context.group(
            [self.assignment.rank(held[0], row) for row in range(self.assignment.rows)], nccl=True
        )
        self.w, self.g = (ops.zeros(self.shards[self.rank].size, self.dtype) for _ in range(2))
        ends = np.cumsum([0, *(runs[k].size for k in held)]).tolist()
        places = {k: slice(a, b) for k, (a, b) in zip(held, pairwise(ends), strict=True)}
        self.parts = {k: TrainedPart(context, k, self.stages[k], self.w[at], self.g[at]) for k, at in places.items()}
        self.last = self.parts.get(self.count - 1)
        self.sums = {k: Sum(self.peers, part.w.size, self.dtype) for k, part in self.parts.items()}
        self.metric = context.metric()
        train, tests = np.arange(dataset.train.n), np.arange(dataset.test.n)
        test_batches = [
            tests[at] for at in network.evaluation_batches(dataset.test.n)[self.row :: self.assignment.rows]
        ]
        if 0 not in held:
            train, test_batches = train[:0], []
        self.train = Resident(dataset.train, train, self.dtype, ops)
        self.tests = Resident(dataset.test, np.concatenate([tests[:0], *test_batches]), self.dtype, ops)
        self.chain = Row(context, self.parts, self.assignment, self.stages, self.world, self.peers, self.train)
        self.handed = ops.empty(self.w.size if self.mode == "stale" else 0, self.dtype)
        self._declare(places)
        self.account.hold("gradients", self.g)
        self.account.hold("weights", self.handed)
        self.account.hold("samples", self.train, self.tests)
        for part in self.parts.values():
            self.account.include(part.memory)
        self.cuts: dict[str, Any] = {}

    def _declare(self, places: dict[int, slice]) -> None:
        """Declare the state: vectors of each part, at the places of its runs in the shard."""
        state, optimizers = self.state, [part.optimizer for part in self.parts.values()]
        shard = self.shards[self.rank]
        spots: list[Places] = [
            [(shard.local(a, b), part.runs.local(a, b)) for a, b in part.runs.intervals] for part in self.parts.values()
        ]
        state.pieces("weights", list(zip((part.w for part in self.parts.values()), spots, strict=True)))
        for name in optimizers[0].vectors:
            state.pieces(name, list(zip((one.vectors[name] for one in optimizers), spots, strict=True)))
        if self.mode == "stale":
            # The weights that computed the outputs which were handed over last.
            self.handed[...] = self.w
            state.pieces("handed", list(zip((self.handed[at] for at in places.values()), spots, strict=True)), own=True)
        # Steps of the run, and its plan, which `restored` compares with the present one.
        state.scalars["steps"] = 0
        for name, value in (("macs", 0), ("handed_bytes", 0), ("parts", self.count), ("phase", 0)):
            state.scalar(name, value)
        state.scalars.update(optimizers[0].scalars)

    check, needed, warnings = staticmethod(check_sil), staticmethod(sil_needed), staticmethod(warnings)

    def step(self, batch: Batch, lr: float) -> None:
        ids = batch.ids
        epoch, within = divmod(int(self.scalars["steps"]), self.per_epoch)
        phase = next(phase for phase in self.phases if epoch < phase.stop)
        if within == 0:
            self._begin(phase, epoch)
        self.scalars["phase"] = self.phases.index(phase)
        places = np.array_split(np.arange(len(ids)), self.assignment.rows)[self.row]
        trained = [self.parts[k] for k in phase.parts if k in self.parts]
        before = self.loss_sum
        if not len(places):
            self.g.fill(0)
        elif phase.joined:
            self._learn_joined(ids, places)
        else:
            for k in phase.parts:
                self._learn_apart(k, ids, places, labels=epoch == phase.start, counts=k == phase.parts[-1])
        for part in trained:
            self.sums[part.number].backward(part.g, part.g)
        gradients = [(part.g, part.runs) for part in trained]
        if self.numbers.sound(self.ops, self.loss_sum - before, gradients, self.layout):
            self._update(trained, lr, joined=phase.joined)
        else:
            self.loss_sum = before
        self.scalars["steps"] += 1

    def _update(self, trained: list[TrainedPart], lr: float, *, joined: bool) -> None:
        """Step these parts along their gradients."""
        if self.clip > 0 and joined:
            self.numbers.clip(self.g, self.clip, self._over_parts, self.ops, self.layout, self.shards[self.rank])
        elif self.clip > 0:
            for part in trained:
                self.numbers.clip(part.g, self.clip, no_sum, self.ops, self.layout, part.runs)
        for part in trained:
            part.optimizer.scalars.update({name: self.scalars[name] for name in part.optimizer.scalars})
            part.optimizer.step(part.w, part.g, lr, no_sum)
        if "t" in self.scalars:
            self.scalars["t"] += 1

    def _begin(self, phase: Phase, epoch: int) -> None:
        """Prepare an epoch: reset the optimizers in a new phase, and hand over outputs."""
        if epoch == phase.start:
            self._refresh()
        first, last = self._hand_overs(phase, epoch)
        if first < last and self.mode == "stale":
            self.handed[...] = self.w
        self.chain.hand_over(first, last)

    def _hand_overs(self, phase: Phase, epoch: int) -> tuple[int, int]:
        """Return the first and the last part of the hand-over at the start of an epoch; equal numbers: no hand-over."""
        if self.mode == "stored" and epoch == phase.start and phase.parts[0] > 0 and not phase.joined:
            return phase.parts[0] - 1, phase.parts[0]
        if self.mode == "stale" and epoch > phase.start and not phase.joined:
            return 0, self.count - 1
        return 0, 0

    def _refresh(self) -> None:
        """Reset all optimizers: a new phase needs no state of the finished parts."""
        for part in self.parts.values():
            for vector in part.optimizer.vectors.values():
                vector.fill(0)
        if "t" in self.scalars:
            self.scalars["t"] = 0

    def _learn_apart(self, k: int, ids: np.ndarray, places: np.ndarray, *, labels: bool, counts: bool) -> None:
        """Fill part k's gradient of its own loss over the samples ids[places] of a minibatch.

        labels: whether, with --hand-over stale, inputs are labels; counts: whether the loss counts in `loss_sum`.
        """
        part, own = self.parts.get(k), ids[places]
        x = None
        if k == 0 or self.mode == "recompute":
            x = self.chain.fetch(self.train, own)
            for before in range(k):
                x = self.chain.pass_on(before, x, len(own))
        if part is None:
            return
        if x is None and (self.mode == "labels" or (self.mode == "stale" and labels)):
            x = self._labels(part, ids, places)
        elif x is None:
            x = part.room(len(own))
            part.samples.fetch(own, x)
        part.objective.ids = own
        loss = part.learn(x, self.dataset.train.labels[own], 1 / len(ids))
        self.chain.macs += part.cost.training() * len(own)
        self.loss_sum += loss * len(ids) * counts

    def _learn_joined(self, ids: np.ndarray, places: np.ndarray) -> None:
        """Fill all parts' gradients of the last part's loss: outputs go from part to part, and their gradients back."""
        own = ids[places]
        x, dy = self.chain.fetch(self.train, own), None
        for k in range(self.count - 1):
            x = self.chain.pass_on(k, x, len(own))
        for k in reversed(range(self.count)):
            if k < self.count - 1:
                dy = self.chain.pass_back(k, dy, len(own))
            part = self.parts.get(k)
            if part is None:
                continue
            dx = part.dx[: part.inputs * len(own)].reshape(*part.model.in_shape, -1) if k else None
            if part.last:
                assert x is not None
                part.objective.ids = own
                loss = part.learn(x, self.dataset.train.labels[own], 1 / len(ids), dx)
                self.loss_sum += loss * len(ids)
                self.chain.macs += part.cost.forward * len(own)
            else:
                assert dy is not None
                part.back(dy, dx)
            self.chain.macs += (part.cost.training(inputs=k > 0) - part.cost.forward) * len(own)
            dy = dx

    def _labels(self, part: TrainedPart, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the labels of the part before, as inputs (inputs, b); with --hand-over labels, with noise.

        The noise is drawn for the whole minibatch, so that it does not depend on the number of rows.
        """
        x = part.room(len(places))
        part.columns.fetch(self.dataset.train.labels[ids[places]], x)
        if self.mode == "labels":
            all_of = slice(0, part.inputs * len(ids))
            rng = np.random.default_rng([self.seed, NOISE, part.number, int(self.scalars["steps"])])
            part.noise.settle()
            noise = part.noise.host[all_of]
            rng.standard_normal(dtype=self.dtype.type, out=noise)
            noise *= self.noise
            part.noise.push(all_of)
            x += part.noise.array[all_of].reshape(part.inputs, -1)[:, places[0] : places[-1] + 1]
        return x

    def _over_parts(self, values: np.ndarray) -> np.ndarray:
        """Return the sums of `values` over the parts; all rows have the same values, so row 0 alone adds them."""
        return self.world.agree(values * (self.row == 0))

    def drain(self) -> None:
        self.scalars["macs"], self.scalars["handed_bytes"] = self.chain.totals()

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        """Go on from a checkpoint; repeat its hand-over, from the same weights and in the same pieces, to the bit."""
        if "handed" in fresh:
            self.handed[...] = self.w
        self.chain.earlier_counts = int(self.scalars["macs"]), int(self.scalars["handed_bytes"])
        self.chain.macs = self.chain.handed_bytes = 0
        if self.scalars["parts"] != self.count:
            raise UserError(
                f"the checkpoint has {int(self.scalars['parts'])} parts, and this run would have {self.count}: use "
                f"--parts {int(self.scalars['parts'])}"
            )
        steps = int(self.scalars["steps"])
        before = next((k for k, phase in enumerate(self.phases) if (steps - 1) // self.per_epoch < phase.stop), -1)
        if steps and before != self.scalars["phase"]:
            # With the epochs of this run, the checkpoint's last step was of another phase.
            self._refresh()
        epoch, within = divmod(int(self.scalars["steps"]), self.per_epoch)
        phase = next((phase for phase in self.phases if epoch < phase.stop), None)
        if phase is None or phase.joined:
            return
        with self.chain.uncounted():
            if self.mode == "stored":
                # The first step of a phase makes the hand-over itself.
                self.chain.hand_over(0, phase.parts[0] - ((epoch, within) == (phase.start, 0)))
            elif self.mode == "stale" and epoch > phase.start and within:
                self.g[...] = self.w
                self.w[...] = self.handed
                self.chain.hand_over(0, self.count - 1)
                self.w[...] = self.g

    def test(self) -> dict[str, float]:
        if self.assignment.rows > 1:
            verify(self.peers, self.ops.host(self.w), "use another MPI library")
        for part in self.parts.values():
            part.forget()
        batches = self.network.evaluation_batches(self.dataset.test.n)[self.row :: self.assignment.rows]
        with self.chain.uncounted():
            sums = evaluate(self.metric, batches, self._test_scores, self.tests.targets, self.ops)
        self._look_at_cuts()
        return self.metric.scores(self.world.agree(sums))

    def _test_scores(self, ids: np.ndarray) -> np.ndarray | None:
        """Return the scores of test samples on the last part's rank, else None; measure the other parts' outputs."""
        x = self.chain.fetch(self.tests, ids)
        for k in range(self.count - 1):
            x = self.chain.pass_on(k, x, len(ids))
        for part in self.parts.values():
            if not part.last:
                part.look(self.dataset.test.labels[ids])
        if self.last is None:
            return None
        assert x is not None
        return self.last.forward(x)

    def _look_at_cuts(self) -> None:
        """Set `cuts` from what the test measured at the outputs of all parts but the last."""
        if self.count == 1:
            return
        sums = np.zeros((self.count - 1, 5))
        for k, part in self.parts.items():
            alive = self.peers.agree(part.alive.astype(np.float64))
            if not part.last:
                sums[k] = [*part.cut_sums, np.count_nonzero(alive == 0) * (self.row == 0)]
        distance, nearest, solved, samples, dead = self.world.agree(sums).T
        relu = [cut_activation(self.network, stop) == "relu" for _, stop in self.stages[:-1]]
        self.cuts = {
            "target_distance": (distance / samples).tolist(),
            "nearest_accuracy": (nearest / samples).tolist(),
            "least_squares_accuracy": (solved / samples).tolist(),
            "dead_units": [int(n) if can else None for n, can in zip(dead, relu, strict=True)],
        }

    def diagnostics(self) -> dict[str, Any]:
        """Return the phase, MACs and bytes sent from part to part so far, and the last test's measurements at the cuts.

        For each part but the last: mean distance over the scale squared, accuracies read from its outputs, dead units.
        """
        epoch = max(0, int(self.scalars["steps"]) - 1) // self.per_epoch
        phase = next((phase.name for phase in self.phases if epoch < phase.stop), "")
        macs, handed = self.chain.totals()
        return {"phase": phase, "macs": macs, "handed_bytes": handed, **self.cuts}

    def messages(self, step: int, batch: int) -> list[Message]:
        """Return the messages of this row."""
        epoch, within = divmod(step, self.per_epoch)
        phase = next(phase for phase in self.phases if epoch < phase.stop)
        share = Step(len(np.array_split(np.arange(batch), self.assignment.rows)[self.row]))
        messages = self.chain.handed_over(*self._hand_overs(phase, epoch)) if within == 0 else []
        if phase.joined:
            messages += [
                m for cut in self.chain.boundaries for back in (False, True) for m in cut.messages(share, back)
            ]
        elif self.mode == "recompute":
            messages += [m for k in phase.parts for cut in self.chain.boundaries[:k] for m in cut.messages(share)]
        trained = [self.sums[k] for k in phase.parts if k in self.sums]
        return messages + [m for one in trained for m in one.messages(share, back=True)]

    def work(self) -> tuple[str, str, int]:
        numbers = sorted(self.parts)
        layers = self.network.layers[self.stages[numbers[0]][0] : self.stages[numbers[-1]][1]]
        names = [layer.name for layer in layers if layer in self.network.linear]
        role = f"part {numbers[0] + 1}" if len(numbers) == 1 else f"parts {numbers[0] + 1} to {numbers[-1] + 1}"
        where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        return role, where, sum(part.w.size for part in self.parts.values())

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.last.loss.clipped if self.last is not None else 0}
