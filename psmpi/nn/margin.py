"""Margins that training subtracts from the label's score, for scores that are scaled cosines."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Largest margin of each kind: a right angle, and the largest difference of two cosines.
LARGEST = {"arcface": np.pi / 2, "cosface": 2.0}


class Margin(NamedTuple):
    """Margin m = `size` that replaces the label's score s cos(theta), before the loss and its sums over classes.

    - arc: s cos(theta + m) (Deng et al. 2019, "ArcFace", eq. 3) or, if theta + m > pi, s (cos(theta) - m sin(m)), which
      decreases further with theta (as the authors' code, InsightFace);
    - otherwise: s (cos(theta) - m) (Wang et al. 2018, "CosFace", eq. 4).

    The derivative of the loss is multiplied by the slope of this function, sin(theta + m) / sin(theta) for arc. `least`
    is a lower bound of sin(theta)^2 = 1 - cos(theta)^2, which rounding could make 0.
    """

    arc: bool
    size: float
    scale: float
    least: float


def make_margin(kind: str, size: float, scale: float, dtype: np.dtype) -> Margin | None:
    """Return the margin of a kind for scores of a dtype; None if `size` is 0."""
    return Margin(kind == "arcface", size, scale, float(np.finfo(dtype).eps)) if size else None
