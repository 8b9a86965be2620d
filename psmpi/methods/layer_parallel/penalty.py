"""Penalties on the weights of residual layers: on their size, and on their change from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.comm.transfers import Boundary, Message, Step


class Penalty:
    """The penalty tik / 2 sum |th_i|^2 + ddt / 2 sum_{i >= 1} |(th_i - th_{i-1}) / h|^2, th_i the weights of layer i.

    tik, ddt: --gamma-tik and --gamma-ddt; h: the step size of the layers. slices: of this rank's layers in its vectors,
    in order. boundaries: to the previous and to the next rank, None at the ends of the row; with ddt they carry the
    weights of one layer.
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
        # The weights of the layers just before and just after this rank's.
        self.previous, self.following = (ops.empty(size, dtype) for _ in range(2))

    @property
    def nbytes(self) -> int:
        return int(self.previous.nbytes + self.following.nbytes)

    def add(self, w: np.ndarray, g: np.ndarray, stride: int = 1) -> float:
        """Add the gradient of the penalty on every `stride`-th layer to g; return this rank's share of the penalty."""
        slices = self.slices[::stride]
        value = 0.0
        if self.tik:
            for at in slices:
                self.ops.combine(g[at], (1.0, g[at]), (self.tik, w[at]))
                value += self.tik / 2 * self.ops.squared_norm(w[at])
        if self.ddt:
            previous, following = self._exchange(w, slices)
            factor = self.ddt / (self.h * stride) ** 2
            layers = [w[at] for at in slices]
            for k, at in enumerate(slices):
                last = layers[k - 1] if k else previous
                after = layers[k + 1] if k + 1 < len(layers) else following
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
        """Exchange weights; return those of the layers just before and just after this rank's, None at the ends."""
        left, right = self.boundaries
        handles = []
        if left is not None:
            handles += [left.begin(None, self.previous), left.begin_back(w[slices[0]], None)]
        if right is not None:
            handles += [right.begin(w[slices[-1]], None), right.begin_back(None, self.following)]
        for handle in handles:
            handle.finish()
        return None if left is None else self.previous, None if right is None else self.following

    def messages(self) -> list[Message]:
        """Return the messages with the previous and with the next rank."""
        messages = []
        for boundary in self.boundaries if self.ddt else ():
            if boundary is not None:
                messages += boundary.messages(Step(1)) + boundary.messages(Step(1), back=True)
        return messages
