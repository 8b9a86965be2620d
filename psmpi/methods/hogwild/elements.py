"""Updates of partially-separable networks, one for each element of the loss: a pair of classes."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from psmpi.config import Config, option
from psmpi.data import Batch, Dataset
from psmpi.errors import UserError
from psmpi.layout import Layout, Ownership, Roles, Runs, Worker
from psmpi.methods.hogwild.sparsity import Sparsity
from psmpi.methods.hogwild.stores import SharedStore, Store, WindowStore
from psmpi.nn.network import Network
from psmpi.optim.first_order import FirstOrder
from psmpi.training.checks import check_classes
from psmpi.training.context import Context, configured_loss
from psmpi.training.descent import no_sum
from psmpi.training.element_worker import ElementWorker


def check_elements(network: Network, dataset: Dataset, config: Config) -> None:
    """Raise UserError for a loss or a network whose elements cannot be updated one by one."""
    check_classes(dataset, "--elements", "leave it out")
    o, loss = config.optimization, configured_loss(config, dataset)
    if not loss.pairwise or loss.weights != "none":
        raise UserError(
            "--elements needs a loss that is a sum over pairs of classes: use --loss logistic or hinge, without "
            f"{option('psl_weights')}"
        )
    if o.optimizer != "sgd" or o.weight_decay:
        raise UserError(
            "--elements steps one element at a time, without optimizer state and weight decay: use --optimizer sgd "
            "without --weight-decay"
        )
    if network.normalized:
        raise UserError(
            "--elements cannot train batch normalization, as a minibatch has few samples of a class: use a network "
            "without it"
        )


class ElementUpdates:
    """Updates of pairs of classes: for {i, j} the gradient of f_ij and f_ji over a minibatch's samples of i and j.

    An update reads and changes only the weights of the subnetworks of i and j. The models of all pairs share the arrays
    w and g, one after the other.
    """

    def __init__(self, context: Context, worker: ElementWorker, store: Store):
        layout, ops, dtype = context.layout, context.ops, context.dtype
        self.ops, self.layout, self.store, self.numbers = ops, layout, store, context.numbers
        self.clip, self.labels = context.config.optimization.clip, context.dataset.train.labels
        self.pairs = list(combinations(range(layout.classes), 2))
        parts = [layout.part(pair) for pair in self.pairs]
        self.parts = parts
        largest = max(part.size for part in parts)
        self.w, self.g = ops.zeros(largest, dtype), ops.zeros(largest, dtype)
        self.whole = ops.zeros(layout.size if not isinstance(store, (SharedStore, WindowStore)) else 0, dtype)
        self.workers = [
            self._worker(context, worker, number, pair, part)
            for number, (pair, part) in enumerate(zip(self.pairs, parts, strict=True))
        ]
        optimizer = context.optimizer(Runs())
        assert isinstance(optimizer, FirstOrder)
        self.optimizer = optimizer
        self.owned = (self.w, self.g, self.whole)

    def _worker(
        self, context: Context, worker: ElementWorker, number: int, pair: tuple[int, int], part: Runs
    ) -> ElementWorker:
        # The first pair, in column 0, counts the terms of a loss that do not depend on weights.
        place = Worker(0, number, pair, frozenset([pair]))
        roles = Roles(1, (place,), Ownership((part,)), Ownership((part,)))
        element_worker = ElementWorker(
            context, place, roles, context.group([context.rank]), self.w[: part.size], self.g[: part.size], tests=False,
            samples=np.arange(0),
        )  # fmt: skip
        element_worker.train = worker.train
        return element_worker

    def memory(self) -> dict[str, int]:
        """Bytes of the pairs' models, without the samples, which they share."""
        total = {"activations": 0, "buffers": 0}
        for worker in self.workers:
            nbytes = worker.memory()
            for kind in total:
                total[kind] += nbytes[kind]
        return total

    @property
    def scope(self) -> str:
        """The samples and weights of an update, in words."""
        return "a pair of classes"

    def sparsity(self) -> Sparsity:
        """Return the sparsity of the updates, from the partition."""
        return of_pairs(self.layout, self.pairs)

    def count(self, samples: int) -> int:
        """Return the most updates that a minibatch makes."""
        return len(self.pairs)

    def run(self, ids: np.ndarray, lr: float) -> float:
        """Make the updates of a minibatch; return the sum of the losses."""
        present, total, batch = set(np.unique(self.labels[ids]).tolist()), 0.0, Batch(ids)
        for pair, part, worker in zip(self.pairs, self.parts, self.workers, strict=True):
            if not present.intersection(pair):
                # The first pair's worker also counts the terms that do not depend on weights.
                total += worker.element_losses(batch, batch) * len(ids) if worker.place.column == 0 else 0.0
                continue
            self._read(part)
            total += worker.element_losses(batch, batch) * len(ids)
            g = self.g[: part.size]
            self.numbers.sound(self.ops, total, [(g, part)], self.layout, len(ids))
            if self.clip > 0:
                self.numbers.clip(g, self.clip, no_sum, self.ops, self.layout, part)
            self._add(part, g, -lr)
        return total

    def _read(self, part: Runs) -> None:
        if isinstance(self.store, WindowStore):
            self.store.read_at(places_of(part))
        else:
            self.store.read()
        at = 0
        for start, stop in part.intervals:
            self.w[at : at + stop - start] = self.store.w[start:stop]
            at += stop - start

    def _add(self, part: Runs, g: np.ndarray, factor: float) -> None:
        if isinstance(self.store, WindowStore):
            self.store.add_at(places_of(part), g * g.dtype.type(factor))
            return
        shared, at = isinstance(self.store, SharedStore), 0
        if not shared:
            self.whole.fill(0)
        for start, stop in part.intervals:
            change = g[at : at + stop - start]
            if isinstance(self.store, SharedStore):
                self.ops.add_shared(self.store.w[start:stop], change, factor, self.store.atomic)
            else:
                self.whole[start:stop] = change
            at += stop - start
        if not shared:
            self.store.add(self.whole, factor)


def places_of(part: Runs) -> np.ndarray:
    """Return the indices (n,) int64 of the elements of runs, in order."""
    return np.concatenate([np.arange(start, stop) for start, stop in part.intervals])


def of_pairs(layout: Layout, pairs: list[tuple[int, int]]) -> Sparsity:
    """Return the sparsity of updates of pairs of classes: each updates the weights of its part, all equally often."""
    counts = np.zeros(layout.size, np.int64)
    for pair in pairs:
        for start, stop in layout.part(pair).intervals:
            counts[start:stop] += 1
    # Without weights that all pairs share, two pairs meet if they have a class in common.
    in_common = max(sum(bool(set(one) & set(other)) for other in pairs) for one in pairs)
    met = len(pairs) if (counts == len(pairs)).any() else in_common
    largest = max(layout.part(pair).size for pair in pairs)
    return Sparsity(largest, float(counts.max()) / len(pairs), met / len(pairs), 0)
