"""The base class of optimizers: a shard's size and dtype, named state, chunks, and settings that make sense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike

from psmpi.backend import NumpyOps
from psmpi.errors import UserError

# Partial sums (k,) float64 of a rank -> the sums over all shards: the same array, in place, the same on every
# rank.
AllSum = Callable[[np.ndarray], np.ndarray]
# Recomputes the loss (the same number on every rank) and fills the shard's gradient, at the present weights.
Closure = Callable[[], float]

# Elements that an update takes through the cache at a time. Below the 10,000 from which OpenBLAS splits a dot
# product over threads, so that sums do not depend on the number of threads.
CHUNK = 1 << 13


@dataclass(frozen=True)
class Hyper:
    """Settings of all optimizers; each uses those its formula has. `make_optimizer` checks all of them."""

    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    alpha: float = 0.99
    weight_decay: float = 0.0
    history: int = 10
    max_evals: int = 20


class Optimizer:
    """Steps one shard in place: `n` elements of `dtype` (float32 or float64), possibly none.

    Every rank makes the same calls with the same scalars, an empty shard included; what is global comes in
    through `allsum`. All memory of size n is allocated in the constructor, none in `step`.

    vectors: the state, by stable name, each (n,) of `dtype`, arrays of `ops`. scalars: the rest of it, the same on
    every rank. Both go into checkpoints: vectors are restored by copying into them, scalars by `scalars.update(...)`.

    UserError for another dtype.
    """

    needs_closure: bool = False
    # The constructor's hyperparameters, by keyword.
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, n: int, dtype: DTypeLike, *, names: tuple[str, ...] = (), ops: NumpyOps | None = None) -> None:
        self.n, self.dtype = n, np.dtype(dtype)
        self.ops = ops or NumpyOps()
        if self.dtype not in (np.float32, np.float64):
            raise UserError(f"dtype {self.dtype}: weights are optimized in float32 or float64, choose one of these")
        self.vectors: dict[str, np.ndarray] = {name: self.ops.zeros(n, self.dtype) for name in names}
        self.scalars: dict[str, float | int] = {}
        # What a step works in: two chunks, or vectors.
        self.scratch = np.empty((2, 0), self.dtype)
        self.work: tuple[np.ndarray, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the state, and of what a step works in."""
        return sum(int(a.nbytes) for a in (*self.vectors.values(), *self.work, self.scratch))

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        """Move the weights w (n,) by one step, in place; g (n,) is their gradient and may be overwritten.

        Both are contiguous arrays of `ops`, of the optimizer's dtype. Components of g are assumed to be at most 2^50 in
        magnitude, so that squares, and sums of them, are finite in float32 as well: the caller saturates. A
        closure is used by optimizers that set `needs_closure`; it fills this very g. ValueError for arrays of
        another shape or dtype.
        """
        raise NotImplementedError

    def check_shard(self, w: np.ndarray, g: np.ndarray) -> None:
        """ValueError where w or g is no shard of this optimizer's: ufuncs broadcast and cast in silence."""
        for name, array in (("w", w), ("g", g)):
            if array.shape != (self.n,) or array.dtype != self.dtype:
                raise ValueError(
                    f"{name} is {array.dtype} {array.shape}, this optimizer steps {self.dtype} {(self.n,)}"
                )

    def chunks(self) -> Iterator[slice]:
        """Slices of at most CHUNK elements that cover the shard, in order."""
        for start in range(0, self.n, CHUNK):
            yield slice(start, min(start + CHUNK, self.n))


def check_settings(**settings: float) -> None:
    """UserError for a setting, by its name in `Hyper`, that no update rule can work with."""
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')} {value}"
        if name in ("momentum", "beta1", "beta2", "alpha"):
            if not 0 <= value < 1:
                raise UserError(f"{option}: expected a number from 0 up to, not including, 1")
        elif name == "eps":
            if not 0 < value < np.inf:
                raise UserError(f"{option}: expected a finite number above 0")
        elif name == "weight_decay":
            if not 0 <= value < np.inf:
                raise UserError(f"{option}: expected a finite number, 0 or more")
        elif name == "history":
            if value < 1:
                raise UserError(f"{option}: expected 1 or more pairs to remember")
        elif name == "max_evals" and value < 2:
            # One evaluation is where the step starts, another the first trial.
            raise UserError(f"{option}: expected 2 or more function evaluations a step")


def check_eps(eps: float, dtype: np.dtype) -> None:
    """UserError for an eps that vanishes in `dtype`: a weight without any gradient would become 0 / 0."""
    check_settings(eps=eps)
    tiny = float(np.finfo(dtype).tiny)
    if eps < tiny:
        raise UserError(f"--eps {eps}: rounds to 0 in {dtype}, use {tiny:.3g} or more")
