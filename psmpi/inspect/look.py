"""The commands that only look: show, list, stats, diff, verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf, isfinite, prod, sqrt
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from tyro.conf import Positional, arg

from psmpi.checkpoint import available, read_contents
from psmpi.checkpoint.format import NAME, table_path
from psmpi.checkpoint.scan import damaged_parts
from psmpi.errors import DamagedError, UserError
from psmpi.inspect.opened import Opened

Checkpoint = Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
BARS = " ▁▂▃▄▅▆▇█"
BINS = 24


def show(checkpoint: Checkpoint, /, json: bool = False) -> int:
    """Show what a checkpoint holds: tensors with shapes, sizes and norms, the configuration, the score so far.

    Args:
        checkpoint: Checkpoint file or run directory.
        json: Print JSON.
    """
    opened = Opened(checkpoint)
    contents = opened.contents
    tensors: dict[str, list[dict[str, Any]]] = {}
    for vector in opened.vectors:
        tensors[vector] = [
            {
                "name": tensor.name,
                "shape": tensor.shape,
                "dtype": str(opened.dtype),
                "bytes": tensor.size * opened.dtype.itemsize,
                "norm": _number(_sums(opened, vector, tensor.name).norm),
            }
            for tensor in opened.tensors.values()
        ]
    found = {
        **opened.describe(),
        "bytes": opened.path.stat().st_size,
        "tensors": tensors,
        "elements": [
            {"name": name, "shape": shape, "dtype": str(dtype), "bytes": prod(shape) * dtype.itemsize}
            for name, (shape, dtype) in opened.tables.items()
        ],
        "scalars": dict(contents.scalars),
        "config": opened.settings(),
        "metrics": list(contents.progress.rows),
        "placement": dict(contents.placement),
        "provenance": dict(contents.provenance),
    }
    if json:
        return _print_json(found)
    tree = Tree(f"{opened.path}  {_size(found['bytes'])}")
    part = "" if contents.part is None else f", the part of the classes {' '.join(map(str, contents.part))}"
    tree.add(f"step {found['step']}, epoch {found['epoch']}, test accuracy {_percent(found['accuracy'])}{part}")
    for vector, rows in tensors.items():
        size = sum(row["bytes"] for row in rows)
        branch = tree.add(f"{vector}  {len(rows)} tensors, {_size(size)}")
        for row in rows:
            shape = " x ".join(map(str, row["shape"]))
            branch.add(f"{row['name']}  {row['dtype']} {shape}  {_size(row['bytes'])}  norm {_figure(row['norm'])}")
    if opened.tables:
        rows, size = next(iter(opened.tables.values()))[0][0], sum(table["bytes"] for table in found["elements"])
        branch = tree.add(f"elements  {rows} elements, {_size(size)}")
        for table in found["elements"]:
            shape = " x ".join(map(str, table["shape"]))
            branch.add(f"{table['name']}  {table['dtype']} {shape}  {_size(table['bytes'])}")
    if contents.scalars:
        tree.add("scalars  " + "  ".join(f"{name} = {value}" for name, value in contents.scalars.items()))
    branch = tree.add("configuration")
    sections: dict[str, list[str]] = {}
    for name, value in found["config"].items():
        section, _, key = name.partition(".")
        sections.setdefault(section, []).append(f"{key} = {value!r}")
    for section, lines in sections.items():
        branch.add(f"{section}: {', '.join(lines)}")
    branch = tree.add("origin")
    for name, value in contents.provenance.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        branch.add(f"{name}: {' '.join(value) if isinstance(value, list) else value}")
    _console().print(tree, markup=False, highlight=False)
    return 0


def list_(run: Positional[Annotated[Path, arg(metavar="RUN")]], /, json: bool = False) -> int:
    """List the checkpoints of a run directory: step, epoch, accuracy, size, whole or damaged.

    Args:
        run: Run directory.
        json: Print JSON.
    """
    rows = []
    for path in _all(run):
        row: dict[str, Any] = {"file": str(path), "step": None, "epoch": None, "accuracy": None}
        named = NAME.fullmatch(path.name)
        row["step"] = int(named[1]) if named else None
        try:
            row["bytes"] = path.stat().st_size
            row["state"], row["problem"] = state(path)
            if row["state"] == "whole":
                progress = read_contents(path).progress
                row |= {"step": progress.step, "epoch": progress.epoch, "accuracy": progress.accuracy}
        except OSError:
            # Training removes old checkpoints at any time.
            continue
        rows.append(row)
    if json:
        return _print_json(rows)
    table = Table()
    for name in ("step", "epoch", "accuracy", "size"):
        table.add_column(name, justify="right")
    for name in ("file", "state"):
        table.add_column(name, overflow="fold")
    for row in rows:
        texts = (_text(row["step"]), _text(row["epoch"]), _percent(row["accuracy"]), _size(row["bytes"]))
        table.add_row(*texts, Text(Path(row["file"]).name), row["state"])
    _console().print(table)
    return 0


def verify(files: Positional[Annotated[tuple[Path, ...], arg(metavar="CHECKPOINT")]], /, json: bool = False) -> int:
    """Read checkpoints whole and compare them with their digests; exit status 1 if one is damaged.

    Args:
        files: Checkpoint files, or run directories for all of theirs.
        json: Print JSON.
    """
    if not files:
        raise UserError("verify: give at least one checkpoint or run directory")
    rows = []
    for given in files:
        for path in _all(given) if given.is_dir() else [given]:
            found, problem = state(path)
            parts = damaged_parts(path) if found == "damaged" else []
            rows.append({"file": str(path), "state": found, "problem": problem, "tensors": parts})
    if json:
        _print_json(rows)
    else:
        for row in rows:
            print(row["problem"] or f"{row['file']}: whole")
            for line in row["tensors"]:
                print(f"    {line}")
    return int(any(row["state"] != "whole" for row in rows))


def state(path: Path) -> tuple[str, str]:
    """whole (every byte as written, every tensor there and readable), damaged, or unreadable; and what is wrong."""
    try:
        opened = Opened(path)
        for vector in opened.vectors:
            for name in opened.tensors:
                for _ in opened.slabs(vector, name):
                    pass
    except DamagedError as error:
        return "damaged", str(error)
    except UserError as error:
        return "unreadable", str(error)
    return "whole", ""


@dataclass
class Sums:
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
        vector: weights, or a vector of the optimizer (m, v, ...).
        plot: Also draw the histograms into this file (.png, .pdf or .svg); needs psmpi[plot].
        json: Print JSON.
    """
    opened = Opened(checkpoint)
    if vector not in opened.vectors:
        raise UserError(f"{opened.path} has no vector {vector!r}: choose one of {', '.join(opened.vectors)}")
    layers, parts = [], {block.classes: Sums() for block in opened.contents.layout.blocks}
    blocks = [(block.start, block.stop, block.classes) for block in opened.contents.layout.blocks]
    for tensor in opened.tensors.values():
        sums = _sums(opened, vector, tensor.name)
        layers.append({**sums.row(tensor.name), "histogram": histogram(opened, vector, tensor.name, sums)})
        owners = [next(c for start, stop, c in blocks if start <= offset < stop) for _, _, offset in tensor.spans]
        for at, slab in opened.slabs(vector, tensor.name):
            for (first, last, _), classes in zip(tensor.spans, owners, strict=True):
                parts[classes].add(slab[max(first - at, 0) : max(last - at, 0)])
    everyone = frozenset(range(opened.contents.layout.classes))
    rows = [sums.row(_block(classes, everyone)) for classes, sums in parts.items() if sums.count]
    if plot:
        _draw(Path(plot), opened, vector)
    if json:
        return _print_json({"file": str(opened.path), "vector": vector, "tensors": layers, "parts": rows})
    for title, lines in (("tensors", layers), ("blocks, by the classes that use them", rows)):
        table = Table(title=title, title_justify="left")
        table.add_column("name")
        for name in ("count", "mean", "spread", "least", "most", "norm", "nan", "inf"):
            table.add_column(name, justify="right")
        if lines is layers:
            table.add_column("histogram, least to most", no_wrap=True)
        for line in lines:
            figures = (_figure(line[name]) for name in ("mean", "spread", "least", "most", "norm"))
            cells = [line["name"], f"{line['count']:,}", *figures, str(line["nan"]), str(line["infinite"])]
            table.add_row(*cells, *([_bars(line["histogram"]["counts"])] if lines is layers else []))
        _console().print(table)
    return 0


def _sums(opened: Opened, vector: str, name: str) -> Sums:
    sums = Sums()
    for _, slab in opened.slabs(vector, name):
        sums.add(slab)
    return sums


def histogram(opened: Opened, vector: str, name: str, sums: Sums) -> dict[str, Any]:
    """Counts of the finite values of a tensor in `BINS` equal bins from least to most."""
    low, high = (sums.least, sums.most) if sums.least <= sums.most else (0.0, 1.0)
    # As NumPy does for values that are all equal.
    low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
    counts = np.zeros(BINS, int)
    for _, slab in opened.slabs(vector, name):
        with np.errstate(over="ignore"):
            counts += np.histogram(slab[np.isfinite(slab)].astype(np.float64), bins=BINS, range=(low, high))[0]
    return {"counts": counts.tolist(), "edges": np.linspace(low, high, BINS + 1).tolist()}


def diff(first: Checkpoint, second: Checkpoint, /, json: bool = False) -> int:
    """Compare two checkpoints: relative distance of each tensor and table, largest first, and settings that differ.

    Args:
        first: Checkpoint file or run directory, the reference of the relative distances.
        second: Another one.
        json: Print JSON.
    """
    a, b = Opened(first), Opened(second)
    rows: list[dict[str, Any]] = []
    unmatched: list[dict[str, Any]] = []
    for vector in dict.fromkeys(a.vectors + b.vectors):
        for name in dict.fromkeys([*a.tensors, *b.tensors]):
            label = f"{vector}/{name}"
            pair = [o.tensors[name] if vector in o.vectors and name in o.tensors else None for o in (a, b)]
            mine, theirs = pair
            if mine is None or theirs is None or mine.shape != theirs.shape:
                shapes = [t and t.shape for t in pair]
                unmatched.append({"name": label, "first": shapes[0], "second": shapes[1]})
            elif a.contents.part != b.contents.part and mine.spans != theirs.spans:
                unmatched.append({"name": label, "first": f"of {_held(a)}", "second": f"of {_held(b)}"})
            else:
                pieces = ((x, y) for (_, x), (_, y) in zip(a.slabs(vector, name), b.slabs(vector, name), strict=True))
                rows.append({"name": label, **_apart(pieces)})
    for name in dict.fromkeys([*a.tables, *b.tables]):
        shapes = [o.tables[name][0] if name in o.tables else None for o in (a, b)]
        if shapes[0] != shapes[1]:
            unmatched.append({"name": table_path(name), "first": shapes[0], "second": shapes[1]})
        else:
            rows.append({"name": table_path(name), **_apart(zip(a.rows(name), b.rows(name), strict=True))})
    rows.sort(key=lambda row: -row["distance"] if isfinite(row["distance"]) else -inf)
    old, new = a.settings(), b.settings()
    changed = {
        name: [old.get(name), new.get(name)] for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)
    }
    found = {
        "first": a.describe(),
        "second": b.describe(),
        "identical": not unmatched and all(row["identical"] for row in rows),
        "tensors": [{**row, "distance": _number(row["distance"]), "largest": _number(row["largest"])} for row in rows],
        "unmatched": unmatched,
        "config": changed,
    }
    if json:
        return _print_json(found)
    for label, one in (("first ", a), ("second", b)):
        progress = one.contents.progress
        print(f"{label} {one.path}: step {progress.step}, test accuracy {_percent(progress.accuracy)}")
    table = Table()
    table.add_column("tensor")
    table.add_column("relative distance", justify="right")
    table.add_column("largest difference", justify="right")
    for row in rows:
        table.add_row(row["name"], _figure(row["distance"]), _figure(row["largest"]))
    _console().print(table)
    for lone in unmatched:
        print(f"{lone['name']}: {lone['first'] or 'absent'} in the first, {lone['second'] or 'absent'} in the second")
    for name, (before, after) in changed.items():
        print(f"{name}: {before!r} in the first, {after!r} in the second")
    differ = len(unmatched) + sum(not row["identical"] for row in rows)
    print("all tensors are bit-identical" if found["identical"] else f"{differ} differ")
    return 0


def _apart(pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Distance of two arrays relative to the first, largest difference, and whether all bits are the same."""
    squares, norm, largest, same = 0.0, 0.0, 0.0, True
    for x, y in pieces:
        same = same and x.dtype == y.dtype and x.tobytes() == y.tobytes()
        with np.errstate(over="ignore", invalid="ignore"):
            apart = y.astype(np.float64) - x.astype(np.float64)
            squares += float(apart @ apart)
            norm += float(np.vdot(x.astype(np.float64), x))
            largest = max(largest, float(abs(apart).max(initial=0.0)))
    if same or squares == 0:
        return {"distance": 0.0, "largest": 0.0, "identical": same}
    return {"distance": sqrt(squares / norm) if norm else inf, "largest": largest, "identical": False}


def _held(opened: Opened) -> str:
    return "all classes" if opened.contents.part is None else f"the classes {' '.join(map(str, opened.contents.part))}"


def _all(run: Path) -> list[Path]:
    """The checkpoints of a run directory, or the HDF5 files of any other folder."""
    if not run.is_dir():
        raise UserError(f"{run} is not a folder: give a run directory")
    found = available(run) or sorted(run.glob("*.h5"))
    if not found:
        raise UserError(f"{run} has no checkpoints: give a run directory")
    return found


def _block(classes: frozenset[int], everyone: frozenset[int]) -> str:
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
    lines = -(-len(opened.tensors) // columns)
    figure = Figure(figsize=(4 * columns, 2.4 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, tensor in zip(axes, opened.tensors.values(), strict=False):
        bins = histogram(opened, vector, tensor.name, _sums(opened, vector, tensor.name))
        axis.stairs(bins["counts"], bins["edges"], fill=True)
        axis.set_title(tensor.name)
    for axis in axes[len(opened.tensors) :]:
        axis.remove()
    figure.suptitle(f"{vector}, step {opened.contents.progress.step}")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from None


def _bars(counts: list[int]) -> str:
    top = max(counts, default=0) or 1
    return "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in counts)


def _console() -> Console:
    # A pipe has no width of its own; nothing is to be cut there.
    return Console() if sys.stdout.isatty() else Console(width=10_000)


def _print_json(found: Any) -> int:
    print(json.dumps(found, default=asdict))
    return 0


def _number(value: float) -> float | None:
    """JSON has no infinities."""
    return float(value) if isfinite(value) else None


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"
