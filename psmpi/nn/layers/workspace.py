"""Memory that the layers of a model share, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from psmpi.backend import NumpyOps


@dataclass(frozen=True, slots=True)
class Span:
    """The steps that a pass of sequences has.

    lengths: (b,) int32, of each sample, where the model computes; None: all. begins, ends: whether the pass has the
    first and the last chunk of its sequences, and not others before or behind it.
    """

    lengths: np.ndarray | None = None
    begins: bool = True
    ends: bool = True


WHOLE = Span()


class Workspace:
    """Arrays by name, each valid until the next of its name; they grow to the largest use.

    span: of the pass that goes on. finished: called with the number of each part with weights when a backward pass has
    made its gradient.
    """

    def __init__(self, ops: NumpyOps, dtype: np.dtype):
        self.ops, self.dtype = ops, dtype
        self.arrays: dict[str, np.ndarray] = {}
        self.turn, self.span = 1, WHOLE
        self.finished: Callable[[int], None] | None = None

    def take(self, name: str, *shape: int) -> np.ndarray:
        """An array of this shape, its contents undefined."""
        size = prod(shape)
        if name not in self.arrays or self.arrays[name].size < size:
            self.arrays[name] = self.ops.empty(size, self.dtype)
        return self.arrays[name][:size].reshape(shape)

    def gradient(self, *shape: int) -> np.ndarray:
        """An array for the gradient of a layer's input.

        A gradient lives until the layer below has made its own from it: two arrays take turns.
        """
        self.turn = 1 - self.turn
        return self.take(f"gradient {self.turn}", *shape)

    def reserve_gradient(self, size: int) -> None:
        """Make room for gradients of `size` elements."""
        for turn in (0, 1):
            self.take(f"gradient {turn}", size)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())
