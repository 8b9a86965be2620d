"""Command that compares two checkpoints: diff."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, isfinite, sqrt
from typing import Any

import numpy as np
from rich.table import Table

from psmpi.command import typed
from psmpi.errors import UserError
from psmpi.inspect.opened import Checkpoint, Opened
from psmpi.inspect.output import figure, finite, print_json
from psmpi.output import Screen, tell


def check_two(words: Sequence[str]) -> None:
    """Raise UserError unless at most two of the words behind `diff` are checkpoints; tyro names those that lack."""
    paths = [word for word in words if not word.startswith("-")]
    if len(paths) > 2:
        pairs = "; ".join(typed("inspect", ("diff", paths[0], path)) for path in paths[1:4])
        raise UserError(
            f"diff compares two checkpoints, and here are {len(paths)}: compare the first one with each of the others, "
            f"one pair a command: {pairs}{'; ...' if len(paths) > 4 else ''}"
        )


def diff(first: Checkpoint, second: Checkpoint, /, json: bool = False) -> int:
    """Compare two checkpoints: relative distances, largest first, and settings that differ.

    Args:
        first: Checkpoint file, or a run directory for its newest one. It is the reference of the relative distances.
        second: Checkpoint file, or a run directory, to compare with it.
        json: Print JSON.
    """
    a, b = Opened(first), Opened(second)
    rows: list[dict[str, Any]] = []
    unmatched: list[dict[str, Any]] = []
    for vector in dict.fromkeys([*a.vectors, *b.vectors, *a.spaces, *b.spaces]):
        for name in dict.fromkeys([*a.of(vector), *b.of(vector)]):
            label = f"{vector}/{name}"
            pair = [o.of(vector).get(name) if vector in [*o.vectors, *o.spaces] else None for o in (a, b)]
            tensor, other = pair
            if tensor is None or other is None or tensor.shape != other.shape:
                shapes = [t and t.shape for t in pair]
                unmatched.append({"name": label, "first": shapes[0], "second": shapes[1]})
            elif a.contents.part != b.contents.part and tensor.spans != other.spans:
                unmatched.append({"name": label, "first": f"of {_held(a)}", "second": f"of {_held(b)}"})
            else:
                pieces = ((x, y) for (_, x), (_, y) in zip(a.slabs(vector, name), b.slabs(vector, name), strict=True))
                rows.append({"name": label, **_apart(pieces)})
    for name in dict.fromkeys([*a.tables, *b.tables]):
        shapes = [o.tables[name][0] if name in o.tables else None for o in (a, b)]
        if shapes[0] != shapes[1]:
            unmatched.append({"name": name, "first": shapes[0], "second": shapes[1]})
        else:
            rows.append({"name": name, **_apart(zip(a.rows(name), b.rows(name), strict=True))})
    rows.sort(key=lambda row: -row["distance"] if isfinite(row["distance"]) else -inf)
    old, new = a.settings(), b.settings()
    changed = {
        name: [old.get(name), new.get(name)] for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)
    }
    comparison = {
        "first": a.describe(),
        "second": b.describe(),
        "identical": not unmatched and all(row["identical"] for row in rows),
        "tensors": [{**row, "distance": finite(row["distance"]), "largest": finite(row["largest"])} for row in rows],
        "unmatched": unmatched,
        "config": changed,
    }
    if json:
        return print_json(comparison)
    for label, opened in (("first ", a), ("second", b)):
        progress = opened.contents.progress
        tell(f"{label} {opened.path}: step {progress.step}, {progress.score}")
    table = Table()
    table.add_column("tensor")
    table.add_column("relative distance", justify="right")
    table.add_column("largest difference", justify="right")
    for row in rows:
        table.add_row(row["name"], figure(row["distance"]), figure(row["largest"]))
    Screen().print(table)
    for lone in unmatched:
        tell(f"{lone['name']}: {lone['first'] or 'absent'} in the first, {lone['second'] or 'absent'} in the second")
    for name, (before, after) in changed.items():
        tell(f"{name}: {before!r} in the first, {after!r} in the second")
    differ = len(unmatched) + sum(not row["identical"] for row in rows)
    tell("all tensors are bit-identical" if comparison["identical"] else f"{differ} differ")
    return 0


def _apart(pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """2-norm of the difference of two arrays relative to the first, largest difference, whether all bits are equal."""
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
