"""Local SGD: every rank trains a copy of the network on its slices of the minibatches; all-reduces average the copies.

Lin et al., "Don't use large mini-batches, use local SGD" (2020). With an outer optimizer the method is DiLoCo
(Douillard et al. 2023): Nesterov's momentum takes the mean change of a round as a gradient, and steps the weights from
the start of the round.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import ClassVar

from psmpi.comm.buckets import Bucket, Buckets
from psmpi.comm.transfers import Message
from psmpi.config import Config
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
from psmpi.nn.network import Network
from psmpi.training.context import Context
from psmpi.training.copies import Copies
from psmpi.training.replica import Sums
from psmpi.training.rounds import Rounds, check_rounds


@dataclass(frozen=True)
class Settings:
    """Local SGD (local_sgd)."""

    table: ClassVar[str] = "local_sgd"
    results: ClassVar[bool] = True

    outer_lr: float = 1.0
    """Learning rate of the outer optimizer. 1 without momentum is the mean of the weights. DiLoCo uses 0.7."""
    outer_momentum: float = 0.0
    """Nesterov momentum of the outer optimizer; 0: none. DiLoCo uses 0.9."""


class LocalSGD(Copies):
    """Local SGD on one rank. Averages replace the weights; the optimizer state stays that of the rank."""

    name = "local_sgd"
    summary = "whole network on every rank, weights averaged in rounds"
    settings = (Settings, Rounds, Sums)
    weighs_classes = True
    exactness = replace(Copies.exactness, options=(*Copies.exactness.options, "--local-steps", "4"))

    def __init__(self, context: Context):
        super().__init__(context)
        o, self.every = context.settings(Settings), context.settings(Rounds).local_steps
        self.outer_lr, self.beta = o.outer_lr, o.outer_momentum
        self.state.scalar("local_steps", 0)
        self.outer = (self.outer_lr, self.beta) != (1.0, 0.0)
        if self.outer:
            # Weights at the start of the round, and the outer momentum: the same on all ranks.
            self.anchor, self.momentum = (self.ops.zeros(self.w.size, self.dtype) for _ in range(2))
            self.anchor[...] = self.w
            self.keep("anchor", self.anchor, own=True)
            self.keep("outer", self.momentum, own=True)
        how, whole = context.settings(Sums).allreduce, [Bucket(0, self.layout.size, 0)]
        self.sum = Buckets(self.world, self.by_host, self.means["weights"], whole, how, self.own_sums)
        self.account.hold("buffers", self.sum)

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        super().check(size, network, dataset, config)
        check_rounds(config, "between two averages")
        o = config.of(Settings)
        if not 0 < o.outer_lr <= 100:
            raise UserError(f"--outer-lr {o.outer_lr}: expected a number above 0 and up to 100; 1 is the mean")
        if not 0 <= o.outer_momentum < 1:
            raise UserError(f"--outer-momentum {o.outer_momentum}: expected a number from 0 up to, not including, 1")

    def step(self, batch: Batch, lr: float) -> None:
        self.train(batch, lr)
        self.scalars["local_steps"] += 1
        if self.scalars["local_steps"] % self.every == 0:
            self._average()

    def _average(self) -> None:
        """Set the weights of all ranks to their mean, or to the result of the outer optimizer's step."""
        mean = self.means["weights"]
        mean[...] = self.w
        self.ops.scale(mean, 1 / self.world.size)
        self.sum.finish()
        if not self.outer:
            self.w[...] = mean
            return
        # m = beta m + d; w = anchor - lr (d + beta m), with d = anchor - mean. The gradient's buffer holds d.
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

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        if self.outer and "anchor" in fresh:
            # The checkpoint's mean is the start of the next round.
            self.anchor[...] = self.means["weights"]
            self.momentum.fill(0)
        super().restored(tables, fresh)

    @property
    def period(self) -> int:
        return self.every

    def messages(self, step: int, batch: int) -> list[Message]:
        return self.sum.messages() if (step + 1) % self.every == 0 else []
