"""Updates of any network: changes of all weights that a rank computes from some samples."""

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
    """Updates of any network: one for every `samples` samples, with 0 one for a whole minibatch.

    The model computes with the store's w. Each rank has an optimizer state: the optimizer steps a vector of zeros, and
    the store adds the result to the shared weights. For plain gradient descent the store adds the gradient itself.
    """

    def __init__(
        self, context: Context, worker: ElementWorker, store: Store, g: np.ndarray, all_weights: Runs, samples: int
    ):
        self.ops, self.layout, self.numbers = context.ops, context.layout, context.numbers
        self.worker, self.store, self.g, self.all_weights = worker, store, g, all_weights
        o, most = context.config.optimization, context.config.data.batch_size
        self.samples, self.clip, self.decay = samples or most, o.clip, o.weight_decay or 0.0
        self.plain = o.optimizer == "sgd"
        optimizer = context.optimizer(all_weights)
        assert isinstance(optimizer, FirstOrder)
        # `gradient` adds the weight decay, at the shared weights that were read.
        optimizer.weight_decay = 0.0
        self.optimizer = optimizer
        self.change = g if self.plain else context.ops.zeros(g.size, context.dtype)
        worker.reserve(min(self.samples, most))
        self.owned = (self.change,)

    @property
    def scope(self) -> str:
        """The samples and weights of an update, in words."""
        return f"up to {counted(self.samples, 'sample')}, and of all weights"

    def sparsity(self) -> Sparsity:
        """Return the sparsity of the updates."""
        return of_all(self.g.size)

    def count(self, samples: int) -> int:
        """Return the number of updates of a minibatch."""
        return -(-samples // self.samples)

    def run(self, ids: np.ndarray, lr: float) -> float:
        """Make the updates of a minibatch; return the sum of the losses."""
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
        """Fill g (n,) with the gradient of the mean loss of some samples; return that loss."""
        g = self.g
        g.fill(0)
        loss = self.worker.element_losses(batch, batch)
        self.numbers.sound(self.ops, loss, [(g, self.all_weights)], self.layout, len(batch))
        if self.clip > 0:
            self.numbers.clip(g, self.clip, no_sum, self.ops, self.layout, self.all_weights)
        if self.decay:
            self.ops.combine(g, (1.0, g), (self.decay, self.store.w))
        return loss
