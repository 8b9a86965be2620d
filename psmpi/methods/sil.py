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

from psmpi.backend import NumpyOps
from psmpi.comm.group import Counter, Group
from psmpi.comm.probe import make_bridge
from psmpi.comm.transfers import Boundary, Spread, Sum
from psmpi.config import Config
from psmpi.data import Batch, Dataset, Resident
from psmpi.errors import UserError
from psmpi.layout import Ownership, Runs, TableRows
from psmpi.methods.base import Place, make_metric
from psmpi.methods.layer_part import TrainedPart
from psmpi.methods.replica import no_sum, verify
from psmpi.methods.sil_plan import Phase, Seats, check_sil, count_parts, cut_activation, plan_phases, warnings
from psmpi.nn.cut import split_layers
from psmpi.nn.network import Network
from psmpi.optim import clip_by_global_norm

# Keeps the noise on labels apart from all else drawn from their seed.
NOISE = 0x6E6F6973


class SyntheticLabels:
    """The method `sil` on one rank: one or more parts, the weights and optimizer state of these alone.

    parts: this rank's, by number from 0. With several ranks a part these are its rows, each of which takes its slice of
    each minibatch and sends to the same row of the next part.
    """

    lost = ""
    # Counts; and of `stale`, the weights that made what was handed over last.
    extras = frozenset({"handed", "macs", "handed_bytes", "parts", "phase"})

    def __init__(self, world: Any, network: Network, dataset: Dataset, config: Config, ops: NumpyOps):
        s = config.synthetic
        self.network, self.layout, self.dataset, self.ops = network, network.layout(), dataset, ops
        self.dtype, self.clip, self.way = np.dtype(config.model.dtype), config.optimization.clip, s.hand_over
        self.seed, self.noise, self.rank = s.labels_seed, s.labels_noise * s.labels_scale, world.rank
        self.count = count_parts(world.size, network, s.parts)
        self.phases = plan_phases(self.count, config.run.epochs, s)
        self.per_epoch = -(-dataset.train.n // config.data.batch_size)
        self.counter, self.rows = Counter(), TableRows()
        self.tables: dict[str, np.ndarray] = {}
        self.seats = Seats(world.size, self.count)
        self.row, held = world.rank % self.seats.rows, self.seats.held(world.rank)
        bridge = make_bridge(world, ops, config.parallel.gpu_aware)
        self.world = Group(world, range(world.size), self.counter, bridge)
        peers = [self.seats.rank(held[0], row) for row in range(self.seats.rows)]
        self.peers = Group(world, peers, self.counter, bridge)
        if config.parallel.nccl:
            self.peers.use_nccl(ops.stream)
        self.stages = split_layers(network, self.count)
        runs = [network.runs(self.layout, *stage) for stage in self.stages]
        # All rows of a part have its shard; checkpoints are written by the first.
        self.shards = Ownership(
            tuple(
                Runs.union(one for k in self.seats.held(rank) for one in runs[k].intervals)
                for rank in range(world.size)
            )
        )
        self.w, self.g = (ops.zeros(self.shards[world.rank].size, self.dtype) for _ in range(2))
        ends = np.cumsum([0, *(runs[k].size for k in held)]).tolist()
        places = {k: slice(a, b) for k, (a, b) in zip(held, pairwise(ends), strict=True)}
        self.parts = {
            k: TrainedPart(k, self.stages[k], self.w[at], self.g[at], network, self.layout, dataset, config, ops)
            for k, at in places.items()
        }
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
        self.metric = make_metric(config, dataset)
        train, tests = np.arange(dataset.train.n), np.arange(dataset.test.n)
        mine = [tests[at] for at in network.evaluation_batches(dataset.test.n)[self.row :: self.seats.rows]]
        if 0 not in held:
            train, mine = train[:0], []
        self.train = Resident(dataset.train, train, self.dtype, ops)
        self.tests = Resident(dataset.test, np.concatenate([tests[:0], *mine]), self.dtype, ops)
        first = self.parts[held[0]].optimizer
        # MACs, and bytes sent from part to part: all ranks' up to the last checkpoint, and this rank's since the start.
        # What the run was planned to be: see `resumed`.
        self.scalars: dict[str, float | int] = {
            "steps": 0, "macs": 0, "handed_bytes": 0, "parts": self.count, "phase": 0, **first.scalars
        }  # fmt: skip
        self.past, self.macs, self.handed_bytes = (0, 0), 0, 0
        self.handed = ops.empty(self.w.size if self.way == "stale" else 0, self.dtype)
        # Vectors by name and part.
        own = {"weights": {k: part.w for k, part in self.parts.items()}}
        for name in first.vectors:
            own[name] = {k: part.optimizer.vectors[name] for k, part in self.parts.items()}
        if self.way == "stale":
            self.handed[...] = self.w
            own["handed"] = {k: self.handed[at] for k, at in places.items()}
        self.mirrors = {name: {k: ops.mirror(vector) for k, vector in of.items()} for name, of in own.items()}
        # A single part lies as in the shard; of several the runs of one may be between those of another.
        self.vectors = {
            name: next(iter(of.values())).host if len(of) == 1 else np.empty(self.w.size, self.dtype)
            for name, of in self.mirrors.items()
        }
        self._merge()
        self.loss_sum = 0.0
        self.cuts: dict[str, Any] = {}

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
        before = self.counter.sent, self.counter.received, self.macs, self.handed_bytes
        yield
        self.counter.sent, self.counter.received, self.macs, self.handed_bytes = before

    def _totals(self) -> tuple[int, int]:
        """MACs and bytes sent from part to part, of all ranks and since the first start."""
        # In two halves: a float64 holds 2^53.
        halves = np.array([divmod(n, 1 << 32) for n in (self.macs, self.handed_bytes)], np.float64)
        (macs, macs_low), (handed, handed_low) = self.world.agree(halves.reshape(-1)).reshape(2, 2).astype(int).tolist()
        return self.past[0] + (macs << 32) + macs_low, self.past[1] + (handed << 32) + handed_low

    def _spread(self) -> Iterator[tuple[str, slice, int, slice]]:
        """The places of the parts' vectors in the shard: (name, place there, part, place in the part's)."""
        shard = self.shards[self.rank]
        for name, of in self.mirrors.items():
            for k in of if len(of) > 1 else ():
                for a, b in self.parts[k].runs.intervals:
                    yield name, shard.local(a, b), k, self.parts[k].runs.local(a, b)

    def _merge(self) -> None:
        """Bring `vectors` up to date, several parts' in the places of the shard."""
        mirrors = [mirror for of in self.mirrors.values() for mirror in of.values()]
        for mirror in mirrors:
            mirror.fetch()
        for mirror in mirrors:
            mirror.wait()
        for name, there, k, here in self._spread():
            self.vectors[name][there] = self.mirrors[name][k].host[here]

    def collect(self) -> None:
        self._merge()
        self.scalars["macs"], self.scalars["handed_bytes"] = self._totals()

    def resumed(self, tables: bool, fresh: Set[str]) -> None:
        """Also makes anew what was handed over, by the same weights and in the same pieces, so to the same bits."""
        for name, there, k, here in self._spread():
            self.mirrors[name][k].host[here] = self.vectors[name][there]
        for of in self.mirrors.values():
            for mirror in of.values():
                mirror.push()
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
        totals, labels = self.metric.zeros(), self.dataset.test.labels
        for part in self.parts.values():
            part.forget()
        with self._uncounted():
            for at in self.network.evaluation_batches(len(labels))[self.row :: self.seats.rows]:
                ids = np.arange(at.start, at.stop)
                x = self._fetch(self.tests, ids)
                for k in range(self.count - 1):
                    x = self._pass_on(k, x, len(ids))
                for part in self.parts.values():
                    if not part.last:
                        part.look(labels[ids])
                if self.last is not None:
                    assert x is not None
                    totals += self.metric.sums(self.ops.host(self.last.forward(x)), labels[ids])
        self._look_at_cuts()
        return self.metric.scores(self.world.agree(totals))

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

    def place(self) -> Place:
        numbers, held = sorted(self.parts), sum(part.w.size for part in self.parts.values())
        layers = self.network.layers[self.stages[numbers[0]][0] : self.stages[numbers[-1]][1]]
        names = [layer.name for layer in layers if layer in self.network.linear]
        role = f"part {numbers[0] + 1}" if len(numbers) == 1 else f"parts {numbers[0] + 1} to {numbers[-1] + 1}"
        where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        return Place(role, where, held, held, sum(self.memory().values()), self.ops.place)

    def memory(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for part in self.parts.values():
            found = {what: found.get(what, 0) + n for what, n in part.memory().items()}
        more = sum(v.nbytes for v in self.vectors.values()) if len(self.parts) > 1 else 0
        found["weights"] += self.handed.nbytes
        found["buffers"] += more
        found["samples"] += self.train.nbytes + self.tests.nbytes
        return found

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.last.loss.clipped if self.last is not None else 0}
