"""The command that measures tensors: stats."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from psmpi.errors import UserError
from psmpi.inspect.opened import Checkpoint, Opened
from psmpi.inspect.output import figure, print_json
from psmpi.layout import Classes
from psmpi.output import Screen

BARS = " ▁▂▃▄▅▆▇█"
PLAIN_BARS = " .:-=+*#@"
BINS = 24


@dataclass
class Moments:
    """Statistics of values that come in pieces; not-a-number and infinite ones are counted apart."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    least: float = inf
    most: float = -inf
    nan: int = 0
    infinite: int = 0

    def add(self, values: np.ndarray) -> None:
        values = values.astype(np.float64, copy=False).ravel()
        self.count += values.size
        nan = int(np.isnan(values).sum())
        infinite = int(np.isinf(values).sum())
        if nan or infinite:
            values = values[np.isfinite(values)]
        self.nan += nan
        self.infinite += infinite
        if values.size:
            with np.errstate(over="ignore"):
                self.total += float(values.sum())
                self.squares += float(values @ values)
            self.least = min(self.least, float(values.min()))
            self.most = max(self.most, float(values.max()))

    @property
    def norm(self) -> float:
        return sqrt(self.squares)

    def row(self, name: str) -> dict[str, Any]:
        """Mean, spread (standard deviation), extremes and 2-norm of the finite values."""
        finite = self.count - self.nan - self.infinite
        mean = self.total / finite if finite else 0.0
        square = self.squares / finite - mean * mean if finite else 0.0
        spread = sqrt(square) if square > 0 else 0.0
        return {
            "name": name,
            "count": self.count,
            "mean": mean,
            "spread": spread,
            "least": self.least if finite else None,
            "most": self.most if finite else None,
            "norm": self.norm,
            "nan": self.nan,
            "infinite": self.infinite,
        }


def stats(checkpoint: Checkpoint, /, vector: str = "weights", plot: str = "", json: bool = False) -> int:
    """Statistics of each tensor and of each part: mean, spread, norm, not-a-number count, histogram.

    Args:
        checkpoint: Checkpoint file or run directory.
        vector: weights, a vector of the optimizer (m, v, ...), or the name of other tensors of the file.
        plot: Also draw the histograms into this file (.png, .pdf or .svg); needs psmpi[plot].
        json: Print JSON.
    """
    if plot and not Path(plot).suffix:
        raise UserError(f"--plot {plot}: expected a name that ends in .png, .svg or .pdf")
    opened = Opened(checkpoint)
    known = [*opened.vectors, *opened.spaces]
    if vector not in known:
        raise UserError(f"{opened.path} has no vector {vector!r}: choose one of {', '.join(known)}")
    layout = opened.contents.layout_of(vector)
    layers, parts = [], {block.classes: Moments() for block in layout.blocks}
    starts = [block.start for block in layout.blocks]
    for tensor in opened.of(vector).values():
        sums = sums_of(opened, vector, tensor.name)
        layers.append({**sums.row(tensor.name), "histogram": histogram(opened, vector, tensor.name, sums)})
        owners = [layout.blocks[bisect_right(starts, offset) - 1].classes for _, _, offset in tensor.spans]
        for at, slab in opened.slabs(vector, tensor.name):
            for (first, last, _), classes in zip(tensor.spans, owners, strict=True):
                parts[classes].add(slab[max(first - at, 0) : max(last - at, 0)])
    everyone = Classes.of(range(layout.classes))
    rows = [sums.row(_block(classes, everyone)) for classes, sums in parts.items() if sums.count]
    if plot:
        _draw(Path(plot), opened, vector)
    if json:
        return print_json({"file": str(opened.path), "vector": vector, "tensors": layers, "parts": rows})
    screen = Screen()
    bars = PLAIN_BARS if screen.ascii else BARS
    for title, lines in (("tensors", layers), ("blocks, by the classes that use them", rows)):
        table = Table(title=title, title_justify="left")
        table.add_column("name")
        for name in ("count", "mean", "spread", "least", "most", "norm", "nan", "inf"):
            table.add_column(name, justify="right")
        if lines is layers:
            table.add_column("histogram, least to most", no_wrap=True)
        for line in lines:
            figures = (figure(line[name]) for name in ("mean", "spread", "least", "most", "norm"))
            cells = [line["name"], f"{line['count']:,}", *figures, str(line["nan"]), str(line["infinite"])]
            table.add_row(*cells, *([_bars(line["histogram"]["counts"], bars)] if lines is layers else []))
        screen.print(table)
    return 0


def sums_of(opened: Opened, vector: str, name: str) -> Moments:
    sums = Moments()
    for _, slab in opened.slabs(vector, name):
        sums.add(slab)
    return sums


def histogram(opened: Opened, vector: str, name: str, sums: Moments) -> dict[str, Any]:
    """Counts of the finite values of a tensor in `BINS` equal bins from least to most."""
    low, high = (sums.least, sums.most) if sums.least <= sums.most else (0.0, 1.0)
    # As NumPy does for values that are all equal.
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    counts = np.zeros(BINS, int)
    for _, slab in opened.slabs(vector, name):
        with np.errstate(over="ignore"):
            counts += np.histogram(slab[np.isfinite(slab)].astype(np.float64), bins=BINS, range=(low, high))[0]
    return {"counts": counts.tolist(), "edges": np.linspace(low, high, BINS + 1).tolist()}


def _block(classes: Classes, everyone: Classes) -> str:
    if classes == everyone:
        return "shared by all"
    return "used by none" if not classes else ("class " if len(classes) == 1 else "classes ") + _ranges(sorted(classes))


def _ranges(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _draw(path: Path, opened: Opened, vector: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'psmpi[plot]'") from None
    columns = 3
    tensors = list(opened.of(vector).values())
    lines = -(-len(tensors) // columns)
    figure = Figure(figsize=(4 * columns, 2.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, tensor in zip(axes, tensors, strict=False):
        bins = histogram(opened, vector, tensor.name, sums_of(opened, vector, tensor.name))
        axis.stairs(bins["counts"], bins["edges"], fill=True)
        axis.set_title(tensor.name if any(bins["counts"]) else f"{tensor.name}: none finite")
    for axis in axes[len(tensors) :]:
        axis.remove()
    figure.suptitle(f"{vector}, step {opened.contents.progress.step}")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from None


def _bars(counts: list[int], bars: str) -> str:
    top = max(counts, default=0) or 1
    return "".join(bars[-(-count * (len(bars) - 1) // top)] for count in counts)
