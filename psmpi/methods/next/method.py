"""In-network training: agents on a graph, each with its own samples, which exchange vectors with neighbours only.

Scardapane and Di Lorenzo, "A framework for parallel and distributed training of neural networks" (2017), and methods
to compare it with. There is no master: an iteration is a gradient over each agent's own samples, and one exchange along
the links of the graph. Checkpoints hold the mean of the agents' weights, which tests evaluate too, and all agents.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np

from psmpi.comm.transfers import Gather, Message
from psmpi.config import Config
from psmpi.data import Batch
from psmpi.errors import UserError
from psmpi.layout import Runs, TableRows, replicate
from psmpi.methods.next.deal import deal_samples
from psmpi.methods.next.exchange import Exchange
from psmpi.methods.next.need import next_needed
from psmpi.methods.next.partial import Inner, Jacobian
from psmpi.methods.next.rules import RULES, Agents, Choco, sent_components
from psmpi.methods.next.settings import (
    CHUNK,
    FIXED,
    Settings,
    check_next,
    check_samples,
    graph_of,
    next_notes,
    next_warnings,
    owners,
)
from psmpi.nn.losses import Loss
from psmpi.nn.model import Model
from psmpi.training.context import Context, configured_loss, configured_optimizer
from psmpi.training.descent import no_sum
from psmpi.training.element_worker import ElementWorker
from psmpi.training.method import Exactness, Method
from psmpi.training.replica import verify
from psmpi.training.rounds import Rounds

# Key of the order of an agent's samples, which separates it from other draws from a seed.
ORDER = 0x6F726472


class InNetwork(Method):
    """In-network training on one rank: its agents, rows of w, g and the rule's vectors, (agents, all parameters)."""

    name = "next"
    summary = "agents on a graph, each with samples of its own"
    settings = (Settings, Rounds)
    exactness = Exactness(options=("--agents", "6", "--model", "mlp", "--widths", "20"))

    def __init__(self, context: Context):
        roles = replicate(context.layout, context.size)
        super().__init__(context, roles.shards)
        s, o, ops, size = context.settings(Settings), context.config, context.ops, context.layout.size
        self.s, self.clip, self.seed = s, o.optimization.clip, o.run.seed
        self.count, self.owners = s.agents, owners(s.agents, context.size)
        own = [agent for agent, rank in enumerate(self.owners) if rank == self.rank]
        self.agents = range(own[0], own[-1] + 1)
        if s.private_data:
            check_samples(context.network, context.dataset, o, len(own))
            self.samples = deal_samples(context.dataset, len(own), s.split, self.seed)
        else:
            dealt = deal_samples(context.dataset, s.agents, s.split, self.seed)
            self.samples = [dealt[agent] for agent in self.agents]
        # Weight of each agent's mean loss, by its number of samples: the mean over agents is the loss of all samples.
        self.factors = [s.agents * len(ids) / context.dataset.train.n for ids in self.samples]
        self.steps_per_epoch = -(-context.dataset.train.n // o.data.batch_size)
        self.chunk = max(o.data.batch_size, CHUNK)
        self.order: tuple[int, list[np.ndarray]] = (-1, [])
        all_weights = Runs(((0, size),))
        self.all_weights = all_weights
        self.uncounted = context.uncounted()
        self.w, self.g = self._rows(), self._rows()
        # Arrays of a pass: the weights of an agent, or their mean, and the gradient of a minibatch.
        self.x, self.dx = ops.zeros(size, self.dtype), ops.zeros(size, self.dtype)
        # With private data, a rank tests all test samples of its data set.
        tested, number = (replicate(context.layout, 1), 0) if s.private_data else (roles, self.rank)
        used, place = tested.parts[number].inside(all_weights), tested.workers[number]
        assert used is not None and place is not None
        self.worker = ElementWorker(
            context, place, tested, context.group([self.rank]), self.x[used], self.dx[used],
            samples=np.sort(np.concatenate(self.samples)),
        )  # fmt: skip
        self._declare(all_weights)
        group = context.group()
        sparse = isinstance(self.rule, Choco)
        self.mixed = self.rule.near if isinstance(self.rule, Choco) else self._rows(self.rule.sent)
        sent = 2 * sent_components(size, s.gossip_density) if sparse else self.rule.sent * size
        room = ops.zeros(len(self.agents) * sent, self.dtype)
        self.sent = (
            room.reshape(len(self.agents), -1) if sparse else room.reshape(len(self.agents), self.rule.sent, size)
        )
        graph = graph_of(s)
        self.links = crc32(np.array(graph.links, np.int64).tobytes())
        if not self.uncounted.same_bits(np.array([self.links])):
            raise UserError(f"--graph {s.graph}: the file is not the same on all hosts: copy one to all of them")
        self.scalars["graph"] = self.links
        self.exchange = Exchange(group, graph, self.owners, self.sent, self.dtype, ops)
        self.period_of_exchange = context.settings(Rounds).local_steps if s.rule == "kgt" else 1
        context.put_weights(all_weights, self.x)
        self._spread()
        self.account.hold("gradients", self.g, self.dx)
        self.account.hold("weights", self.mixed)
        self.account.ask("buffers", lambda: (self.exchange.sent, self.exchange.room))
        self.account.include(self.worker.memory)
        self.measured: dict[str, Any] = {}

    check, needed = staticmethod(check_next), staticmethod(next_needed)
    notes, warnings = staticmethod(next_notes), staticmethod(next_warnings)

    @classmethod
    def private(cls, config: Config) -> bool:
        return config.of(Settings).private_data

    def _rows(self, each: int = 1) -> np.ndarray:
        """Return zeros (agents of this rank, all parameters), or (agents of this rank, each, all parameters)."""
        zeros = self.ops.zeros(len(self.agents) * each * self.layout.size, self.dtype)
        shape = (len(self.agents), self.layout.size) if each == 1 else (len(self.agents), each, self.layout.size)
        return zeros.reshape(shape)

    def _declare(self, all_weights: Runs) -> None:
        """Declare the state: the mean of the weights, and all vectors of each agent as rows of tables."""
        size, shard = self.layout.size, next(iter(self.shards[self.rank].intervals), (0, 0))
        share = self.x[slice(*shard)]
        self.whole = Gather(self.uncounted, self.shards.runs, all_weights, self.dtype)
        self.state.vector("weights", share, after=partial(self.whole.forward, share, self.x))
        self.account.hold("weights", self.x)
        optimizer = configured_optimizer(
            self.context.config, self.layout, Runs(((0, len(self.agents) * size),)), self.ops
        )
        self.optimizer, self.state.scalars = optimizer, optimizer.scalars
        self.account.ask("optimizer", lambda: optimizer.arrays)
        self.unstepped = dict(optimizer.scalars)
        # Steps of the run, and a checksum of the graph to which the agents' memories of each other belong.
        self.state.scalars["steps"] = 0
        self.state.scalar("graph", 0)
        self.inner = self._inner() if self.s.linearization == "partial" else None
        agents = Agents(
            self.ops, self.w, self.g, self._rows, optimizer, self.state.scalar, self.state.scalars, self.s,
            None if self.inner is None else self._minimum,
        )  # fmt: skip
        self.rule = RULES[self.s.rule](agents)
        tables = {"weights": self.w, **self.rule.vectors}
        tables.update({name: vector.reshape(-1, size) for name, vector in optimizer.vectors.items()})
        for name, table in tables.items():
            self.state.table(name, table)
        rows = [tuple(a for a, owner in enumerate(self.owners) if owner == r) for r in range(self.context.size)]
        self.state.rows = TableRows(tuple(rows))
        self.state.not_restored = "the weights of these agents: all of them start from the mean"

    def _inner(self) -> Inner:
        """Make the solver of convex models that linearise only the network."""
        context = self.context
        model = Model(context.network, self.layout, self.x, self.dx, self.ops)
        jacobian = Jacobian(model, self.worker.train, int(np.prod(context.dataset.shape)))
        parts = 1 if self.s.tracking == "full" else self.steps_per_epoch
        jacobian.reserve(max(-(-len(ids) // parts) for ids in self.samples))

        def loss() -> Loss:
            lenient = configured_loss(context.config, context.dataset)
            lenient.lenient = True
            return lenient

        self.account.hold("buffers", jacobian.rows)
        return Inner(jacobian, loss, self.s.terms, self.s.tau, self.s.inner_blocks, self.ops.threads)

    def _minimum(self, own: int, w: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the minimum (all parameters,) of an agent's convex model at the weights of its last gradient."""
        assert self.inner is not None
        ids = self._ids(own, int(self.scalars["steps"]))
        self.x[...] = w
        host, targets = self.ops.host, self.context.dataset.train.targets[ids]
        if self.context.dataset.task != "classes":
            targets = targets.T
        scale = self.factors[own] / (self.count * len(ids))
        w, y = np.asarray(host(w), np.float64), np.asarray(host(y), np.float64)
        minimum: np.ndarray = self.ops.put(self.inner.solve(ids, targets, scale, w, y).astype(self.dtype))
        return minimum

    def _spread(self) -> None:
        """Set the weights of all agents to x, and reset the rule."""
        self.w[...] = self.x
        self.rule.begin()

    def step(self, batch: Batch, lr: float) -> None:
        iteration = int(self.scalars["steps"])
        for own, factor in enumerate(self.factors):
            self.loss_sum += self._gradient(own, iteration) * factor * len(batch) / self.count
        due = (iteration + 1) % self.period_of_exchange == 0
        if due or self.s.rule == "kgt":
            self.rule.move(self.sent if due else None, lr)
        if due:
            self.exchange.run(iteration)
            if isinstance(self.rule, Choco):
                self.exchange.add_sparse(self.rule.near)
            else:
                self.exchange.mix(self.mixed)
            self.rule.take(self.mixed.reshape(len(self.agents), -1, self.layout.size), lr)
        self.scalars["steps"] = iteration + 1

    def _gradient(self, own: int, iteration: int) -> float:
        """Fill row `own` of g with the gradient of an agent's samples; return their mean loss."""
        g, ids = self.g[own], self._ids(own, iteration)
        self.x[...] = self.w[own]
        g.fill(0)
        loss = 0.0
        for some in map(Batch, np.array_split(ids, -(-len(ids) // self.chunk))):
            share = len(some) / len(ids)
            loss += share * self.worker.element_losses(some, some)
            self.ops.combine(g, (1.0, g), (share * self.factors[own], self.dx))
        self.numbers.sound(self.ops, loss, [(g, self.all_weights)], self.layout, len(ids))
        if self.clip > 0:
            self.numbers.clip(g, self.clip, no_sum, self.ops, self.layout, self.all_weights)
        return loss

    def _ids(self, own: int, iteration: int) -> np.ndarray:
        """Return the samples of an agent's gradient: all, or its share of a minibatch."""
        if self.s.tracking == "full":
            return self.samples[own]
        epoch, step = divmod(iteration, self.steps_per_epoch)
        if self.order[0] != epoch:
            rngs = (np.random.default_rng([self.seed, ORDER, agent, epoch]) for agent in self.agents)
            shuffled = [rng.permutation(ids) for rng, ids in zip(rngs, self.samples, strict=True)]
            self.order = epoch, shuffled
        return np.array_split(self.order[1][own], self.steps_per_epoch)[step]

    @property
    def period(self) -> int:
        return self.period_of_exchange

    def messages(self, step: int, batch: int) -> list[Message]:
        return self.exchange.messages(step) if (step + 1) % self.period_of_exchange == 0 else []

    def drain(self) -> None:
        """Set x to the mean of all agents' weights."""
        self.x.fill(0)
        for row in self.w:
            self.ops.combine(self.x, (1.0, self.x), (1 / self.count, row))
        self.uncounted.allreduce(self.x)

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        if not tables:
            for vector in self.optimizer.vectors.values():
                vector.fill(0)
            self.scalars.update(self.unstepped)
            self._spread()
        elif self.s.rule == "next":
            # The constraint set may have changed.
            for w in self.w:
                self.s.terms.project(self.ops, w)
        elif self.s.rule in FIXED and self.scalars["graph"] != self.links:
            # The agents' memories belong to other links.
            self.rule.begin()
        self.scalars["graph"] = self.links

    def test(self) -> dict[str, float]:
        """Return the scores of the mean of the agents' weights; measure those of every agent, see `diagnostics`."""
        self.drain()
        verify(self.uncounted, self.ops.host(self.x), "use another MPI library")
        scores = self.worker.metric.scores(self.uncounted.agree(self.worker.test()))
        self.measured = self._distances()
        agent_scores = []
        for agent, rank in enumerate(self.owners):
            if rank == self.rank:
                self.x[...] = self.w[agent - self.agents[0]]
            self.uncounted.bcast(self.x, rank)
            agent_scores.append(self.worker.metric.scores(self.uncounted.agree(self.worker.test())))
        for name in agent_scores[0]:
            values = [one[name] for one in agent_scores]
            self.measured[f"agents_{name}"] = values
            worst = max(values) if name in ("loss", "rmse") else min(values)
            self.measured[f"worst_{name}"], self.measured[f"mean_{name}"] = worst, float(np.mean(values))
        return scores

    def _distances(self) -> dict[str, Any]:
        """Return the largest distance of an agent from the mean x, and the error of the mean tracked gradient."""
        far = np.zeros(len(self.owners))
        for own, row in enumerate(self.w):
            self.ops.combine(self.dx, (1.0, row), (-1.0, self.x))
            far[self.agents[own]] = float(np.sqrt(self.ops.squared_norm(self.dx)))
        distances = {"disagreement": float(self.uncounted.agree(far).max())}
        if self.rule.tracked:
            # After an exchange, trackers still belong to the last gradients.
            total = np.zeros(self.dx.size)
            for y, g in zip(self.rule.vectors[self.rule.tracked], self.rule.vectors["gradient"], strict=True):
                self.ops.combine(self.dx, (1.0, y), (-1.0, g))
                total += self.ops.host(self.dx)
            total /= self.count
            distances["tracking_error"] = float(np.abs(self.uncounted.agree(total)).max())
        return distances

    def diagnostics(self) -> dict[str, Any]:
        """Return the graph's spectral gap, the agents' distances, and the agents' last scores, with worst and mean."""
        return {"spectral_gap": graph_of(self.s).gap, **self.measured}

    def work(self) -> tuple[str, str, int]:
        role = f"agent {self.agents[0]}" if len(self.agents) == 1 else f"agents {self.agents[0]} to {self.agents[-1]}"
        return role, f"{sum(map(len, self.samples)):,} samples", self.layout.size

    def events(self) -> dict[str, int]:
        return {"psl_terms_past_exp_clip": self.worker.loss.clipped}
