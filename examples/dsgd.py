"""Decentralised SGD on a ring, as a training method outside the package.

Lian et al., "Can decentralized algorithms outperform centralized algorithms?" (2017): each rank steps a copy of the
network, and averages it with the copies of its neighbours.

Run: mpirun -n 2 python examples/dsgd.py train --method dsgd     (20 s)"""

from dataclasses import dataclass
from typing import ClassVar

import psmpi.command
from psmpi.comm.transfers import Neighbours, Step
from psmpi.errors import UserError
from psmpi.registry import METHODS
from psmpi.training.copies import Copies


@dataclass(frozen=True)
class Settings:
    """Decentralised SGD on a ring (dsgd)."""

    table: ClassVar[str] = "dsgd"
    results: ClassVar[bool] = True

    self_weight: float = 1 / 3
    """Weight of a rank's own parameters in the average with its neighbours, who share the rest."""


@METHODS.register("dsgd")
class RingSGD(Copies):
    """The method on one rank."""

    summary = "decentralised SGD: each rank averages its copy with the copies of its neighbours on a ring"
    settings = (Settings,)

    def __init__(self, context):
        super().__init__(context)
        size, self_weight = context.size, context.settings(Settings).self_weight
        ring = {(rank, (rank + step) % size) for rank in range(size) for step in (-1, 1) if size > 1}
        self.ring = Neighbours(self.world, ring, self.w.size, self.dtype, self.ops)
        sources = len(self.ring.sources)
        self.neighbour_weights = self.ops.zeros(sources * self.w.size, self.dtype).reshape(-1, self.w.size)
        self.account.hold("buffers", self.neighbour_weights)
        self.factors = [self_weight, *[(1 - self_weight) / max(1, sources)] * sources] if size > 1 else [1.0]

    @classmethod
    def check(cls, size, network, dataset, config):
        super().check(size, network, dataset, config)
        if not 0 < (weight := config.of(Settings).self_weight) <= 1:
            raise UserError(f"--self-weight {weight}: expected a number above 0, up to 1")

    def step(self, batch, lr):
        self.train(batch, lr)
        self.ring.forward(self.w, self.neighbour_weights)
        self.ops.combine(self.w, *zip(self.factors, [self.w, *self.neighbour_weights], strict=True))

    def messages(self, step, batch):
        return self.ring.messages(Step(batch, step))


if __name__ == "__main__":
    raise SystemExit(psmpi.command.main())
