"""Partially-separable training: each worker computes its element losses, and the owners step the weights.

Raynaud, Orban, Bigeon, "Partially-separable loss to parallelize partitioned neural network training" (G-2023-36). One
step: weights out to the parts, forward, sums over classes along the replica row (partition `scores` only), backward,
gradients back to the shards, optimizer.
"""

from __future__ import annotations

from collections.abc import Set
from math import inf, isfinite

import numpy as np

from psmpi.comm.bridge import Bridge
from psmpi.comm.transfers import Exchange, Message, Step
from psmpi.data import Batch
from psmpi.data.names import listed
from psmpi.methods.psl.newton import PartitionedNewton
from psmpi.methods.psl.plan import (
    Settings,
    check_psl,
    element_rows,
    make_plan,
    other_placements,
    psl_needed,
    trunk_notes,
)
from psmpi.nn.finite import spans
from psmpi.nn.tiles import TiledObjective
from psmpi.optim.curvature import RULES
from psmpi.optim.first_order import FirstOrder
from psmpi.training.context import Context
from psmpi.training.descent import Descent
from psmpi.training.element_worker import ElementWorker
from psmpi.training.masters import Masters
from psmpi.training.method import Method
from psmpi.training.remembered import Remembered

# Scalars of optimizers that count steps in which the weights stayed.
FAILURES = ("failed_searches", "failed_steps")


class PartiallySeparable(Method):
    """Partially-separable training on one rank: a shard to step, a part to compute with, and their exchange."""

    name = "psl"
    summary = "partially-separable loss, class subnetworks on ranks"
    settings = (Settings, Masters)
    nccl = True
    partitioned = skips = remembers = weighs_classes = True
    sequences = "labels"

    def __init__(self, context: Context):
        plan = make_plan(context.network, context.size, context.config)
        self.roles = plan.roles
        super().__init__(context, self.roles.shards)
        nccl, shard = context.config.parallel.nccl, self.shards[self.rank]
        self.exchange = Exchange(context.world, self.roles, self.counter, self.dtype, self.ops, context.bridge)
        self.w_part, self.w = self.exchange.make_vectors()
        self.g_part, self.g = self.exchange.make_vectors()
        self.account.hold("weights", self.w_part)
        self.account.hold("gradients", self.g_part, self.g)
        context.put_weights(shard, self.w)
        self.world = context.group()
        # The global sums concern the ranks that hold weights; with a line search, all ranks follow its decisions.
        holders = [rank for rank, held in enumerate(self.shards) if held.size]
        self.descent = Descent(context, shard, allsum=self.allsum, world=self.world)
        self.optimizer = self.descent.optimizer
        self.deciders = self.world if self.optimizer.needs_closure else context.group(holders)
        # Several ranks may hold a private block; a global sum counts the block once, at its owner of record.
        self.counts = self.shards.record[self.rank] == shard
        self.metric = context.metric()
        self.worker: ElementWorker | None = None
        place = self.roles.workers[self.rank]
        if place is not None:
            row = context.group(self.roles.row(self.rank), nccl=True)
            self.worker = ElementWorker(context, place, self.roles, row, self.w_part, self.g_part, trunk=plan.trunk)
            self.account.include(self.worker.memory)
        if nccl:
            self.exchange.use_nccl(self.ops.stream)
        self.state.vector("weights", self.w)
        self.state.optimizer(self.optimizer)
        # Slice of the shard with the tail's weights, if they are stepped tile by tile.
        self.early: slice | None = None
        objective = self.worker.objective if self.worker is not None else None
        if isinstance(objective, TiledObjective) and isinstance(self.optimizer, FirstOrder):
            self.early = self._stepped_in_tiles(objective, self.optimizer)
        self.remembered: Remembered | None = None
        if context.config.objective.psl_weights == "remembered":
            self._remember()
        self.newton: PartitionedNewton | None = None
        if context.config.optimization.optimizer in RULES:
            self.newton = PartitionedNewton(
                context, self.state, self.world, self.exchange, self.worker, self.w_part, self.w
            )
            self.state.rows = element_rows(self.roles, context.config.optimization.merge_pairs)
            self.state.not_restored = "the curvature of these elements: it starts afresh"
            # From here on, workers repeat the steps of the owners, and no weights are sent.
            self.exchange.forward(self.w, self.w_part)
        self.failed_before: dict[str, float | int] = {}
        self.lr = 0.0

    check, needed = staticmethod(check_psl), staticmethod(psl_needed)
    arrangements = classmethod(other_placements)
    notes = staticmethod(trunk_notes)

    def _remember(self) -> None:
        """Make the state that the loss remembers of each sample, on all workers."""
        workers = [rank for rank, place in enumerate(self.roles.workers) if place is not None]
        group = self.context.group(workers, bridge=Bridge()) if self.worker is not None else None
        samples, size = self.dataset.train.n, self.context.size
        self.remembered = Remembered(group, workers, size, samples, self.dtype, self.state)
        # Steps so far: at the end of an epoch, workers exchange what they remember of samples.
        self.state.scalar("steps", 0)
        self.steps_per_epoch = -(-samples // self.context.config.data.batch_size)
        if self.worker is not None:
            self.worker.remembered = self.remembered

    def _ends_epoch(self, step: int) -> bool:
        return self.remembered is not None and (step + 1) % self.steps_per_epoch == 0

    def allsum(self, values: np.ndarray) -> np.ndarray:
        """Sum `values` (k,) float64 over the shards, in place; return them, the same on all ranks that take part."""
        if not self.counts:
            values.fill(0)
        # Ranks without a shard need no sums of first-order steps.
        return self.deciders.agree(values) if self.deciders.rank >= 0 else values

    def _stepped_in_tiles(self, objective: TiledObjective, optimizer: FirstOrder) -> slice | None:
        """Let the objective step the tail's weights tile by tile, as it computes gradients; return their slice.

        Return None if a step needs the whole gradient before. It does not if this rank owns all of these weights, no
        other rank adds to their gradients, no norm of the gradient is needed, no step may be skipped, and the loss is
        `immediate`.
        """
        inside, tail = self.exchange.inside, objective.tail
        needs_no_sum = self.roles.rows == 1 and self.descent.clip == 0 and self.numbers.mode == "stop"
        if (
            inside is None
            or not (needs_no_sum and objective.loss.immediate and tail.in_rows)
            or optimizer.needs_matrices
        ):
            return None
        rows = tail.run(0, tail.classes)
        if rows.start < inside.start or rows.stop > inside.stop or not self.counts:
            return None
        shift = inside.start
        objective.step_in_tiles(
            lambda at, g: optimizer.step_piece(self.w, g, self.lr, slice(at.start - shift, at.stop - shift))
        )
        return slice(rows.start - shift, rows.stop - shift)

    def _step_in_tiles(self, optimizer: FirstOrder, early: slice, batch: Batch, lr: float) -> float:
        """Make a step without an array for the gradient of the tail; return this rank's share of the loss."""
        self.lr = lr
        optimizer.begin()
        loss = self.gradient(batch)
        for at in (slice(0, early.start), slice(early.stop, self.w.size)):
            optimizer.step_piece(self.w, self.g[at], lr, at)
        return loss

    def step(self, batch: Batch, lr: float) -> None:
        if self.newton is not None:
            loss = self.newton.step(batch, lr)
        elif self.early is not None and isinstance(self.optimizer, FirstOrder):
            loss = self._step_in_tiles(self.optimizer, self.early, batch, lr)
        else:
            loss = self.descent.search(self.w, self.g, lr, lambda trial: self.gradient(batch, trial))
        self.loss_sum += loss * len(batch)
        if self.remembered is not None:
            self.remembered.visit(batch.ids, self.numbers.in_row == 0)
            if self._ends_epoch(int(self.scalars["steps"])):
                self.remembered.settle()
            self.scalars["steps"] += 1

    def drain(self) -> None:
        if self.remembered is not None:
            self.remembered.drain()

    def gradient(self, batch: Batch, trial: bool = False) -> float:
        """Fill g (shard,) with the gradient of the mean loss over `batch`; return this rank's share of that loss.

        Raise FloatingPointError for a loss that is not finite; a `trial` of a line search returns infinity instead.
        """
        self.exchange.forward(self.w, self.w_part)
        loss = 0.0
        if self.worker is not None:
            try:
                loss = self.worker.element_losses(batch)
            except FloatingPointError:
                if not trial:
                    raise
                loss = inf
            if trial and not isfinite(loss):
                # Other ranks of the row may have finite losses, and wait for this rank's share.
                self.g_part.fill(0)
                loss = inf
        self.exchange.backward(self.g_part, self.g)
        return loss

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        self.failed_before = {name: self.scalars[name] for name in FAILURES if name in self.scalars}
        if self.newton is not None:
            self.newton.restored()
        if self.remembered is not None:
            self.remembered.restored()

    def test(self) -> dict[str, float]:
        # Owners have stepped the weights since they last sent them.
        self.exchange.forward(self.w, self.w_part)
        self.exchange.verify(self.w)
        share = self.worker.test() if self.worker is not None else self.metric.zeros()
        return self.metric.scores(self.world.agree(share))

    def messages(self, step: int, batch: int) -> list[Message] | None:
        if self.optimizer.needs_closure:
            return None
        messages = [*self.exchange.messages(Step(batch)), *self.exchange.messages(Step(batch), back=True)]
        if self.remembered is not None and self._ends_epoch(step):
            messages += self.remembered.messages()
        return messages + (self.worker.messages(batch) if self.worker is not None else [])

    def work(self) -> tuple[str, str, int]:
        worker = self.roles.workers[self.rank]
        roles = ["master"] * (self.rank < self.roles.masters) + ["worker"] * (worker is not None)
        names = self.context.dataset.train.names
        called = [] if worker is None else [names[c] for c in worker.classes] if names else [spans(worker.classes)]
        classes = listed(called, 3)
        if worker is not None and self.roles.rows > 1:
            classes += f" (row {worker.row})"
        return "+".join(roles), classes, self.w_part.size

    def events(self) -> dict[str, int]:
        clipped = self.worker.loss.clipped if self.worker is not None else 0
        # Scalars are the same on all ranks, so rank 0 counts them; a resumed run counts from its beginning.
        failed = {
            f"optimizer_{name}": int(self.scalars[name] - self.failed_before.get(name, 0)) * (self.rank == 0)
            for name in FAILURES
            if name in self.scalars
        }
        return {
            "psl_terms_past_exp_clip": clipped,
            **failed,
            **(self.newton.events() if self.newton is not None else {}),
        }
