"""Losses on raw scores, with their derivatives.

Scores are (classes, b), labels (b,) class indices. A loss is computed in float64 whatever the dtype of the scores: the
arrays are small, and so the exponentials of `psl` are exact wherever the scores' own dtype can hold them, and beyond.
"""

from __future__ import annotations

from math import log

import numpy as np

from psmpi.backend import NumpyOps
from psmpi.errors import UserError

# What float64, in which losses are computed, keeps free above the largest exponential, for sums and tangents.
HEADROOM = 60.0


def largest_exponent(dtype: np.dtype) -> float:
    """The largest exponent whose exponential `dtype` represents, and of which float64 can sum many: 88.7 or 649.8."""
    return min(log(np.finfo(dtype).max), log(np.finfo(np.float64).max) - HEADROOM)


class Loss:
    """value += scale * sum over samples of l(scores, label); and d value / d scores.

    `pairwise` losses are sums over ordered pairs (label, other class), so any set of pairs can be computed apart.
    Buffers grow to the largest minibatch seen and are then reused.
    """

    name = ""
    pairwise = False
    constant = 0.0

    def __init__(self, dtype: np.dtype, *, kappa: float = 1.0, exp_clip: float | None = 0.0):
        self.dtype, self.kappa = np.dtype(dtype), float(kappa)
        self.clipped = 0
        self.limit = largest_exponent(self.dtype) if exp_clip == 0.0 else exp_clip
        self._store = np.empty(0)

    @property
    def tangent(self) -> float:
        """The exponent from which psl goes on as its tangent, or beyond which it fails."""
        return largest_exponent(self.dtype) if self.limit is None else self.limit

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return self._store.nbytes

    def check(self, worst: float) -> None:
        """FloatingPointError for a largest exponent that is not finite, or with clipping off beyond the limit."""
        if not worst < np.inf:
            raise FloatingPointError(
                "a score is not a finite number: the training diverged; lower --lr, clip gradients with --clip 1, or "
                "use --loss logistic"
            )
        if self.limit is None and worst > self.tangent:
            raise FloatingPointError(
                f"exp({worst:.1f}) in the PSL loss overflows {self.dtype} and --exp-clip is off: set --exp-clip auto, "
                "lower --lr, clip gradients with --clip 1, or use --loss logistic"
            )

    def _buffers(self, scores: np.ndarray, count: int) -> list[np.ndarray]:
        size = scores.size
        if self._store.size < count * size:
            self._store = np.empty(count * size)
        return [self._store[k * size : (k + 1) * size].reshape(scores.shape) for k in range(count)]

    def __call__(
        self,
        scores: np.ndarray,
        labels: np.ndarray,
        scale: float,
        grad: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
    ) -> float:
        """The scaled sum of the losses; with `grad` (classes, b) float64, also its derivative.

        `pairs` (classes, classes) bool, symmetric, keeps only the terms of those pairs (a pairwise loss only); the
        loss's constant is then left out, for it belongs to no pair.
        """
        raise NotImplementedError

    def derive_there(
        self,
        ops: NumpyOps,
        scores: np.ndarray,
        labels: np.ndarray,
        scale: float,
        pairs: np.ndarray | None,
        own: slice,
        grad: np.ndarray | None,
        report: np.ndarray,
    ) -> bool:
        """The same by `ops` itself, on its arrays, and its report (see `NumpyOps.losses`); False where it cannot."""
        return ops.losses(self.name, scores, labels, scale, self.kappa, self.tangent, pairs, own, grad, report)

    def _margins(self, scores: np.ndarray, labels: np.ndarray, z: np.ndarray) -> np.ndarray:
        """z = kappa (c_j - c_y); returns the flat positions of the labels' own scores."""
        own = labels * scores.shape[1] + np.arange(scores.shape[1])
        np.copyto(z, scores)
        z -= z.ravel()[own]
        z *= self.kappa
        return own

    @staticmethod
    def _close(grad: np.ndarray, own: np.ndarray, scale: float) -> None:
        """Every pair term sees c_j - c_y: the derivative with respect to c_y is minus the sum of the others."""
        grad *= scale
        flat = grad.reshape(-1)
        flat[own] = 0
        flat[own] = -grad.sum(axis=0)


class PSL(Loss):
    """sum_j exp(kappa (c_j - c_y)), the term j = y counted as the constant 1 (Raynaud, Orban, Bigeon, G-2023-36).

    Where kappa (c_j - c_y) exceeds `limit` (by default `largest_exponent`: 88.7 in float32, 649.8 in float64) the
    exponential goes on as its tangent there, exp(limit) (1 + z - limit), so that value and derivative stay finite and
    continuous; `clipped` counts those terms. With limit None (clipping off) such a term is an error.
    """

    name, pairwise, constant = "psl", True, 1.0

    def __call__(self, scores, labels, scale, grad=None, pairs=None):
        z, e = self._buffers(scores, 2)
        own = self._margins(scores, labels, z)
        if pairs is not None:
            # The margins of other workers' pairs do not matter here, whatever they are.
            np.copyto(z, -np.inf, where=~pairs[:, labels])
        limit = self.tangent
        worst = float(z.max(initial=0.0))
        if not worst <= limit:
            self.check(worst)
            self.clipped += int(np.count_nonzero(z > limit))
        np.minimum(z, limit, out=e)
        np.exp(e, out=e)
        e.reshape(-1)[own] = 0
        if worst > limit:
            tail = np.maximum(z - limit, 0)
            # Neither the tangent nor a sum of such terms may leave float64.
            with np.errstate(over="ignore"):
                value = float(np.minimum(e * (1 + tail), np.finfo(np.float64).max / (2 * e.size)).sum())
        else:
            value = float(e.sum())
        if pairs is None:
            value += len(labels)
        if grad is not None:
            np.multiply(e, self.kappa, out=grad)
            self._close(grad, own, scale)
        return value * scale


class PairwiseLogistic(Loss):
    """sum_{j != y} log(1 + exp(kappa (c_j - c_y))): pair terms as in PSL, with derivatives bounded by kappa."""

    name, pairwise = "logistic", True

    def __call__(self, scores, labels, scale, grad=None, pairs=None):
        z, e = self._buffers(scores, 2)
        own = self._margins(scores, labels, z)
        np.logaddexp(0, z, out=e)
        e.reshape(-1)[own] = 0
        if pairs is not None:
            e *= pairs[:, labels]
        value = float(e.sum())
        if grad is not None:
            # The logistic function by tanh, which cannot overflow.
            np.multiply(z, 0.5, out=grad)
            np.tanh(grad, out=grad)
            grad += 1
            grad *= 0.5 * self.kappa
            if pairs is not None:
                grad *= pairs[:, labels]
            self._close(grad, own, scale)
        return value * scale


class CrossEntropy(Loss):
    """-log softmax_y of the scores (NLL): the logarithm ties all scores, so it needs them all."""

    name = "nll"

    def __call__(self, scores, labels, scale, grad=None, pairs=None):
        z, e = self._buffers(scores, 2)
        np.copyto(z, scores)
        z -= z.max(axis=0)
        np.exp(z, out=e)
        total = e.sum(axis=0)
        own = labels * scores.shape[1] + np.arange(scores.shape[1])
        value = float((np.log(total) - z.ravel()[own]).sum())
        if grad is not None:
            np.divide(e, total, out=grad)
            grad.reshape(-1)[own] -= 1
            grad *= scale
        return value * scale


class SquaredError(Loss):
    """sum_j (c_j - [j = y])^2."""

    name = "squared"

    def __call__(self, scores, labels, scale, grad=None, pairs=None):
        (z,) = self._buffers(scores, 1)
        np.copyto(z, scores)
        z.reshape(-1)[labels * scores.shape[1] + np.arange(scores.shape[1])] -= 1
        value = float(np.vdot(z, z))
        if grad is not None:
            np.multiply(z, 2 * scale, out=grad)
        return value * scale


LOSSES: dict[str, type[Loss]] = {cls.name: cls for cls in (PSL, PairwiseLogistic, CrossEntropy, SquaredError)}


def make_loss(name: str, dtype: np.dtype, *, kappa: float = 1.0, exp_clip: str = "auto") -> Loss:
    """The loss called `name`; exp_clip: auto, off or the exponent from which psl goes on as its tangent.

    UserError where the name is unknown, kappa is not positive or exp_clip is none of these.
    """
    if name not in LOSSES:
        raise UserError(f"--loss {name!r} is unknown: choose one of {', '.join(LOSSES)}")
    if not 0 < kappa <= 1e6:
        raise UserError(f"--kappa {kappa}: expected a number above 0 and up to 1e6, usually 1 or 2")
    try:
        limit = {"auto": 0.0, "off": None}[exp_clip] if exp_clip in ("auto", "off") else float(exp_clip)
    except ValueError:
        limit = -1.0
    if limit is not None and not 0 <= limit <= largest_exponent(dtype):
        raise UserError(
            f"--exp-clip {exp_clip}: expected auto, off, or an exponent from 0 to {largest_exponent(dtype):.1f} "
            f"(the largest one for {np.dtype(dtype)})"
        )
    return LOSSES[name](dtype, kappa=kappa, exp_clip=limit)
