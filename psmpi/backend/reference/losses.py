"""Margins of scores, and scaling of derivatives by a power of two, which keeps a backward pass finite."""

from __future__ import annotations

import numpy as np

from psmpi.backend.reference.arrays import Arrays


def exponent_of(peak: float) -> int:
    """The exponent of the power of two that divides derivatives with this largest size; 0 up to 2^20."""
    return int(np.frexp(peak)[1]) if peak > 2.0**20 else 0


class Losses(Arrays):
    """Operations on scores and derivatives. A report (4,) float64 summarizes a loss: see psmpi.nn.losses.Loss.fused."""

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
        """Apply the margin of psmpi.nn.margin to the scores (classes, b) of the labels (b,), in place.

        slopes: (b,) float64, filled with the derivatives of the new scores by the old; 1 for labels outside the
        classes.
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
        """Multiply the derivatives grad (classes, b) of the labels' scores by slopes (b,), in place.

        report[3], the largest absolute derivative, grows if needed.
        """
        own = np.flatnonzero((labels >= 0) & (labels < len(grad)))
        grad[labels[own], own] *= slopes[own]
        report[3] = max(report[3], np.abs(grad[labels[own], own]).max(initial=0.0))

    def cast_scores(self, grad: np.ndarray, out: np.ndarray, report: np.ndarray) -> None:
        """out = grad / 2^exponent_of(report[3]), in the dtype of out."""
        exponent = exponent_of(report[3])
        np.copyto(out, np.ldexp(grad, -exponent) if exponent else grad, casting="same_kind")

    def unscale(self, g: np.ndarray, report: np.ndarray, limit: float) -> None:
        """g *= 2^exponent_of(report[3]), in place; a scaled g is clipped to [-limit, limit]."""
        exponent = exponent_of(report[3])
        if exponent:
            np.copyto(g, np.clip(np.ldexp(g.astype(np.float64), exponent), -limit, limit), casting="same_kind")

    def bound(self, g: np.ndarray, limit: float) -> None:
        """Clip g to [-limit, limit], in place; NaN stays NaN."""
        np.clip(g, -limit, limit, out=g)
