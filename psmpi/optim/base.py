"""What every optimizer has, and the global norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np

# Partial sums (k,) float64 of a rank -> the sums over all shards, in place, the same on every rank.
AllSum = Callable[[np.ndarray], np.ndarray]
# Recomputes the loss, the same on every rank, and the shard's gradient at the present weights.
Closure = Callable[[], float]

# Elements that an update takes through the cache at a time.
CHUNK = 1 << 14


@dataclass(frozen=True)
class Hyper:
    """Settings of all optimizers; each uses those its formula has."""

    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    alpha: float = 0.99
    weight_decay: float = 0.0
    history: int = 10
    max_evals: int = 20


class Optimizer:
    """Steps one shard in place: n elements of `dtype`, possibly none.

    vectors: the state, by stable name, each (n,) of `dtype`; scalars: the rest of it, the same on every rank. Both go
    into checkpoints. All memory is allocated here, none in `step`.
    """

    needs_closure = False

    def __init__(self, n: int, dtype: np.dtype, hyper: Hyper, names: tuple[str, ...] = ()):
        self.n, self.dtype, self.hyper = n, np.dtype(dtype), hyper
        self.vectors = {name: np.zeros(n, dtype) for name in names}
        self.scalars: dict[str, float | int] = {}
        self.scratch = np.empty((2, min(n, CHUNK)), dtype)

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.n, CHUNK):
            yield slice(start, min(start + CHUNK, self.n))

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        """Move w (n,) by one step along its gradient g (n,), which may be overwritten.

        Components of g are at most 2^50 in float32 (2^400 in float64), so that their squares are finite.
        """
        raise NotImplementedError


def squared_norm(g: np.ndarray) -> float:
    """The squared Euclidean norm of g (n,), accumulated in float64."""
    total = 0.0
    for start in range(0, g.size, CHUNK):
        piece = g[start : start + CHUNK].astype(np.float64)
        total += float(piece @ piece)
    return total


def clip_by_global_norm(g: np.ndarray, max_norm: float, allsum: AllSum) -> float:
    """Scale the shards' gradient so that its global norm is at most max_norm (> 0); returns the norm before.

    A norm that is not finite leaves g as it is.
    """
    norm = sqrt(allsum(np.array([squared_norm(g)]))[0])
    if max_norm < norm < np.inf:
        g *= max_norm / norm
    return norm
