"""Penalties on the weights of residual layers: their size, and how fast they change from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.transfers import Boundary, Message, Step


class Penalty:
    """gamma_tik / 2 sum |th_i|^2 + gamma_ddt / 2 sum_{i >= 1} |(th_i - th_{i-1}) / h|^2, th_i the weights of layer i.

    slices: of this rank's layers in its vectors, in the order of the layers. boundaries: to the rank before and behind,
    None at the ends; they carry a layer's weights, and are there where gamma_ddt is not 0.
    """

    def __init__(
        self,
        slices: Sequence[slice],
        boundaries: tuple[Boundary | None, Boundary | None],
        tik: float,
        ddt: float,
        h: float,
        dtype: np.dtype,
        ops: NumpyOps,
    ):
        self.slices, self.boundaries, self.tik, self.ddt, self.h, self.ops = slices, boundaries, tik, ddt, h, ops
        size = max(at.stop - at.start for at in slices) if ddt else 0
        # The weights of the layers before and behind this rank's.
        self.before, self.behind = (ops.empty(size, dtype) for _ in range(2))

    @property
    def nbytes(self) -> int:
        return int(self.before.nbytes + self.behind.nbytes)

    def add(self, w: np.ndarray, g: np.ndarray, stride: int = 1) -> float:
        """Add the gradient of every `stride`-th layer's share to g; returns this rank's share of the penalty."""
        slices = self.slices[::stride]
        value = 0.0
        if self.tik:
            for at in slices:
                self.ops.combine(g[at], (1.0, g[at]), (self.tik, w[at]))
                value += self.tik / 2 * self.ops.squared_norm(w[at])
        if self.ddt:
            before, behind = self._exchange(w, slices)
            factor = self.ddt / (self.h * stride) ** 2
            layers = [w[at] for at in slices]
            for k, at in enumerate(slices):
                last = layers[k - 1] if k else before
                after = layers[k + 1] if k + 1 < len(layers) else behind
                if last is not None:
                    self.ops.combine(g[at], (1.0, g[at]), (factor, layers[k]), (-factor, last))
                    value += factor / 2 * self._distance(layers[k], last)
                if after is not None:
                    self.ops.combine(g[at], (1.0, g[at]), (factor, layers[k]), (-factor, after))
        return value

    def _distance(self, a: np.ndarray, b: np.ndarray) -> float:
        differ = self.ops.scratch("differ", a.size, a.dtype)[: a.size]
        self.ops.combine(differ, (1.0, a), (-1.0, b))
        return self.ops.squared_norm(differ)

    def _exchange(self, w: np.ndarray, slices: Sequence[slice]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The weights of the layers before and behind this rank's, None where there are none."""
        left, right = self.boundaries
        handles = []
        if left is not None:
            handles += [left.begin(None, self.before), left.begin_back(w[slices[0]], None)]
        if right is not None:
            handles += [right.begin(w[slices[-1]], None), right.begin_back(None, self.behind)]
        for handle in handles:
            handle.finish()
        return None if left is None else self.before, None if right is None else self.behind

    def messages(self) -> list[Message]:
        """Those with the rank before and behind."""
        found = []
        for boundary in self.boundaries if self.ddt else ():
            if boundary is not None:
                found += boundary.messages(Step(1)) + boundary.messages(Step(1), back=True)
        return found
