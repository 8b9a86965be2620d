"""Command that measures tensors: stats."""

from __future__ import annotations

from bisect import bisect_right
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from psmpi.errors import UserError
from psmpi.inspect.opened import Checkpoint, Opened
from psmpi.inspect.output import figure, print_json
from psmpi.layout import Block, Each
from psmpi.output import Screen

BARS = " ▁▂▃▄▅▆▇█"
PLAIN_BARS = " .:-=+*#@"
BINS = 24
# Most blocks of single classes that are shown one by one.
MANY = 40


class Moments:
    """Statistics of `count` sets of values that are added in pieces; NaN and infinite values are counted separately."""

    def __init__(self, count: int = 1):
        self.total, self.squares = np.zeros(count), np.zeros(count)
        self.least, self.most = np.full(count, np.inf), np.full(count, -np.inf)
        self.counts, self.nan, self.infinite = (np.zeros(count, int) for _ in range(3))

    def add(self, first: int, values: np.ndarray) -> None:
        """Add values (sets, k): k values to each of some consecutive sets, `first` being the first of these."""
        at = slice(first, first + len(values))
        values = values.astype(np.float64, copy=False)
        nan, infinite = np.isnan(values), np.isinf(values)
        self.counts[at] += values.shape[1]
        self.nan[at] += nan.sum(axis=1)
        self.infinite[at] += infinite.sum(axis=1)
        fine = None
        if nan.any() or infinite.any():
            fine = ~(nan | infinite)
            values = np.where(fine, values, 0.0)
        with np.errstate(over="ignore"):
            self.total[at] += values.sum(axis=1)
            self.squares[at] += np.einsum("ij,ij->i", values, values)
        where = True if fine is None else fine
        np.minimum(self.least[at], values.min(axis=1, initial=np.inf, where=where), out=self.least[at])
        np.maximum(self.most[at], values.max(axis=1, initial=-np.inf, where=where), out=self.most[at])

    @property
    def norms(self) -> np.ndarray:
        """2-norms of the finite values, (count,)."""
        return np.sqrt(self.squares)

    def row(self, name: str, k: int = 0) -> dict[str, Any]:
        """Statistics of set `k`: mean, spread (standard deviation), extremes and 2-norm of its finite values."""
        finite = int(self.counts[k] - self.nan[k] - self.infinite[k])
        mean = float(self.total[k]) / finite if finite else 0.0
        square = float(self.squares[k]) / finite - mean * mean if finite else 0.0
        return {
            "name": name,
            "count": int(self.counts[k]),
            "mean": mean,
            "spread": sqrt(square) if square > 0 else 0.0,
            "least": float(self.least[k]) if finite else None,
            "most": float(self.most[k]) if finite else None,
            "norm": sqrt(self.squares[k]),
            "nan": int(self.nan[k]),
            "infinite": int(self.infinite[k]),
        }


def stats(checkpoint: Checkpoint, /, vector: str = "weights", plot: str = "", json: bool = False) -> int:
    """Show statistics of each tensor and part: mean, spread, norm, not-a-number count, histogram.

    Args:
        checkpoint: Checkpoint file, or a run directory for its newest one.
        vector: Vector: weights, one of the optimizer (m, v, ...), or the name of other tensors of the file.
        plot: File for a plot of the histograms: .png, .pdf or .svg. Needs psmpi[plot].
        json: Print JSON.
    """
    if plot and not Path(plot).suffix:
        raise UserError(f"--plot {plot}: expected a name that ends in .png, .svg or .pdf")
    opened = Opened(checkpoint)
    names = [*opened.vectors, *opened.spaces]
    if vector not in names:
        raise UserError(f"{opened.path} has no vector {vector!r}: choose one of {', '.join(names)}")
    layout = opened.contents.layout_of(vector)
    layers, parts = [], [Moments(band.count) for band in layout.bands]
    starts = [band.start for band in layout.bands]
    for tensor in opened.of(vector).values():
        sums = sums_of(opened, vector, tensor.name)
        layers.append({**sums.row(tensor.name), "histogram": histogram(opened, vector, tensor.name, sums)})
        for at, slab in opened.slabs(vector, tensor.name):
            for some in tensor.elements(at, at + len(slab)):
                number = bisect_right(starts, some.offset) - 1
                band, begin = layout.bands[number], some.first - at
                values = slab[begin : begin + some.count * some.length].reshape(some.count, some.length)
                parts[number].add((some.offset - band.start) // band.step, values)
    if plot:
        _draw(Path(plot), opened, vector)
    of_bands = [(band, sums, layout.classes) for band, sums in zip(layout.bands, parts, strict=True)]
    if json:
        rows = [row for of_band in of_bands for row in _rows(*of_band)]
        return print_json({"file": str(opened.path), "vector": vector, "tensors": layers, "parts": rows})
    screen = Screen()
    bars = PLAIN_BARS if screen.ascii else BARS
    shown = [row for of_band in of_bands for row in _shown_rows(*of_band)]
    for title, lines in (("tensors", layers), ("blocks, by the classes that use them", shown)):
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
    """Statistics of all values of the tensor `name` of a vector."""
    sums = Moments()
    for _, slab in opened.slabs(vector, name):
        sums.add(0, slab[None])
    return sums


def histogram(opened: Opened, vector: str, name: str, sums: Moments) -> dict[str, Any]:
    """Histogram of the finite values of a tensor: counts in `BINS` equal bins from least to most, and their edges."""
    low, high = float(sums.least[0]), float(sums.most[0])
    low, high = (low, high) if low <= high else (0.0, 1.0)
    # Equal values get the range that NumPy gives them.
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    counts = np.zeros(BINS, int)
    for _, slab in opened.slabs(vector, name):
        with np.errstate(over="ignore"):
            counts += np.histogram(slab[np.isfinite(slab)].astype(np.float64), bins=BINS, range=(low, high))[0]
    return {"counts": counts.tolist(), "edges": np.linspace(low, high, BINS + 1).tolist()}


def _rows(band: Block, sums: Moments, classes: int) -> list[dict[str, Any]]:
    """Statistics of each block of a band that the file has values of."""
    return [sums.row(_name(band, k, classes), k) for k in np.flatnonzero(sums.counts).tolist()]


def _shown_rows(band: Block, sums: Moments, classes: int) -> list[dict[str, Any]]:
    """Rows of a band for the table: all, or of many classes those with values that are not finite and three by norm."""
    present = np.flatnonzero(sums.counts)
    if len(present) <= MANY:
        return _rows(band, sums, classes)
    bad = present[(sums.nan + sums.infinite)[present] > 0]
    rows = [sums.row(_name(band, k, classes), k) for k in bad[:MANY].tolist()]
    if len(bad) > MANY:
        rows[-1]["name"] += f" and {len(bad) - MANY:,} more"
    order = present[np.argsort(sums.norms[present], kind="stable")]
    of = f"norm of {len(present):,} classes"
    for which, k in (("least", order[0]), ("median", order[len(order) // 2]), ("largest", order[-1])):
        rows.append(sums.row(f"{_name(band, int(k), classes)}, the {which} {of}", int(k)))
    return rows


def _name(band: Block, k: int, classes: int) -> str:
    """Name of the k-th block of a band: the classes that use it."""
    if isinstance(band.users, Each) and band.count > 1:
        return f"class {band.users.first + k}"
    users = band.classes
    if len(users) == classes:
        return "shared by all"
    return "used by none" if not users else ("class " if len(users) == 1 else "classes ") + _ranges(sorted(users))


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
