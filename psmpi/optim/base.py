"""Base class of optimizers: size and dtype of a shard, named state, chunks, and the settings in use."""

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

# Partial sums (k,) float64 of a rank -> their sums over all shards, in place and in the same array. Every rank gets the
# same sums.
AllSum = Callable[[np.ndarray], np.ndarray]
# Function that recomputes the loss (the same number on every rank) and fills the shard's gradient, at the current w.
Closure = Callable[[], float]

# Elements that an update takes through the cache at a time. OpenBLAS splits a dot product over threads from 10,000
# elements on; chunks are shorter, so that sums do not depend on the number of threads.
CHUNK = 1 << 13


class Optimizer:
    """Optimizer of one shard of weights, stepped in place: `n` >= 0 elements of `dtype` (float32 or float64).

    Every rank makes the same calls with the same scalars, even if its shard is empty. Global sums come in through
    `allsum`. The constructor allocates all memory of size n, `step` allocates none.

    vectors: vectors of the state, by stable name, each (n,) of `dtype`, arrays of `ops`. scalars: numbers of the state,
    the same on every rank. Checkpoints hold both: vectors are restored by copying into them, scalars by
    `scalars.update(...)`.

    UserError for another dtype.
    """

    # One line for the help.
    summary: ClassVar[str] = ""
    needs_closure: bool = False
    # Whether the learning rate scales the steps.
    rated: ClassVar[bool] = True
    # Whether the constructor takes the whole matrices of the shard.
    needs_matrices: ClassVar[bool] = False
    # Names of the settings that the optimizer uses; settings of `Hyper` are keywords of the constructor.
    settings: ClassVar[tuple[str, ...]] = ()
    # Values for settings that are None, where they differ from `USUAL`.
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
        # Smallest and largest valid value of each scalar that has narrower bounds than 0 and above.
        self.ranges: dict[str, tuple[float, float]] = {}
        # Work memory of a step: two chunks (`scratch`), or vectors (`work`).
        self.scratch = np.empty((2, 0), self.dtype)
        self.work: tuple[np.ndarray, ...] = ()

    @classmethod
    def chosen(cls, hyper: Hyper) -> dict[str, Any]:
        """Return the settings of `hyper` that the optimizer uses, by name, with the usual value in place of None."""
        usual = {**USUAL, **cls.usual}
        values = {f.name: getattr(hyper, f.name) for f in fields(hyper) if f.name in cls.settings}
        return {name: usual[name] if value is None else value for name, value in values.items()}

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All arrays that the optimizer holds: the vectors of the state, and the work memory of a step."""
        return (*self.vectors.values(), *self.work, self.scratch)

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        """Move the weights w (n,) by one step, in place; g (n,) is their gradient and may be overwritten.

        Both are contiguous arrays of `ops`, of the optimizer's dtype. The caller limits the components of g to 2^50 in
        magnitude, so that their squares, and sums of squares, are finite even in float32. Optimizers that set
        `needs_closure` call `closure`, which fills the same array g. ValueError for arrays of another shape or dtype.
        """
        raise NotImplementedError

    def check_shard(self, w: np.ndarray, g: np.ndarray) -> None:
        """Raise ValueError for w or g of another shape or dtype, which NumPy would broadcast or cast silently."""
        for name, array in (("w", w), ("g", g)):
            if array.shape != (self.n,) or array.dtype != self.dtype:
                raise ValueError(
                    f"{name} is {array.dtype} {array.shape}, but this optimizer steps {self.dtype} {(self.n,)}"
                )


def chunks(n: int) -> Iterator[slice]:
    """Iterate over slices of at most CHUNK elements that cover n elements, in order."""
    for start in range(0, n, CHUNK):
        yield slice(start, min(start + CHUNK, n))
