"""Local SGD: every rank trains a copy of the network on its slices of the minibatches; now and then all are averaged.

Lin et al., "Don't use large mini-batches, use local SGD" (2020). With an outer optimizer it is DiLoCo (Douillard et
al. 2023): the mean change of a round is a gradient, with which Nesterov's momentum steps the weights of its beginning.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.buckets import Bucket, Buckets, check_allreduce
from psmpi.comm.world import several_hosts
from psmpi.config import Config
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
from psmpi.layout import TableRows
from psmpi.methods.base import check_first_order
from psmpi.methods.replica import Replica, no_sum
from psmpi.nn.network import Network
from psmpi.optim import clip_by_global_norm


class LocalSGD(Replica):
    """The method `local_sgd` on one rank.

    Weights and optimizer state are this rank's own between two averages. Checkpoints hold their means, which is what
    is tested too, and, as a row of the tables each, every rank's own: on as many ranks a run goes on as it was.
    """

    lost = "the copies of this many ranks: all of them start from the mean"
    extras = frozenset({"anchor", "outer", "local_steps"})

    def __init__(self, world: Any, network: Network, dataset: Dataset, config: Config, ops: NumpyOps):
        super().__init__(world, network, dataset, config, ops)
        o = config.replicated
        self.every, self.outer_lr, self.beta = o.local_steps, o.outer_lr, o.outer_momentum
        self.scalars["local_steps"] = 0
        self.own = dict(self.state)
        # Of each vector the mean, to be sent and saved.
        self.state = {name: ops.zeros(self.w.size, self.dtype) for name in self.own}
        self.kept = ops.zeros(self.w.size, self.dtype)
        self.outer = (self.outer_lr, self.beta) != (1.0, 0.0)
        if self.outer:
            # The weights at the beginning of the round, and the momentum: the same on all ranks.
            self.anchor, self.momentum = (ops.zeros(self.layout.size, self.dtype) for _ in range(2))
            self.anchor[...] = self.w
            self.state |= {"anchor": self.anchor, "outer": self.momentum}
        self.table_mirrors = {name: ops.mirror(vector) for name, vector in self.own.items()}
        self.tables = {name: mirror.host.reshape(1, -1) for name, mirror in self.table_mirrors.items()}
        self.rows = TableRows.one_each(world.size)
        self._keep()
        across = config.replicated.allreduce == "auto" and world.size > 1 and several_hosts(world)
        whole = [Bucket(0, self.layout.size, 0)]
        self.sum = Buckets(self.world, self.by_host, self.state["weights"], whole, config.replicated.allreduce, across)

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        """UserError for a configuration that `size` ranks cannot train; needs no MPI and no arrays of weights."""
        super().check(size, network, dataset, config)
        o = config.replicated
        check_first_order(config, "has searches and pairs that every rank would make its own")
        check_allreduce(o.allreduce, size)
        if o.local_steps < 1:
            raise UserError(f"--local-steps {o.local_steps}: expected 1 or more steps between two averages")
        if not 0 < o.outer_lr <= 100:
            raise UserError(f"--outer-lr {o.outer_lr}: expected a number above 0, 1 for the mean itself")
        if not 0 <= o.outer_momentum < 1:
            raise UserError(f"--outer-momentum {o.outer_momentum}: expected a number from 0 up to, not including, 1")

    def step(self, batch: Batch, lr: float) -> None:
        share = batch.share(self.rank, self.roles.rows)
        # A last minibatch may leave some ranks without a sample: they take all of it, and every rank steps alike.
        own = share if len(share) else batch
        self.g[self.unused].fill(0)
        self.loss_sum += self.worker.element_losses(own, own) * len(share)
        if self.clip > 0:
            clip_by_global_norm(self.g, self.clip, no_sum, self.ops)
        self.optimizer.step(self.w, self.g, lr, no_sum)
        self.scalars["local_steps"] += 1
        if self.scalars["local_steps"] % self.every == 0:
            self._average()

    def _mean(self, name: str) -> np.ndarray:
        """The mean of a vector over the ranks; it is no part of the training."""
        mean = self.state[name]
        mean[...] = self.own[name]
        self.ops.scale(mean, 1 / self.world.size)
        self.aside.allreduce(mean)
        return mean

    def _average(self) -> None:
        """All ranks go on from the mean of their weights, or from where the outer optimizer's step leads."""
        mean = self.state["weights"]
        mean[...] = self.w
        self.ops.scale(mean, 1 / self.world.size)
        self.sum.finish()
        if not self.outer:
            self.w[...] = mean
            return
        # m = beta m + d; w = anchor - lr (d + beta m), with d = anchor - mean. g is free to hold d.
        change = self.g
        change[...] = self.anchor
        change -= mean
        self.ops.scale(self.momentum, self.beta)
        self.momentum += change
        self.w[...] = self.momentum
        self.ops.scale(self.w, self.beta)
        self.w += change
        self.ops.scale(self.w, self.outer_lr)
        self.anchor -= self.w
        self.w[...] = self.anchor

    def collect(self) -> None:
        for name in self.own:
            self._mean(name)
        super().collect()
        for mirror in self.table_mirrors.values():
            mirror.fetch()
        for mirror in self.table_mirrors.values():
            mirror.wait()

    def resumed(self, tables: bool, fresh: Set[str]) -> None:
        super().resumed(tables, fresh)
        if self.outer and "anchor" in fresh:
            # A round begins where the checkpoint is.
            self.anchor[...] = self.state["weights"]
            self.momentum.fill(0)
        for name, vector in self.own.items():
            if tables:
                self.table_mirrors[name].push()
            else:
                vector[...] = self.state[name]

    def test(self) -> dict[str, float]:
        self.kept[...] = self.w
        mean = self._mean("weights")
        self.verify(mean)
        self.w[...] = mean
        found = super().test()
        self.w[...] = self.kept
        return found

    def memory(self) -> dict[str, int]:
        more = [*self.state.values(), self.kept]
        found = super().memory()
        weights = found["weights"] + sum(v.nbytes for v in more)
        return {**found, "weights": weights, "buffers": found["buffers"] + self.sum.nbytes}
