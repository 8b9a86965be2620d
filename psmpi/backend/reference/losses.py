"""Losses of scores, and derivatives that are scaled to stay finite."""

from __future__ import annotations

import numpy as np

from psmpi.backend.reference.arrays import Arrays


def exponent_of(peak: float) -> int:
    """The power of two by which derivatives of this size are too large for a backward pass; 0 where they are not."""
    return int(np.frexp(peak)[1]) if peak > 2.0**20 else 0


class Losses(Arrays):
    """A report (4,) float64 says how a loss came out, see psmpi.nn.losses.Loss.fused."""

    def cast_scores(self, grad: np.ndarray, out: np.ndarray, report: np.ndarray) -> None:
        """out = grad, over the power of two by which the report says that derivatives are too large."""
        exponent = exponent_of(report[3])
        np.copyto(out, np.ldexp(grad, -exponent) if exponent else grad, casting="same_kind")

    def unscale(self, g: np.ndarray, report: np.ndarray, limit: float) -> None:
        """g times that power of two, in place, limited to `limit` in each component."""
        exponent = exponent_of(report[3])
        if exponent:
            np.copyto(g, np.clip(np.ldexp(g.astype(np.float64), exponent), -limit, limit), casting="same_kind")

    def bound(self, g: np.ndarray, limit: float) -> None:
        """g limited to `limit` in each component, in place; what is not a number stays so."""
        np.clip(g, -limit, limit, out=g)
