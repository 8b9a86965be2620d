"""The commands that only look: show, list, stats, diff, verify."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.tree import Tree
from tyro.conf import Positional, arg

from psmpi.checkpoint import available, read_contents
from psmpi.checkpoint.format import NAME
from psmpi.errors import UserError
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
                "dtype": str(values.dtype),
                "bytes": values.nbytes,
                "norm": _number(float(np.linalg.norm(values.astype(np.float64).ravel()))),
            }
            for tensor, values in opened.walk(vector)
        ]
    found = {
        **opened.describe(),
        "bytes": opened.path.stat().st_size,
        "tensors": tensors,
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
        row["bytes"] = path.stat().st_size
        row["damage"] = damage(path)
        if not row["damage"]:
            progress = read_contents(path).progress
            row |= {"step": progress.step, "epoch": progress.epoch, "accuracy": progress.accuracy}
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
        table.add_row(*texts, Path(row["file"]).name, "damaged" if row["damage"] else "whole")
    _console().print(table)
    return 0


def verify(files: Positional[Annotated[tuple[Path, ...], arg(metavar="CHECKPOINT")]], /, json: bool = False) -> int:
    """Read checkpoints whole and compare them with their digests; exit status 1 if one is damaged.

    Args:
        files: Checkpoint files, or run directories for all of theirs.
        json: Print JSON.
    """
    rows = []
    for given in files:
        for path in _all(given) if given.is_dir() else [given]:
            problem = damage(path)
            rows.append({"file": str(path), "damage": problem, "tensors": damaged_tensors(path) if problem else []})
    if json:
        _print_json(rows)
    else:
        for row in rows:
            print(row["damage"] or f"{row['file']}: whole")
            for line in row["tensors"]:
                print(f"    {line}")
    return int(any(row["damage"] for row in rows))


def damage(path: Path) -> str:
    """What is wrong with a checkpoint; empty where it is whole: every byte as written, every tensor there."""
    try:
        Opened(path)
    except UserError as error:
        return str(error)
    return ""


def damaged_tensors(path: Path) -> list[str]:
    """Which tensors of a damaged file cannot be read any more, as far as can be told.

    HDF5 is not made for damaged files and may crash or hang on them, so another process does it.
    """
    if not path.is_file():
        return []
    command = [sys.executable, "-m", "psmpi.inspect.scan", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return [str(line) for line in json.loads(done.stdout)]
    except (subprocess.TimeoutExpired, ValueError):
        return ["its tables of contents cannot be read"]


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
            self.total += float(values.sum())
            self.squares += float(values @ values)
            self.least = min(self.least, float(values.min()))
            self.most = max(self.most, float(values.max()))

    def row(self, name: str) -> dict[str, Any]:
        """Mean, spread (standard deviation), extremes and 2-norm of the finite values."""
        finite = self.count - self.nan - self.infinite
        mean = self.total / finite if finite else 0.0
        spread = sqrt(max(0.0, self.squares / finite - mean**2)) if finite else 0.0
        return {
            "name": name,
            "count": self.count,
            "mean": mean,
            "spread": spread,
            "least": self.least if finite else None,
            "most": self.most if finite else None,
            "norm": sqrt(self.squares),
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
    for tensor, values in opened.walk(vector):
        sums = Sums()
        sums.add(values)
        layers.append({**sums.row(tensor.name), "histogram": histogram(values)})
        flat = values.ravel()
        for first, last, offset in tensor.spans:
            for start, stop, classes in blocks:
                if start <= offset < stop:
                    parts[classes].add(flat[first:last])
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


def histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts of the finite values in `BINS` equal bins from least to most."""
    finite = values[np.isfinite(values)]
    counts, edges = np.histogram(finite.astype(np.float64), bins=BINS)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def diff(first: Checkpoint, second: Checkpoint, /, json: bool = False) -> int:
    """Compare two checkpoints: relative distance of each tensor, largest first, and settings that differ.

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
            shapes = [o.tensors[name].shape if vector in o.vectors and name in o.tensors else None for o in (a, b)]
            if shapes[0] != shapes[1]:
                unmatched.append({"name": label, "first": shapes[0], "second": shapes[1]})
            elif shapes[0] is not None:
                x, y = (o.read(vector, o.tensors[name]).astype(np.float64).ravel() for o in (a, b))
                norm, apart = float(np.linalg.norm(x)), float(np.linalg.norm(x - y))
                # Equal bits are no distance, whatever arithmetic says of not-a-numbers.
                same = x.tobytes() == y.tobytes()
                distance = 0.0 if same else apart / norm if norm else inf
                rows.append({"name": label, "distance": distance, "largest": 0.0 if same else float(abs(x - y).max())})
    rows.sort(key=lambda row: -row["distance"] if isfinite(row["distance"]) else -inf)
    old, new = a.settings(), b.settings()
    changed = {
        name: [old.get(name), new.get(name)] for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)
    }
    found = {
        "first": a.describe(),
        "second": b.describe(),
        "identical": not unmatched and all(row["distance"] == 0 for row in rows),
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
    for pair in unmatched:
        print(f"{pair['name']}: {pair['first'] or 'absent'} in the first, {pair['second'] or 'absent'} in the second")
    for name, (before, after) in changed.items():
        print(f"{name}: {before!r} in the first, {after!r} in the second")
    print("all tensors are bit-identical" if found["identical"] else f"{sum(r['distance'] != 0 for r in rows)} differ")
    return 0


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
    for axis, (tensor, values) in zip(axes, opened.walk(vector), strict=False):
        bins = histogram(values)
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
