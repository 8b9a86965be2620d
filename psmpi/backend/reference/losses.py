"""Losses of scores, and derivatives that are scaled to stay finite."""

from __future__ import annotations

import numpy as np

from psmpi.backend.reference.arrays import Arrays


def exponent_of(peak: float) -> int:
    """The power of two by which derivatives of this size are too large for a backward pass; 0 where they are not."""
    return int(np.frexp(peak)[1]) if peak > 2.0**20 else 0


class Losses(Arrays):
    """A report (4,) float64 says how a loss came out, see psmpi.nn.losses.Loss.fused."""

    def add_margins(
        self,
        scores: np.ndarray,
        labels: np.ndarray,
        arc: bool,
        size: float,
        scale: float,
        least: float,
        slopes: np.ndarray,
    ) -> None:
        """Scores (classes, b) of labels (b,) get a margin, see psmpi.nn.margin; slopes (b,) float64: their derivatives.

        Labels that are not among the classes have the slope 1.
        """
        own = np.flatnonzero((labels >= 0) & (labels < len(scores)))
        at = labels[own], own
        slopes.fill(1)
        if not arc:
            scores[at] -= scale * size
            return
        cosine = np.clip(scores[at].astype(np.float64) / scale, -1, 1)
        sine = np.sqrt(np.maximum(1 - cosine**2, least))
        inside = cosine > -np.cos(size)
        turned = np.cos(size) * cosine - np.sin(size) * sine
        scores[at] = scale * np.where(inside, turned, cosine - size * np.sin(size))
        slopes[own] = np.where(inside, np.cos(size) + np.sin(size) * cosine / sine, 1)

    def multiply_labels(self, grad: np.ndarray, labels: np.ndarray, slopes: np.ndarray, report: np.ndarray) -> None:
        """Derivatives (classes, b) of labels' scores times slopes (b,); the report's largest derivative follows."""
        own = np.flatnonzero((labels >= 0) & (labels < len(grad)))
        grad[labels[own], own] *= slopes[own]
        report[3] = max(report[3], np.abs(grad[labels[own], own]).max(initial=0.0))

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
