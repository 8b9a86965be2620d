"""Workspace: memory that the layers of a model use in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from psmpi.backend import NumpyOps


@dataclass(frozen=True, slots=True)
class Span:
    """Steps of sequences that a pass covers.

    lengths: (b,) int32, steps of each sample, on the model's device; None: all steps. begins, ends: whether the pass
    has the first and the last chunk of its sequences.
    """

    lengths: np.ndarray | None = None
    begins: bool = True
    ends: bool = True


WHOLE = Span()


class Workspace:
    """Arrays by name, each valid until the next `take` of the same name; arrays grow to the largest use.

    span: span of the current pass. finished: function that a backward pass calls with the number of a part with weights
    once the part's gradient is complete.
    """

    def __init__(self, ops: NumpyOps, dtype: np.dtype):
        self.ops, self.dtype = ops, dtype
        self.arrays: dict[str, np.ndarray] = {}
        self.turn, self.span = 1, WHOLE
        self.finished: Callable[[int], None] | None = None

    def take(self, name: str, *shape: int) -> np.ndarray:
        """Return the array called `name` with shape `shape` and undefined contents."""
        size = prod(shape)
        if name not in self.arrays or self.arrays[name].size < size:
            self.arrays[name] = self.ops.empty(size, self.dtype)
        return self.arrays[name][:size].reshape(shape)

    def gradient(self, *shape: int) -> np.ndarray:
        """Return an array for the gradient of a layer's input.

        Two arrays alternate: a gradient is valid until the layer below has computed its own gradient from it.
        """
        self.turn = 1 - self.turn
        return self.take(f"gradient {self.turn}", *shape)

    def reserve_gradient(self, size: int) -> None:
        """Allocate memory for gradients of `size` elements."""
        for turn in (0, 1):
            self.take(f"gradient {turn}", size)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays.values())
