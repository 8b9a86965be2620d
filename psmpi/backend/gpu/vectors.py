"""Operations on flat vectors on a GPU: linear combinations, scalar products and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from psmpi.backend.gpu.device import Device
from psmpi.backend.gpu.grids import BLOCKS, blocks
from psmpi.backend.reference.moves import Mirror


class DeviceVectors(Device):
    """Operations by the kernels of cuda/vector.cu. sums: mirror (64 or more,) float64 of scalar products."""

    sums: Mirror

    def squared_norm(self, g: Any) -> float:
        return float(self.dots([(g, g)])[0])

    def scale(self, g: Any, factor: float) -> None:
        self.spread("scale", g.dtype, g.size, g.size, g, factor)

    def combine(self, out: Any, *terms: tuple[float, Any]) -> None:
        # A launch takes up to four terms; the sum so far is the first term of the next launch.
        for k in range(1, max(2, len(terms)), 3):
            some = [(1.0, out) if k > 1 else terms[0], *terms[k : k + 3]]
            some += [(0.0, 0)] * (4 - len(some))
            arrays, factors = [array for _, array in some], [float(factor) for factor, _ in some]
            self.spread("combine", out.dtype, out.size, out.size, out, *arrays, *factors)

    def dots(self, pairs: Sequence[tuple[Any, Any]]) -> np.ndarray:
        n = pairs[0][0].size if pairs else 0
        if not n:
            return np.zeros(len(pairs))
        each, partial = self._shares(len(pairs), n)
        for k in range(0, len(pairs), 4):
            some = [array for pair in pairs[k : k + 4] for array in pair]
            some += [0] * (8 - len(some))
            self.launch("dots", pairs[0][0].dtype, (each,), (256,), n, *some, partial[k * each :])
        return self._sums(len(pairs), each, partial, pairs[0][0].dtype)

    def abs_sum(self, x: Any) -> float:
        if not x.size:
            return 0.0
        each, partial = self._shares(1, x.size)
        self.launch("abs_sum", x.dtype, (each,), (256,), x.size, x, partial)
        return float(self._sums(1, each, partial, x.dtype)[0])

    def multiply(self, x: Any, by: Any) -> None:
        self.spread("multiply", x.dtype, x.size, x.size, x, by)

    def _shares(self, count: int, n: int) -> tuple[int, Any]:
        """The number of blocks for a sum over n elements, and scratch for the partial results of `count` sums."""
        if count > self.sums.host.size:
            self.sums = self.mirror(self.zeros(count, np.dtype(np.float64)))
        each = min(blocks(n, 1024), BLOCKS)
        # Allocate for the largest number of sums at once: allocating again would discard recorded graphs.
        return each, self.partial(self.sums.host.size * each, np.dtype(np.float64))

    def _sums(self, count: int, each: int, partial: Any, dtype: np.dtype) -> np.ndarray:
        """Add up the partial results of `each` blocks to the sums (count,), with the kernels of `dtype`."""
        self.launch("sum_partials", dtype, (count,), (256,), each, partial, self.sums.array)
        self.sums.fetch(slice(count))
        self.sums.wait()
        sums: np.ndarray = self.sums.host[:count].copy()
        return sums
