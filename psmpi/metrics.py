"""The rows of the table of epochs, as a person sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite, nan
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

# What these lines begin with.
NAMES = {key: show(0.0).partition(" 0")[0] for key, show in SCORES.items()}


def describe(row: dict[str, Any], epochs: int) -> str:
    """The line that a person sees for one epoch."""
    # After the loss of the test it is clear what scores are of, and a line has 80 columns.
    shown = [
        show(row[key]).removeprefix(f"{key.partition('_')[0]} " if key.endswith("accuracy") else "")
        for key, show in SCORES.items()
        if key in row
    ]
    return f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.5g}  {'  '.join(shown)}"


def best(rows: Sequence[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """The key of the score that counts most, and the first row in which it is best; None where no row has one."""
    kinds = (("accuracy", max), ("rmse", min), ("loss", min))
    for key, better in ((f"{split}_{name}", better) for split in ("validation", "test") for name, better in kinds):
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
