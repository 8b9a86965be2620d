"""The table of epochs, as JSON lines in the run directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# How a person sees what tests measure, of which a row has some.
SCORES: dict[str, Callable[[float], str]] = {
    "test_loss": lambda value: f"test loss {value:.5g}",
    "test_accuracy": lambda value: f"test accuracy {100 * value:.2f} %",
    "test_top5": lambda value: f"top 5 {100 * value:.2f} %",
    "test_rmse": lambda value: f"test RMSE {value:.5g}",
}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file's rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def append_row(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def describe(row: dict[str, Any], epochs: int) -> str:
    """The line that a person sees for one epoch."""
    moved = row["bytes_sent"] / 1e6
    shown = [show(row[key]) for key, show in SCORES.items() if key in row]
    return (
        f"epoch {row['epoch']:>3}/{epochs}  step {row['step']:>6}  train loss {row['train_loss']:.5g}  "
        f"{'  '.join(shown)}  {row['samples_per_second']:.0f} samples/s  {moved:.1f} MB sent"
    )
