"""Updates of linear models with one score on sparse samples: a call of a kernel makes all updates of a minibatch."""

from __future__ import annotations

from math import isfinite

import numpy as np

from psmpi.backend import SLOPES, Descent, Room, Rows
from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.layout import Runs
from psmpi.methods.hogwild.sparsity import Sparsity, of_rows
from psmpi.methods.hogwild.stores import SharedStore, Store, WindowStore
from psmpi.nn.layers.binary import Binary
from psmpi.nn.layers.dense import Dense
from psmpi.nn.layers.flatten import Flatten
from psmpi.nn.network import Network
from psmpi.nn.objective import DIVERGED
from psmpi.training.context import Context
from psmpi.training.element_worker import ElementWorker


def is_sparse(network: Network, dataset: Dataset, config: Config) -> bool:
    """Whether a kernel makes the updates: plain descent of one score on compressed rows."""
    layers = [layer for layer in network.layers if not isinstance(layer, Flatten)]
    linear = bool(layers) and isinstance(layers[0], Dense) and layers[0].units == 1
    ends = [Binary] if dataset.task == "classes" else []
    kinds = {"logistic", "hinge", "squared", "nll"} if dataset.task == "classes" else {"squared"}
    return (
        linear
        and [type(layer) for layer in layers[1:]] == ends
        and not layers[0].activation
        and config.objective.loss in kinds
        and config.optimization.optimizer == "sgd"
        and dataset.train.compressed is not None
    )


class SparseUpdates:
    """One update for each sample, in shared memory, where other ranks see it at once.

    With `block` above 1, `block` samples are stepped one after the other on a copy of the weights that they touch, and
    the sum of their changes is added: processors then fetch weights that others have changed less often. Stores other
    than shared memory always use such blocks; for them `block` 0 is a whole minibatch.

    The penalty of a weight, half of --weight-decay times its square, is applied at the samples with its feature, times
    the number of all samples / the number of these samples (Hogwild!, section 2, for a mean over samples).
    """

    owned: tuple[np.ndarray, ...]

    def __init__(self, context: Context, worker: ElementWorker, store: Store, block: int):
        self.ops, self.store, self.numbers = context.ops, store, context.numbers
        o, loss, split = context.config.optimization, context.config.objective, context.dataset.train
        samples = worker.train.compressed
        assert samples is not None
        self.classes = context.dataset.task == "classes"
        name = "logistic" if loss.loss == "nll" else loss.loss
        kappa = loss.kappa if name in ("logistic", "hinge") and loss.loss != "nll" else 1.0
        targets = (2 * split.labels - 1) * kappa if self.classes else split.targets[:, 0]
        scale = 0.5 if name == "squared" and self.classes else 1.0
        assert name in SLOPES
        self.rule = Descent(0.0, o.weight_decay or 0.0, o.clip, name, scale)
        counts = np.bincount(samples.columns, minlength=samples.features)
        self.rows = Rows(
            samples.starts, samples.columns, samples.values, targets.astype(context.dtype),
            (samples.n / np.maximum(counts, 1)).astype(context.dtype),
        )  # fmt: skip
        self.optimizer = context.optimizer(Runs())
        weight, *bias = (p.name for layer in context.network.layers for p in layer.parameters())
        self.weight = self._place(context, weight)
        self.bias = self._place(context, bias[0]) if bias else None
        self.seed = context.config.run.seed
        self.atomic = isinstance(store, SharedStore) and store.atomic
        self.seen = np.full(samples.features, -1, np.int32)
        self.block, self.shared = block, isinstance(store, SharedStore)
        self.room = Room.of(samples.features if self.shared and block > 1 else 0, context.dtype)
        self.owned = (self.rows.targets, self.rows.often, self.seen, *self.room)

    @staticmethod
    def _place(context: Context, name: str) -> slice:
        ((start, stop),) = context.layout.runs_of_parameters({name}).intervals
        return slice(start, stop)

    @property
    def scope(self) -> str:
        """The samples and weights of an update, in words."""
        bias = "" if self.bias is None else ", and of the bias, which all have in common; without it"
        return f"a sample{bias}"

    def sparsity(self) -> Sparsity:
        """Return the sparsity of the updates, without the bias."""
        return of_rows(self.rows.starts, self.rows.columns, len(self.seen), self.seed)

    def run(self, ids: np.ndarray, lr: float) -> float:
        """Make the updates of a minibatch; return the sum of the losses."""
        if self.shared:
            return self._steps(ids, lr, self.block)
        block = self.block or max(1, len(ids))
        return sum(self._remote(ids[at : at + block], lr) for at in range(0, len(ids), block))

    def one_by_one(self, ids: np.ndarray, lr: float) -> float:
        """Make the updates of a minibatch in shared memory without blocks; return the sum of the losses."""
        return self._steps(ids, lr, 1)

    def _remote(self, ids: np.ndarray, lr: float) -> float:
        places = self._places(ids) if isinstance(self.store, WindowStore) else np.arange(self.store.w.size)
        self.store.read_at(places)
        before = self.store.w[places]
        total = self._steps(ids, lr, 1)
        change = self.store.w[places] - before
        if isinstance(self.store, WindowStore):
            self.store.add_at(places, change)
        else:
            self.store.add(change, 1.0)
        return total

    def _steps(self, ids: np.ndarray, lr: float, block: int) -> float:
        w, how = self.store.w, self.rule._replace(lr=lr)
        bias = None if self.bias is None else w[self.bias]
        weights, atomic = w[self.weight], self.atomic
        if block > 1:
            total = self.ops.sparse_blocks(ids, self.rows, weights, bias, how, atomic, block, self.room)
        else:
            total = self.ops.sparse_steps(ids, self.rows, weights, bias, how, atomic)
        if not isfinite(total) and not self.numbers.lenient:
            raise FloatingPointError(DIVERGED)
        return total

    def _places(self, ids: np.ndarray) -> np.ndarray:
        """Return the indices int64 of the weights that samples touch, increasing."""
        starts = self.rows.starts
        columns = np.concatenate([self.rows.columns[starts[k] : starts[k + 1]] for k in ids])
        places = self.weight.start + np.unique(columns).astype(np.int64)
        return places if self.bias is None else np.sort(np.append(places, self.bias.start))

    def deal(self, ids: np.ndarray, size: int) -> tuple[np.ndarray, int, int]:
        """Deal samples to ranks as CYCLADES does, by components of samples with weights in common.

        Return the rank of each sample (b,) int32, the number of components, and the samples of the largest one. With a
        bias all samples have a weight in common, and form one component.
        """
        if self.bias is not None:
            return np.zeros(len(ids), np.int32), 1, len(ids)
        return self.ops.deal_components(ids, self.rows.starts, self.rows.columns, size, self.seen)
