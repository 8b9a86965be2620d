"""The base class of optimizers: a shard's size and dtype, named state, chunks, and which settings are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from psmpi.backend import NumpyOps
from psmpi.errors import UserError
from psmpi.optim.settings import USUAL, Hyper, check_eps, check_settings

__all__ = ["CHUNK", "AllSum", "Closure", "Hyper", "Optimizer", "check_eps", "check_settings", "chunks"]

# Partial sums (k,) float64 of a rank -> the sums over all shards: the same array, in place, the same on every
# rank.
AllSum = Callable[[np.ndarray], np.ndarray]
# Recomputes the loss (the same number on every rank) and fills the shard's gradient, at the present weights.
Closure = Callable[[], float]

# Elements that an update takes through the cache at a time. Below the 10,000 from which OpenBLAS splits a dot
# product over threads, so that sums do not depend on the number of threads.
CHUNK = 1 << 13


class Optimizer:
    """Steps one shard in place: `n` elements of `dtype` (float32 or float64), possibly none.

    Every rank makes the same calls with the same scalars, an empty shard included; what is global comes in
    through `allsum`. All memory of size n is allocated in the constructor, none in `step`.

    vectors: the state, by stable name, each (n,) of `dtype`, arrays of `ops`. scalars: the rest of it, the same on
    every rank. Both go into checkpoints: vectors are restored by copying into them, scalars by `scalars.update(...)`.

    UserError for another dtype.
    """

    needs_closure: bool = False
    # Whether steps are shorter with a lower learning rate.
    rated: ClassVar[bool] = True
    # Whether the constructor is told the whole matrices of the shard.
    needs_matrices: ClassVar[bool] = False
    # The settings that are used, by name; those of `Hyper` are keywords of the constructor.
    settings: ClassVar[tuple[str, ...]] = ()
    # Numbers that stand for a setting of None, where they are not those of `USUAL`.
    usual: ClassVar[Mapping[str, float]] = {}
    # The dataclass of the settings that this optimizer alone has, see `psmpi.config.Settings`.
    options: ClassVar[type[Any] | None] = None
    # Rates where --lr is not given: of small and of large data sets for networks of logistic sigmoids, and of others.
    # A line search begins with the whole step.
    rates: ClassVar[tuple[float, float, float]] = (1.0, 1.0, 1.0)

    def __init__(
        self,
        n: int,
        dtype: DTypeLike,
        *,
        names: tuple[str, ...] = (),
        ops: NumpyOps | None = None,
        own: Any = None,
    ) -> None:
        # The values of `options`.
        self.own = self.options() if own is None and self.options is not None else own
        self.n, self.dtype = n, np.dtype(dtype)
        self.ops = ops or NumpyOps()
        if self.dtype not in (np.float32, np.float64):
            raise UserError(f"dtype {self.dtype}: weights are optimized in float32 or float64, choose one of these")
        self.vectors: dict[str, np.ndarray] = {name: self.ops.zeros(n, self.dtype) for name in names}
        self.scalars: dict[str, float | int] = {}
        # The least and the largest value of scalars that not every number from 0 up can be.
        self.ranges: dict[str, tuple[float, float]] = {}
        # What a step works in: two chunks, or vectors.
        self.scratch = np.empty((2, 0), self.dtype)
        self.work: tuple[np.ndarray, ...] = ()

    @classmethod
    def chosen(cls, hyper: Hyper) -> dict[str, Any]:
        """The settings of `hyper` that are used, by name, with a number for None."""
        usual = {**USUAL, **cls.usual}
        values = {f.name: getattr(hyper, f.name) for f in fields(hyper) if f.name in cls.settings}
        return {name: usual[name] if value is None else value for name, value in values.items()}

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All that it keeps: the vectors of the state, and what a step works in."""
        return (*self.vectors.values(), *self.work, self.scratch)

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


def chunks(n: int) -> Iterator[slice]:
    """Slices of at most CHUNK elements that cover n elements, in order."""
    for start in range(0, n, CHUNK):
        yield slice(start, min(start + CHUNK, n))
