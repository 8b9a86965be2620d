"""Muon update rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike

from psmpi.backend import NumpyOps
from psmpi.layout import Matrix
from psmpi.optim.base import AllSum, Closure
from psmpi.optim.orthogonal import NewtonSchulz
from psmpi.optim.rules.adamw import AdamW

# Learning rate of AdamW over that of the matrices: 3e-4 / 0.02, the defaults of the authors' implementation.
ADAM_RATE = 0.015


class Muon(AdamW):
    """Muon: momentum with orthogonalized steps for whole matrices; AdamW at 0.015 lr for all other weights.

    m = momentum m + (1 - momentum) g; u = momentum m + (1 - momentum) g (Nesterov's form);
    w -= lr sqrt(max(1, rows / columns)) O(u), where O is the Newton-Schulz iteration of `NewtonSchulz`. Both rules
    apply decoupled weight decay (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks").

    matrices: matrices of the shard, as from `psmpi.layout.whole_matrices`. vectors: "m", the momentum of matrices and
    AdamW's first moment; "v", AdamW's second moment, 0 in matrices. ValueError for matrices that overlap or are not
    inside the shard.
    """

    summary = "orthogonalized momentum of matrices, AdamW for other weights"
    settings = ("momentum", "beta1", "beta2", "eps", "weight_decay")
    usual: ClassVar[Mapping[str, float]] = {"momentum": 0.95}
    needs_matrices = True
    momentum: float

    def __init__(
        self,
        n: int,
        dtype: DTypeLike,
        *,
        matrices: Sequence[Matrix],
        ops: NumpyOps | None = None,
        **settings: float | None,
    ) -> None:
        super().__init__(n, dtype, ops=ops, **settings)
        self.matrices = sorted(matrices, key=lambda matrix: matrix.start)
        edges = [0, *(edge for m in self.matrices for edge in (m.place.start, m.place.stop)), n]
        if sorted(edges) != edges:
            raise ValueError(f"matrices {self.matrices} overlap or are not inside the {n} elements of the shard")
        self.outside_matrices = [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        self.orthogonalize = NewtonSchulz(self.matrices, self.dtype, self.ops)
        self.work = self.orthogonalize.work

    def step(self, w: np.ndarray, g: np.ndarray, lr: float, allsum: AllSum, closure: Closure | None = None) -> None:
        self.check_shard(w, g)
        lr = float(lr)
        self.scalars["t"] += 1
        for part in self.outside_matrices:
            self.sweep(w[part], g[part], ADAM_RATE * lr, [vector[part] for vector in self.vectors.values()])
        for matrix in self.matrices:
            self.step_matrix(w[matrix.place], g[matrix.place], lr, matrix)

    def step_matrix(self, w: np.ndarray, g: np.ndarray, lr: float, matrix: Matrix) -> None:
        """Step the elements w (rows * columns,) of a matrix along g (rows * columns,)."""
        m, u = self.vectors["m"][matrix.place], self.orthogonalize.input(matrix)
        for into in (m, u):
            self.ops.combine(into, (self.momentum, m), (1 - self.momentum, g))
        self.orthogonalize(matrix)
        length = lr * sqrt(max(1, matrix.rows / matrix.columns))
        self.ops.combine(w, (1 - lr * self.weight_decay, w), (-length, u))
