"""Synthetic intermediate labels: a random vector for each class, their loss, and classes read from outputs."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.nn.losses import Loss

LAWS = ("uniform", "gaussian", "sign", "orthogonal")


def draw_targets(law: str, units: int, classes: int, seed: int, part: int, scale: float) -> np.ndarray:
    """Return S (units, classes) float32, column j the target of class j, from (law, seed, part) alone, times `scale`.

    uniform: U(0, 1), the reported choice of Karadag and Topaloglu (arXiv 2403.11204). psmpi's own: gaussian, N(0, 1);
    sign, -1 or 1; orthogonal, orthogonal columns with the mean distance of uniform ones, sqrt(units / 6). Raise
    ValueError for orthogonal columns of fewer units than classes.
    """
    rng = np.random.default_rng([seed, part])
    drawn: np.ndarray
    if law == "uniform":
        drawn = rng.random((units, classes), np.float32)
    elif law == "sign":
        drawn = (2 * rng.integers(0, 2, (units, classes)) - 1).astype(np.float32)
    elif law == "gaussian":
        drawn = rng.standard_normal((units, classes), np.float32)
    elif units < classes:
        raise ValueError(f"{classes} columns of {units} units cannot be orthogonal")
    else:
        q, r = np.linalg.qr(rng.standard_normal((units, classes)))
        # The signs of R depend on the library, so they are removed.
        drawn = (q * np.copysign(sqrt(units / 12), np.diag(r))).astype(np.float32)
    drawn *= np.float32(scale)
    return drawn


class TargetDistance(Loss):
    """The loss ||f - S_y||^2 / (units kappa^2) of outputs f (units, b), with kappa the scale of S.

    Through the division, kappa does not change the rate of learning. (psmpi's choice; the paper's loss is not known.)
    """

    name = "targets"

    def __init__(self, targets: np.ndarray, scale: float, ops: NumpyOps | None = None):
        super().__init__(np.dtype(np.float64))
        self.targets, self.share = targets.astype(np.float64), 1 / (len(targets) * scale**2)
        # Copy for the fused kernel.
        self.columns = (ops or NumpyOps()).put(self.targets)

    @property
    def nbytes(self) -> int:
        return int(super().nbytes + self.columns.nbytes)

    def __call__(
        self,
        scores: np.ndarray,
        labels: np.ndarray,
        scale: float,
        grad: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        (z,) = self._buffers(scores, 1)
        np.take(self.targets, labels, axis=1, out=z, mode="clip")
        np.subtract(scores, z, out=z)
        if grad is not None:
            np.multiply(z, 2 * scale * self.share, out=grad)
        return float(np.vdot(z, z)) * scale * self.share

    def fused(self, ops: NumpyOps) -> Callable[..., None] | None:
        distances = ops.fused("distances")
        if distances is None:
            return None

        def compute(
            scores: Any, labels: Any, scale: float, pairs: Any, given: Any, grad: Any, rest: Any, report: Any
        ) -> None:
            distances(scores, self.columns, labels, scale * self.share, grad, report)

        return compute


class LabelReader:
    """Classes read from outputs f (units, b): the nearest column of S, or the largest entry of S^+ f.

    The outputs of least expected squared distance are S p, p (classes, b) the probabilities of the classes, so p = S^+
    f if S has full column rank (derived).
    """

    def __init__(self, targets: np.ndarray):
        self.columns = targets.T.astype(np.float64)
        self.halves = 0.5 * (self.columns**2).sum(axis=1, keepdims=True)
        self.inverse = np.linalg.pinv(targets.astype(np.float64))

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in (self.columns, self.halves, self.inverse))

    def nearest(self, outputs: np.ndarray) -> np.ndarray:
        """Return argmin_j ||f - S_j||, (b,)."""
        places: np.ndarray = (self.columns @ outputs - self.halves).argmax(axis=0)
        return places

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Return S^+ f, (classes, b)."""
        probabilities: np.ndarray = self.inverse @ outputs
        return probabilities
