"""The table of epochs, as JSON lines in the run directory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file's rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def append_row(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def describe(row: dict[str, Any], epochs: int) -> str:
    """The line that a person sees for one epoch."""
    moved = row["bytes_sent"] / 1e6
    return (
        f"epoch {row['epoch']:>3}/{epochs}  step {row['step']:>6}  train loss {row['train_loss']:.5g}  "
        f"test loss {row['test_loss']:.5g}  test accuracy {100 * row['test_accuracy']:.2f} %  "
        f"{row['samples_per_second']:.0f} samples/s  {moved:.1f} MB sent"
    )
