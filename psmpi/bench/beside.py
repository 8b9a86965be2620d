"""Time several functions in turn, and show the times beside those of matrix products and of PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from psmpi.output import Screen

# Warm-up calls.
WARM = 2


def take_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each function in `rounds` rounds, each of which calls the functions in turn."""
    for call in calls.values():
        for _ in range(WARM):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begun))
    return times


def show_beside(rows: list[dict[str, Any]], title: str) -> None:
    """Print a table. Each row has its "kind", the times "ms" of "psmpi" and perhaps "PyTorch", and "products ms"."""
    from rich.table import Table

    table = Table(title=f"ms a step, median (least to largest): {title}", title_justify="left")
    for name in ("layers", "psmpi", "products alone", "ratio", "PyTorch", "psmpi / PyTorch"):
        table.add_column(name, justify="right")
    for row in rows:
        ms = {name: median(times) for name, times in row["ms"].items()}
        spread = {name: f"{ms[name]:.0f} ({min(times):.0f} to {max(times):.0f})" for name, times in row["ms"].items()}
        pytorch = ms.get("PyTorch")
        table.add_row(
            row["kind"], spread["psmpi"], f"{row['products ms']:.0f}", f"{ms['psmpi'] / row['products ms']:.2f}",
            spread.get("PyTorch", ""), "" if pytorch is None else f"{ms['psmpi'] / pytorch:.2f}",
        )  # fmt: skip
    Screen().print(table)
