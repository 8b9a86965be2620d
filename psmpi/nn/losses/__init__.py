"""Losses on raw scores, with their derivatives: one loss in each file."""

from __future__ import annotations

from psmpi.nn.losses.base import SUMS, Loss, OverClasses, OverflowsError, PairwiseLoss, largest_exponent, own_labels
from psmpi.nn.losses.registry import LOSSES, formulas, make_loss

__all__ = [
    "LOSSES",
    "SUMS",
    "Loss",
    "OverClasses",
    "OverflowsError",
    "PairwiseLoss",
    "formulas",
    "largest_exponent",
    "make_loss",
    "own_labels",
]
