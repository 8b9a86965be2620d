"""Texts for the rows of metrics.jsonl: losses and scores of an epoch, and times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite, nan
from typing import Any

# Figures that are measured on test and validation samples, and the text of each.
_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.5g}",
    "accuracy": lambda value: f"accuracy {100 * value:.2f} %",
    "top5": lambda value: f"top 5 {100 * value:.2f} %",
    "rmse": lambda value: f"RMSE {value:.5g}",
}


def _show(before: str, name: str, value: float) -> str:
    return before + _SHOWN[name](value)


# Keys of these figures in a row of metrics.jsonl, and the text of each.
SCORES: dict[str, Callable[[float], str]] = {
    f"{split}_{name}": partial(_show, "" if name == "top5" else f"{split} ", name)
    for split in ("test", "validation")
    for name in _SHOWN
}

# The name at the start of each text.
NAMES = {key: show(0.0).partition(" 0")[0] for key, show in SCORES.items()}


def describe(row: dict[str, Any], epochs: int) -> str:
    """The line of text for one epoch. row: its row of metrics.jsonl; epochs: number of epochs of the run."""
    # The loss comes first and names the split. The accuracy does not repeat it, so that the line fits 80 columns.
    shown = [
        show(row[key]).removeprefix(f"{key.partition('_')[0]} " if key.endswith("accuracy") else "")
        for key, show in SCORES.items()
        if key in row
    ]
    return f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.5g}  {'  '.join(shown)}"


def best(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """The key of the most important score and the first row with its best value; None if no row has a finite score.

    Scores of validation samples come before those of test samples, accuracy before RMSE before loss.
    """
    kinds = (("accuracy", max), ("rmse", min), ("loss", min))
    for key, better in ((f"{split}_{name}", better) for split in ("validation", "test") for name, better in kinds):
        measured = [row for row in rows if isfinite(row.get(key, nan))]
        if measured:
            return key, better(measured, key=lambda row: row[key])
    return None


def duration(seconds: float) -> str:
    """A time in seconds as text: "9.1 s", "12 s", "3:05 min", "2:03:05 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02} h"
