"""Updates of a matrix factorization: one for each entry, of the vectors of its row and its column, by a kernel."""

from __future__ import annotations

from math import isfinite

import numpy as np

from psmpi.backend import Descent, Pairs
from psmpi.config import Config
from psmpi.data import Dataset
from psmpi.layout import Runs
from psmpi.methods.hogwild.sparsity import Sparsity, of_rows
from psmpi.methods.hogwild.stores import SharedStore
from psmpi.nn.layers.dot import Dot
from psmpi.nn.layers.embedding import Embedding
from psmpi.nn.network import Network
from psmpi.nn.objective import DIVERGED
from psmpi.training.context import Context


def is_factors(network: Network, dataset: Dataset, config: Config, update_samples: int) -> bool:
    """Whether a kernel makes the updates: plain descent of products of two tokens' vectors, a sample at a time."""
    return (
        [type(layer) for layer in network.layers] == [Embedding, Dot]
        and config.objective.loss == "squared"
        and config.optimization.optimizer == "sgd"
        and update_samples in (0, 1)
        and dataset.train.tokens
    )


class FactorUpdates:
    """One update for each sample, in shared memory, where other ranks see it at once.

    The penalty of a vector, half of --weight-decay times its squared norm, is applied at the samples with its token,
    times the number of all samples / the number of occurrences of the token.
    """

    def __init__(self, context: Context, store: SharedStore):
        self.ops, self.store, self.numbers = context.ops, store, context.numbers
        o, split, embedding = context.config.optimization, context.dataset.train, context.network.layers[0]
        assert isinstance(embedding, Embedding)
        self.rule = Descent(0.0, o.weight_decay or 0.0, o.clip, "squared")
        self.shape = embedding.out_shape[0], embedding.vocabulary
        tokens = np.ascontiguousarray(split.read(np.arange(split.n)).reshape(split.n, 2), np.int32)
        counts = np.bincount(tokens.reshape(-1), minlength=embedding.vocabulary)
        self.pairs = Pairs(
            tokens, split.targets[:, 0].astype(context.dtype), (split.n / np.maximum(1, counts)).astype(context.dtype)
        )
        self.starts = np.arange(split.n + 1, dtype=np.int64) * 2
        self.seen, self.seed = np.full(embedding.vocabulary, -1, np.int32), context.config.run.seed
        self.optimizer = context.optimizer(Runs())
        self.owned = (*self.pairs, self.starts, self.seen)

    @property
    def scope(self) -> str:
        """The samples and weights of an update, in words."""
        return f"a sample's two vectors of {self.shape[0]} weights; counted in vectors"

    def sparsity(self) -> Sparsity:
        """Return the sparsity of the updates, in which a vector counts as one weight."""
        return of_rows(self.starts, self.pairs.tokens.reshape(-1), len(self.seen), self.seed)

    def run(self, ids: np.ndarray, lr: float) -> float:
        """Make the updates of a minibatch; return the sum of the losses."""
        w, how = self.store.w.reshape(self.shape), self.rule._replace(lr=lr)
        total = self.ops.factor_steps(ids, self.pairs, w, how, self.store.atomic)
        if not isfinite(total) and not self.numbers.lenient:
            raise FloatingPointError(DIVERGED)
        return total

    one_by_one = run

    def deal(self, ids: np.ndarray, size: int) -> tuple[np.ndarray, int, int]:
        """See `SparseUpdates.deal`: samples with a token in common are in one component."""
        return self.ops.deal_components(ids, self.starts, self.pairs.tokens.reshape(-1), size, self.seen)
