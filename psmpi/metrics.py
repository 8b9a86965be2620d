"""The rows of the table of epochs, as a person sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# How a person sees what tests measure, of which a row has some.
SCORES: dict[str, Callable[[float], str]] = {
    "test_loss": lambda value: f"test loss {value:.5g}",
    "test_accuracy": lambda value: f"test accuracy {100 * value:.2f} %",
    "test_top5": lambda value: f"top 5 {100 * value:.2f} %",
    "test_rmse": lambda value: f"test RMSE {value:.5g}",
}


def describe(row: dict[str, Any], epochs: int) -> str:
    """The line that a person sees for one epoch."""
    moved = row["bytes_sent"] / 1e6
    shown = [show(row[key]) for key, show in SCORES.items() if key in row]
    return (
        f"epoch {row['epoch']:>3}/{epochs}  step {row['step']:>6}  train loss {row['train_loss']:.5g}  "
        f"{'  '.join(shown)}  {row['samples_per_second']:.0f} samples/s  {moved:.1f} MB sent"
    )
