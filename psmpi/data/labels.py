"""Checks of labels and values, common to all formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.errors import UserError

MAX_CLASSES = 1 << 20
# Expression for messages that numbers the classes of labels y of any kind.
NUMBERED = "np.unique(y, return_inverse=True)[1]"


def check_range(where: str, labels: npt.NDArray[Any], classes: int) -> None:
    """Raise UserError unless the integers `labels` are in 0..classes-1; `where` names their file."""
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise UserError(
            f"{where}: {len(bad)} labels are out of range, the first being {labels[bad[0]]} of sample "
            f"{bad[0]}; expected labels 0..{classes - 1}; the file is damaged or holds another data set: "
            "fetch it again"
        )


def check_values(where: str, values: npt.NDArray[Any]) -> None:
    """Raise UserError unless the values (n, outputs) are finite and `outputs` is in 1..MAX_CLASSES."""
    if not 1 <= values.shape[1] <= MAX_CLASSES:
        raise UserError(f"{where}: {values.shape[1]} values a sample; expected 1 to {MAX_CLASSES}: save fewer columns")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise UserError(
            f"{where}: {len(bad)} samples have values that are not finite numbers, the first being sample {bad[0]}; "
            "correct or remove such samples"
        )


def check_given(where: str, labels: npt.NDArray[Any]) -> int:
    """Return the largest of the user's labels; UserError unless they are integers from 0 and below MAX_CLASSES."""
    if labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: the targets are {labels.dtype}; expected integers 0..C-1 for classes, or float64 for values: "
            "number the classes from 0 and save them as int64"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise UserError(
            f"{where}: found the negative label {low}; expected 0..C-1; number the classes from 0 on, "
            f"for instance with {NUMBERED}"
        )
    # A far too large label means ids or measurements instead of classes, and would set the size of the network.
    if high >= MAX_CLASSES:
        raise UserError(
            f"{where}: found the label {high}; expected classes numbered from 0, {MAX_CLASSES} at most; "
            f"number them with {NUMBERED}"
        )
    return high
