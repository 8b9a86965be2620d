"""Margins that training puts between a label's score and the others, where scores are scale times cosines."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# The largest margin of each kind: a right angle, and all that two cosines can be apart.
LARGEST = {"arcface": np.pi / 2, "cosface": 2.0}


class Margin(NamedTuple):
    """The label's score s cos(theta) becomes, before the loss and its sums over classes,

    - arc: s cos(theta + m) (Deng et al. 2019, "ArcFace", eq. 3) and, where theta + m > pi, s (cos(theta) - m sin(m)),
      which goes on falling with theta (the authors' code, InsightFace);
    - else: s (cos(theta) - m) (Wang et al. 2018, "CosFace", eq. 4).

    The loss's derivative is then times the slope, of arc sin(theta + m) / sin(theta): sin(theta)^2 is taken for `least`
    where it is less, what rounding leaves of 1 - cos(theta)^2.
    """

    arc: bool
    size: float
    scale: float
    least: float


def make_margin(kind: str, size: float, scale: float, dtype: np.dtype) -> Margin | None:
    """The margin of a kind for scores of a dtype, None without one."""
    return Margin(kind == "arcface", size, scale, float(np.finfo(dtype).eps)) if size else None
