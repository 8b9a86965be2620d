"""Updates: what a rank computes of some samples, and adds to the shared weights."""

from __future__ import annotations

import numpy as np

from psmpi.data import Batch
from psmpi.errors import counted
from psmpi.layout import Runs
from psmpi.methods.hogwild.sparsity import Sparsity, of_all
from psmpi.methods.hogwild.stores import Store
from psmpi.optim.first_order import FirstOrder
from psmpi.training.context import Context
from psmpi.training.descent import no_sum
from psmpi.training.element_worker import ElementWorker


class NetworkUpdates:
    """Updates of any network, which computes with the store's w: one for every so many samples, 0: for a minibatch.

    The optimizer is this rank's own. It steps a vector of zeros, which is what is added; plain gradient descent adds
    the gradient itself.
    """

    def __init__(
        self, context: Context, worker: ElementWorker, store: Store, g: np.ndarray, everything: Runs, samples: int
    ):
        self.ops, self.layout, self.numbers = context.ops, context.layout, context.numbers
        self.worker, self.store, self.g, self.everything = worker, store, g, everything
        o, most = context.config.optimization, context.config.data.batch_size
        self.samples, self.clip, self.decay = samples or most, o.clip, o.weight_decay or 0.0
        self.plain = o.optimizer == "sgd"
        optimizer = context.optimizer(everything)
        assert isinstance(optimizer, FirstOrder)
        # It is part of the gradient, which is taken where the shared weights were read.
        optimizer.weight_decay = 0.0
        self.optimizer = optimizer
        self.change = g if self.plain else context.ops.zeros(g.size, context.dtype)
        worker.reserve(min(self.samples, most))
        self.owned = (self.change,)

    @property
    def what(self) -> str:
        """Of what an update is."""
        return f"up to {counted(self.samples, 'sample')}, and of all weights"

    def sparsity(self) -> Sparsity:
        """That of the updates."""
        return of_all(self.g.size)

    def count(self, samples: int) -> int:
        """The updates of a minibatch."""
        return -(-samples // self.samples)

    def run(self, ids: np.ndarray, lr: float) -> float:
        """Make the updates of a minibatch; returns the sum of the losses."""
        total = 0.0
        for at in range(0, len(ids), self.samples):
            batch = Batch(ids[at : at + self.samples])
            self.store.read()
            total += self.gradient(batch) * len(batch)
            if self.plain:
                self.store.add(self.g, -lr)
                continue
            self.change.fill(0)
            self.optimizer.step(self.change, self.g, lr, no_sum)
            self.store.add(self.change, 1.0)
        return total

    def gradient(self, batch: Batch) -> float:
        """Fill g with the gradient of the mean loss of some samples; returns the loss."""
        g = self.g
        g.fill(0)
        loss = self.worker.element_losses(batch, batch)
        self.numbers.sound(self.ops, loss, [(g, self.everything)], self.layout, len(batch))
        if self.clip > 0:
            self.numbers.clip(g, self.clip, no_sum, self.ops, self.layout, self.everything)
        if self.decay:
            self.ops.combine(g, (1.0, g), (self.decay, self.store.w))
        return loss
