"""The base class of methods in which each rank trains its own copy of the whole network."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from psmpi.config import Config
from psmpi.data import Batch, Dataset
from psmpi.layout import TableRows
from psmpi.nn.network import Network
from psmpi.training.checks import check_first_order
from psmpi.training.context import Context
from psmpi.training.method import Exactness
from psmpi.training.need import Need, added, vectors_needed
from psmpi.training.replica import Replica


class Copies(Replica):
    """One rank of such a method: `own` are its weights and the optimizer's vectors, `means` their means over the ranks.

    Tests use the mean weights. Checkpoints hold the means, and each rank's own vectors as rows of tables: a run resumed
    on as many ranks continues exactly, and on another number of ranks all ranks start from the mean.
    """

    # The task: the digits, learnt well enough that the accuracy hardly depends on the order of steps.
    skips = True
    exactness = Exactness(
        "statistical", "exact", 0.05, ("--model", "mlp", "--widths", "40", "--loss", "nll", "--lr", "0.01")
    )

    def __init__(self, context: Context):
        super().__init__(context)
        self.own = {"weights": self.w, **self.optimizer.vectors}
        self.means = {name: self.ops.zeros(self.w.size, self.dtype) for name in self.own}
        for name, mean in self.means.items():
            self.keep(name, mean)
        for name, vector in self.own.items():
            self.state.table(name, vector.reshape(1, -1))
        self.state.rows = TableRows.one_each(context.size)
        self.state.not_restored = "the copies of this many ranks: all of them start from the mean"
        # This rank's weights while `w` holds the mean for a test.
        self.weights_before_test = self.ops.zeros(self.w.size, self.dtype)
        self.account.hold("weights", self.weights_before_test)

    @classmethod
    def check(cls, size: int, network: Network, dataset: Dataset, config: Config) -> None:
        super().check(size, network, dataset, config)
        check_first_order(config, "has searches and pairs that every rank would make its own")

    @classmethod
    def needed(cls, size: int, network: Network, dataset: Dataset, config: Config) -> list[Need]:
        # The means of weights and optimizer, and the copy of the weights during a test.
        layout = network.layout()
        means = {"weights": sum(vectors_needed(config, layout, 2 * layout.size, 0, layout.size).values())}
        return [added(need, means) for need in super().needed(size, network, dataset, config)]

    def train(self, batch: Batch, lr: float) -> None:
        """Step this rank's copy on its slice of a minibatch."""
        share = batch.share(self.rank, self.context.size)
        # A rank without a sample of a small last minibatch trains on all of it, so that all ranks make a step.
        own = share if len(share) else batch
        self.g[self.unused].fill(0)
        loss = self.worker.element_losses(own, own)
        if self.descent.sound(loss, self.g, len(share)):
            self.loss_sum += loss * len(share)
            self.descent.step(self.w, self.g, lr)

    def mean(self, name: str) -> np.ndarray:
        """The mean of a vector over the ranks, for tests and checkpoints; its messages are not counted."""
        mean = self.means[name]
        mean[...] = self.own[name]
        self.ops.scale(mean, 1 / self.world.size)
        self.uncounted.allreduce(mean)
        return mean

    def drain(self) -> None:
        for name in self.own:
            self.mean(name)

    def restored(self, tables: bool, fresh: Set[str]) -> None:
        for name, vector in self.own.items() if not tables else ():
            vector[...] = self.means[name]

    def test(self) -> dict[str, float]:
        self.weights_before_test[...] = self.w
        mean = self.mean("weights")
        self.verify(mean)
        self.w[...] = mean
        scores = super().test()
        self.w[...] = self.weights_before_test
        return scores
