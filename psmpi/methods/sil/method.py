"""Synthetic intermediate labels: runs of layers that are trained apart, on random vectors that stand for the classes.

Karadag and Topaloglu, "Partitioned Neural Network Training via Synthetic Intermediate Labels", arXiv 2403.11204. The
outputs of each part but the last learn a fixed random vector of the sample's class, those of the last one the class; a
part learns from the outputs of the finished one before, handed over once, and no gradient goes from part to part. What
the paper leaves open is chosen here, and so this is psmpi's SIL: distances over the units and the square of the labels'
scale, the network's own activations, more than two parts, several ranks a part, and all schedules but `stored`.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np

from psmpi.comm.transfers import Boundary, Spread, Sum
from psmpi.data import Batch, Resident
from psmpi.errors import UserError
from psmpi.layout import Ownership, Runs
from psmpi.methods.sil.part import TrainedPart
from psmpi.methods.sil.plan import (
    Phase,
    Seats,
    Settings,
    check_sil,
    count_parts,
    cut_activation,
    plan_phases,
    warnings,
)  # fmt: skip
from psmpi.nn.cut import split_layers
from psmpi.optim import clip_by_global_norm
from psmpi.training.context import Context
from psmpi.training.descent import no_sum
from psmpi.training.evaluator import evaluate
from psmpi.training.method import Method, nbytes, together
from psmpi.training.replica import verify
from psmpi.training.state import Places

# Keeps the noise on labels apart from all else drawn from their seed.
NOISE = 0x6E6F6973


class SyntheticLabels(Method):
    """The method on one rank: one or more parts, the weights and optimizer state of these alone.

    parts: this rank's, by number from 0. With several ranks a part these are its rows, each of which takes its slice of
    each minibatch and sends to the same row of the next part.
    """

    name = "sil"
    summary = (
        "synthetic intermediate labels, each rank some layers, which learn random vectors that stand for the classes"
    )
    settings = (Settings,)
    nccl = True

    def __init__(self, context: Context):
        network, layout, dataset, ops = context.network, context.layout, context.dataset, context.ops
        s, config = context.settings(Settings), context.config
        self.count = count_parts(context.size, network, s.parts)
        self.seats, self.stages = Seats(context.size, self.count), split_layers(network, self.count)
        runs = [network.runs(layout, *stage) for stage in self.stages]
        held = self.seats.held(context.rank)
        # All rows of a part have its shard; checkpoints are written by the first.
        several = ([one for k in self.seats.held(rank) for one in runs[k].intervals] for rank in range(context.size))
        super().__init__(context, Ownership(tuple(map(Runs.union, several))))
        self.clip, self.way = config.optimization.clip, s.hand_over
        self.seed, self.noise = s.labels_seed, s.labels_noise * s.labels_scale
        self.phases = plan_phases(self.count, config.run.epochs, s)
        self.per_epoch = -(-dataset.train.n // config.data.batch_size)
        self.row = self.rank % self.seats.rows
        self.world = context.group()
        self.peers = context.group([self.seats.rank(held[0], row) for row in range(self.seats.rows)], nccl=True)
        self.w, self.g = (ops.zeros(self.shards[self.rank].size, self.dtype) for _ in range(2))
        ends = np.cumsum([0, *(runs[k].size for k in held)]).tolist()
        places = {k: slice(a, b) for k, (a, b) in zip(held, pairwise(ends), strict=True)}
        self.parts = {k: TrainedPart(context, k, self.stages[k], self.w[at], self.g[at]) for k, at in places.items()}
        self.last = self.parts.get(self.count - 1)
        # Behind each part but the last, in this row; gradients over the rows of a part; what one row shares with them.
        units = [int(np.prod(network.layers[behind - 1].out_shape)) for _, behind in self.stages]
        at = [self.seats.rank(k, self.row) for k in range(self.count)]
        self.boundaries = [Boundary(self.world, at[k], at[k + 1], units[k], self.dtype) for k in range(self.count - 1)]
        self.sums = {k: Sum(self.peers, part.w.size, self.dtype) for k, part in self.parts.items()}
        self.shared = {
            k: [Spread(self.peers, part.inputs, self.dtype, row, per_sample=True) for row in range(self.seats.rows)]
            for k, part in self.parts.items()
        }
        self.metric = context.metric()
        train, tests = np.arange(dataset.train.n), np.arange(dataset.test.n)
        mine = [tests[at] for at in network.evaluation_batches(dataset.test.n)[self.row :: self.seats.rows]]
        if 0 not in held:
            train, mine = train[:0], []
        self.train = Resident(dataset.train, train, self.dtype, ops)
        self.tests = Resident(dataset.test, np.concatenate([tests[:0], *mine]), self.dtype, ops)
        # MACs, and bytes sent from part to part: all ranks' up to the last checkpoint, and this rank's since the start.
        self.past, self.macs, self.handed_bytes = (0, 0), 0, 0
        self.handed = ops.empty(self.w.size if self.way == "stale" else 0, self.dtype)
        self._declare(places)
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
        if self.way == "stale":
            # The weights that made what was handed over last.
            self.handed[...] = self.w
            state.pieces("handed", list(zip((self.handed[at] for at in places.values()), spots, strict=True)), own=True)
        # The steps of the run, and what the run was planned to be: see `restored`.
        state.scalars["steps"] = 0
        for name, value in (("macs", 0), ("handed_bytes", 0), ("parts", self.count), ("phase", 0)):
            state.scalar(name, value)
        state.scalars.update(optimizers[0].scalars)

    check, warnings = staticmethod(check_sil), staticmethod(warnings)

    def step(self, batch: Batch, lr: float) -> None:
        ids = batch.ids
        epoch, within = divmod(int(self.scalars["steps"]), self.per_epoch)
        phase = next(phase for phase in self.phases if epoch < phase.stop)
        if within == 0:
            self._begin(phase, epoch)
        self.scalars["phase"] = self.phases.index(phase)
        mine = np.array_split(np.arange(len(ids)), self.seats.rows)[self.row]
        trained = [self.parts[k] for k in phase.parts if k in self.parts]
        if not len(mine):
            self.g.fill(0)
        elif phase.joined:
            self._learn_joined(ids, mine)
        else:
            for k in phase.parts:
                self._learn_apart(k, ids, mine, labels=epoch == phase.start, counts=k == phase.parts[-1])
        for part in trained:
            self.sums[part.number].backward(part.g, part.g)
        if self.clip > 0 and phase.joined:
            clip_by_global_norm(self.g, self.clip, self._over_parts, self.ops)
        elif self.clip > 0:
            for part in trained:
                clip_by_global_norm(part.g, self.clip, no_sum, self.ops)
        for part in trained:
            part.optimizer.scalars.update({name: self.scalars[name] for name in part.optimizer.scalars})
            part.optimizer.step(part.w, part.g, lr, no_sum)
        for name in self.scalars.keys() & {"steps", "t"}:
            self.scalars[name] += 1

    def _begin(self, phase: Phase, epoch: int) -> None:
        """The preparations of an epoch: fresh optimizers in a new phase, and what is handed over."""
        if epoch == phase.start:
            self._refresh()
        if phase.joined:
            return
        if self.way == "stored" and epoch == phase.start and phase.parts[0] > 0:
            self._hand_over(phase.parts[0] - 1, phase.parts[0])
        elif self.way == "stale" and epoch > phase.start:
            self.handed[...] = self.w
            self._hand_over(0, self.count - 1)

    def _refresh(self) -> None:
        """Begin all optimizers anew: of a part that is done nothing is needed of its own any more."""
        for part in self.parts.values():
            for vector in part.optimizer.vectors.values():
                vector.fill(0)
        if "t" in self.scalars:
            self.scalars["t"] = 0

    def _learn_apart(self, k: int, ids: np.ndarray, mine: np.ndarray, *, labels: bool, counts: bool) -> None:
        """Part k's gradient of its own loss over the samples ids[mine] of a minibatch; `labels` is of `stale`."""
        part, own = self.parts.get(k), ids[mine]
        x = None
        if k == 0 or self.way == "recompute":
            x = self._fetch(self.train, own)
            for before in range(k):
                x = self._pass_on(before, x, len(own))
        if part is None:
            return
        if x is None and (self.way == "labels" or (self.way == "stale" and labels)):
            x = self._labels(part, ids, mine)
        elif x is None:
            x = part.room(len(own))
            part.samples.fetch(own, x)
        loss = part.learn(x, self.dataset.train.labels[own], 1 / len(ids))
        self.macs += part.cost.training() * len(own)
        self.loss_sum += loss * len(ids) * counts

    def _learn_joined(self, ids: np.ndarray, mine: np.ndarray) -> None:
        """All parts' gradients of the last one's loss: outputs go from part to part, their gradients come back."""
        own = ids[mine]
        x, dy = self._fetch(self.train, own), None
        for k in range(self.count - 1):
            x = self._pass_on(k, x, len(own))
        for k in reversed(range(self.count)):
            if k < self.count - 1:
                dy = self._pass_back(k, dy, len(own))
            part = self.parts.get(k)
            if part is None:
                continue
            dx = part.dx[: part.inputs * len(own)].reshape(*part.model.in_shape, -1) if k else None
            if part.last:
                assert x is not None
                loss = part.learn(x, self.dataset.train.labels[own], 1 / len(ids), dx)
                self.loss_sum += loss * len(ids)
                self.macs += part.cost.forward * len(own)
            else:
                assert dy is not None
                part.back(dy, dx)
            self.macs += (part.cost.training(inputs=k > 0) - part.cost.forward) * len(own)
            dy = dx

    def _fetch(self, samples: Resident, ids: np.ndarray) -> np.ndarray | None:
        """The samples, where part 0 is."""
        if 0 not in self.parts:
            return None
        x = self.parts[0].room(len(ids))
        samples.fetch(ids, x)
        return x

    def _labels(self, part: TrainedPart, ids: np.ndarray, mine: np.ndarray) -> np.ndarray:
        """For inputs, the labels of the part before; in `labels` with noise, of the step and not of the row."""
        x = part.room(len(mine))
        part.columns.fetch(self.dataset.train.labels[ids[mine]], x)
        if self.way == "labels":
            all_of = slice(0, part.inputs * len(ids))
            rng = np.random.default_rng([self.seed, NOISE, part.number, int(self.scalars["steps"])])
            part.noise.settle()
            noise = part.noise.host[all_of]
            rng.standard_normal(dtype=self.dtype.type, out=noise)
            noise *= self.noise
            part.noise.push(all_of)
            x += part.noise.array[all_of].reshape(part.inputs, -1)[:, mine[0] : mine[-1] + 1]
        return x

    def _pass_on(self, k: int, x: np.ndarray | None, b: int) -> np.ndarray | None:
        """The outputs (units, b) of part k for its inputs x, where part k + 1 of this row is; elsewhere None."""
        part, after, y = self.parts.get(k), self.parts.get(k + 1), None
        if part is not None:
            assert x is not None
            y = part.forward(x)
            self.macs += part.cost.forward * b
        if part is not None and after is not None:
            return y
        received = None if after is None else after.room(b)
        self.boundaries[k].forward(y, received)
        self.handed_bytes += 0 if y is None else y.nbytes
        return received

    def _pass_back(self, k: int, dx: np.ndarray | None, b: int) -> np.ndarray | None:
        """The gradient of the outputs of part k, where that is, from that of part k + 1's inputs."""
        part, after = self.parts.get(k), self.parts.get(k + 1)
        if part is not None and after is not None:
            return dx
        received = None if part is None else part.objective.cast[: part.units * b].reshape(part.units, b)
        sent = dx if after is not None else None
        self.boundaries[k].backward(sent, received)
        self.handed_bytes += 0 if sent is None else sent.nbytes
        return received

    def _hand_over(self, first: int, last: int) -> None:
        """The parts behind `first` up to `last` store what those before make of all training samples.

        Rows take pieces in turn; in a part, whose rows are to have all of them, the row that received one shares it.
        """
        if first >= last:
            return
        pieces = self.network.evaluation_batches(self.dataset.train.n)
        for number, at in enumerate(pieces):
            # Normalized over samples from all of the file, which may be in the order of the classes.
            mixed = slice(number, None, len(pieces)) if self.network.normalized else at
            ids, row = np.arange(self.dataset.train.n)[mixed], number % self.seats.rows
            x = None
            if row == self.row and first == 0:
                x = self._fetch(self.train, ids)
            elif row == self.row and first in self.parts:
                x = self.parts[first].room(len(ids))
                self.parts[first].samples.fetch(ids, x)
            for k in range(first, last):
                if row == self.row:
                    x = self._pass_on(k, x, len(ids))
                after = self.parts.get(k + 1)
                if after is not None:
                    x = after.room(len(ids)) if x is None else x
                    self.shared[k + 1][row].forward(x, x)
                    after.stored[mixed] = x.T

    def _over_parts(self, values: np.ndarray) -> np.ndarray:
        """Sums over the parts, all rows of which have the same."""
        return self.world.agree(values * (self.row == 0))

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Work that is no part of the training."""
        before = self.macs, self.handed_bytes
        with self.counter.paused():
            yield
        self.macs, self.handed_bytes = before

    def _totals(self) -> tuple[int, int]:
        """MACs and bytes sent from part to part, of all ranks and since the first start."""
        # In two halves: a float64 holds 2^53.
        halves = np.array([divmod(n, 1 << 32) for n in (self.macs, self.handed_bytes)], np.float64)
        (macs, macs_low), (handed, handed_low) = self.world.agree(halves.reshape(-1)).reshape(2, 2).astype(int).tolist()
        return self.past[0] + (macs << 32) + macs_low, self.past[1] + (handed << 32) + handed_low

    def drain(self) -> None:
        self.scalars["macs"], self.scalars["handed_bytes"] = self._totals()

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        """Also makes anew what was handed over, by the same weights and in the same pieces, so to the same bits."""
        if "handed" in fresh:
            self.handed[...] = self.w
        self.past = int(self.scalars["macs"]), int(self.scalars["handed_bytes"])
        if self.scalars["parts"] != self.count:
            raise UserError(
                f"the checkpoint is of {int(self.scalars['parts'])} parts, and this run would have {self.count}: use "
                f"--parts {int(self.scalars['parts'])}"
            )
        steps = int(self.scalars["steps"])
        before = next((k for k, phase in enumerate(self.phases) if (steps - 1) // self.per_epoch < phase.stop), -1)
        if steps and before != self.scalars["phase"]:
            # Other epochs: what was learnt last was another part.
            self._refresh()
        epoch, within = divmod(int(self.scalars["steps"]), self.per_epoch)
        phase = next((phase for phase in self.phases if epoch < phase.stop), None)
        if phase is None or phase.joined:
            return
        with self._uncounted():
            if self.way == "stored":
                # What a phase begins with is handed over by its first step.
                self._hand_over(0, phase.parts[0] - ((epoch, within) == (phase.start, 0)))
            elif self.way == "stale" and epoch > phase.start and within:
                self.g[...] = self.w
                self.w[...] = self.handed
                self._hand_over(0, self.count - 1)
                self.w[...] = self.g

    def test(self) -> dict[str, float]:
        if self.seats.rows > 1:
            verify(self.peers, self.ops.host(self.w), "use another MPI library")
        for part in self.parts.values():
            part.forget()
        batches = self.network.evaluation_batches(self.dataset.test.n)[self.row :: self.seats.rows]
        with self._uncounted():
            sums = evaluate(self.metric, batches, self._test_scores, self.tests.targets, self.ops)
        self._look_at_cuts()
        return self.metric.scores(self.world.agree(sums))

    def _test_scores(self, ids: np.ndarray) -> np.ndarray | None:
        """The scores of test samples where the last part is; looks at the outputs of the others."""
        x = self._fetch(self.tests, ids)
        for k in range(self.count - 1):
            x = self._pass_on(k, x, len(ids))
        for part in self.parts.values():
            if not part.last:
                part.look(self.dataset.test.labels[ids])
        if self.last is None:
            return None
        assert x is not None
        return self.last.forward(x)

    def _look_at_cuts(self) -> None:
        """Put together what the test found at the outputs of all parts but the last."""
        if self.count == 1:
            return
        sums = np.zeros((self.count - 1, 5))
        for k, part in self.parts.items():
            alive = self.peers.agree(part.alive.astype(np.float64))
            if not part.last:
                sums[k] = [*part.found, np.count_nonzero(alive == 0) * (self.row == 0)]
        distance, nearest, solved, samples, dead = self.world.agree(sums).T
        relu = [cut_activation(self.network, behind) == "relu" for _, behind in self.stages[:-1]]
        self.cuts = {
            "target_distance": (distance / samples).tolist(),
            "nearest_accuracy": (nearest / samples).tolist(),
            "least_squares_accuracy": (solved / samples).tolist(),
            "dead_units": [int(n) if can else None for n, can in zip(dead, relu, strict=True)],
        }

    def diagnostics(self) -> dict[str, Any]:
        """The phase, MACs and bytes sent from part to part so far, and what the last test found at the cuts.

        Of each part but the last: mean distance over the scale squared, accuracies read from its outputs, dead units.
        """
        epoch = max(0, int(self.scalars["steps"]) - 1) // self.per_epoch
        phase = next((phase.name for phase in self.phases if epoch < phase.stop), "")
        macs, handed = self._totals()
        return {"phase": phase, "macs": macs, "handed_bytes": handed, **self.cuts}

    def work(self) -> tuple[str, str, int]:
        numbers = sorted(self.parts)
        layers = self.network.layers[self.stages[numbers[0]][0] : self.stages[numbers[-1]][1]]
        names = [layer.name for layer in layers if layer in self.network.linear]
        role = f"part {numbers[0] + 1}" if len(numbers) == 1 else f"parts {numbers[0] + 1} to {numbers[-1] + 1}"
        where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        return role, where, sum(part.w.size for part in self.parts.values())

    def memory(self) -> dict[str, int]:
        saved = self.state.vectors.values() if len(self.parts) > 1 else ()
        more = {
            "weights": nbytes(self.handed),
            "buffers": nbytes(*saved),
            "samples": nbytes(self.train, self.tests),
        }
        return together(*(part.memory() for part in self.parts.values()), more)

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.last.loss.clipped if self.last is not None else 0}
