"""The rows of the table of epochs, as a person sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, nan
from typing import Any

# How a person sees what tests measure, of which a row has some.
SCORES: dict[str, Callable[[float], str]] = {
    "test_loss": lambda value: f"test loss {value:.5g}",
    "test_accuracy": lambda value: f"test accuracy {100 * value:.2f} %",
    "test_top5": lambda value: f"top 5 {100 * value:.2f} %",
    "test_rmse": lambda value: f"test RMSE {value:.5g}",
}

# What these lines begin with.
NAMES = {"test_loss": "test loss", "test_accuracy": "test accuracy", "test_top5": "top 5", "test_rmse": "test RMSE"}


def describe(row: dict[str, Any], epochs: int) -> str:
    """The line that a person sees for one epoch."""
    # After the loss of the test it is clear what scores are of, and a line has 80 columns.
    shown = [show(row[key]).replace("test accuracy", "accuracy") for key, show in SCORES.items() if key in row]
    return f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.5g}  {'  '.join(shown)}"


def best(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """What counts most of what tests measure, and the first row in which it is best; None where none has it."""
    for key, better in (("test_accuracy", max), ("test_rmse", min), ("test_loss", min)):
        known = [row for row in rows if isfinite(row.get(key, nan))]
        if known:
            return key, better(known, key=lambda row: row[key])
    return None


def duration(seconds: float) -> str:
    """ "12 s", "3:05 min", "2:03:05 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} h"
