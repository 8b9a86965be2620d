"""Optimizers that step in host memory, for shards in a device's."""

from __future__ import annotations

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.optim.base import AllSum, Closure, Optimizer


class Hosted(Optimizer):
    """Steps a device's shard by an optimizer that computes on the host: weights and gradient are copied for each use.

    Its state is in host memory.
    """

    def __init__(self, optimizer: Optimizer, ops: NumpyOps) -> None:
        super().__init__(optimizer.n, optimizer.dtype)
        self.optimizer, self.ops = optimizer, ops
        self.needs_closure = optimizer.needs_closure
        self.vectors, self.scalars, self.scratch = optimizer.vectors, optimizer.scalars, optimizer.scratch
        self.w, self.g = (np.empty(self.n, self.dtype) for _ in range(2))

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        self.check_shard(w, g)
        there = [self.ops.mirror(array) for array in (w, g)]

        def bring() -> None:
            for mirror, here in zip(there, (self.w, self.g), strict=True):
                mirror.fetch()
                mirror.wait()
                here[...] = mirror.host

        def take() -> None:
            there[0].settle()
            there[0].host[...] = self.w
            there[0].push()

        def value() -> float:
            assert closure is not None
            take()
            found = closure()
            there[1].fetch()
            there[1].wait()
            self.g[...] = there[1].host
            return found

        bring()
        self.optimizer.step(self.w, self.g, lr, allsum, None if closure is None else value)
        take()
        there[0].settle()
