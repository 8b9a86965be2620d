"""The rows of the table of epochs, as a person sees them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

# What is measured on test samples, or on those for validation, and how a person sees it.
_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.5g}",
    "accuracy": lambda value: f"accuracy {100 * value:.2f} %",
    "top5": lambda value: f"top 5 {100 * value:.2f} %",
    "rmse": lambda value: f"RMSE {value:.5g}",
}


def _show(before: str, name: str, value: float) -> str:
    return before + _SHOWN[name](value)


# The keys of rows that have these, and how a person sees them.
SCORES: dict[str, Callable[[float], str]] = {
    f"{split}_{name}": partial(_show, "" if name == "top5" else f"{split} ", name)
    for split in ("test", "validation")
    for name in _SHOWN
}


def describe(row: dict[str, Any], epochs: int) -> str:
    """The line that a person sees for one epoch."""
    moved = row["bytes_sent"] / 1e6
    shown = [show(row[key]) for key, show in SCORES.items() if key in row]
    return (
        f"epoch {row['epoch']:>3}/{epochs}  step {row['step']:>6}  train loss {row['train_loss']:.5g}  "
        f"{'  '.join(shown)}  {row['samples_per_second']:.0f} samples/s  {moved:.1f} MB sent"
    )
