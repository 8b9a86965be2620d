"""Commands that read checkpoints and change nothing: show, list, verify."""

from __future__ import annotations

from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from tyro.conf import Positional, arg

from psmpi.checkpoint import available, read_contents
from psmpi.checkpoint.contents import TABLES
from psmpi.checkpoint.format import NAME
from psmpi.checkpoint.network import network_in
from psmpi.checkpoint.scan import damaged_parts
from psmpi.config import from_toml
from psmpi.data import Identity
from psmpi.data.names import listed
from psmpi.errors import DamagedError, UserError, counted
from psmpi.inspect.figures import sums_of
from psmpi.inspect.opened import Checkpoint, Opened
from psmpi.inspect.output import figure, finite, print_json, size_text, text
from psmpi.output import Screen, tell


def show(checkpoint: Checkpoint, /, json: bool = False) -> int:
    """Show the tensors of a checkpoint (shapes, sizes, norms), its configuration and score.

    Args:
        checkpoint: Checkpoint file, or a run directory for its newest one.
        json: Print JSON.
    """
    opened = Opened(checkpoint)
    contents = opened.contents
    tensors: dict[str, list[dict[str, Any]]] = {}
    for vector in [*opened.vectors, *opened.spaces]:
        tensors[vector] = [
            {
                "name": tensor.name,
                "shape": tensor.shape,
                "dtype": str(opened.dtype_of(vector, tensor.name)),
                "bytes": tensor.size * opened.dtype_of(vector, tensor.name).itemsize,
                "norm": finite(float(sums_of(opened, vector, tensor.name).norms[0])),
            }
            for tensor in opened.of(vector).values()
        ]
    summary = {
        **opened.describe(),
        "bytes": opened.path.stat().st_size,
        "tensors": tensors,
        **{group: _tables(opened, group) for group in TABLES},
        "scalars": dict(contents.scalars),
        "config": opened.settings(),
        "data": dict(contents.data),
        "characters": len(contents.characters),
        "names": list(contents.names),
        "notes": _notes(opened),
        "metrics": list(contents.progress.rows),
        "placement": dict(contents.placement),
        "provenance": dict(contents.provenance),
    }
    if json:
        return print_json(summary)
    tree = Tree(f"{opened.path}  {size_text(summary['bytes'])}")
    part = "" if contents.part is None else f", the part of the classes {' '.join(map(str, contents.part))}"
    tree.add(f"step {summary['step']}, epoch {summary['epoch']}, {contents.progress.score}{part}")
    for vector, rows in tensors.items():
        size = sum(row["bytes"] for row in rows)
        branch = tree.add(f"{vector}  {counted(len(rows), 'tensor')}, {size_text(size)}")
        for row in rows:
            shape = " x ".join(map(str, row["shape"]))
            branch.add(f"{row['name']}  {row['dtype']} {shape}  {size_text(row['bytes'])}  norm {figure(row['norm'])}")
    for group, of in zip(TABLES, ("element", "rank"), strict=True):
        if summary[group]:
            size = sum(table["bytes"] for table in summary[group])
            branch = tree.add(f"{group}  {counted(summary[group][0]['shape'][0], of)}, {size_text(size)}")
            for table in summary[group]:
                shape = " x ".join(map(str, table["shape"]))
                branch.add(f"{table['name']}  {table['dtype']} {shape}  {size_text(table['bytes'])}")
    if contents.scalars:
        tree.add("scalars  " + "  ".join(f"{name} = {value}" for name, value in contents.scalars.items()))
    if contents.data:
        data = Identity.of(contents.data)
        splits = [
            counted(split.samples, f"{kind} sample") for kind, split in (("training", data.train), ("test", data.test))
        ]
        shape = " x ".join(map(str, data.shape))
        text_of = f", a text of {counted(len(contents.characters), 'character')}" if contents.characters else ""
        tree.add(
            f"data  {' and '.join(splits)} of {shape} {data.train.dtype}{text_of}, digest {data.train.targets[:12]}"
        )
    if contents.names:
        tree.add(f"classes  {listed(contents.called, 20)}")
    branch = tree.add("configuration")
    sections: dict[str, list[str]] = {}
    for name, value in summary["config"].items():
        section, _, key = name.partition(".")
        sections.setdefault(section, []).append(f"{key} = {value!r}")
    for section, lines in sections.items():
        branch.add(f"{section}: {', '.join(lines)}")
    for note in summary["notes"]:
        tree.add(f"note: {note}")
    branch = tree.add("origin")
    for name, value in contents.provenance.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        branch.add(f"{name}: {' '.join(map(str, value)) if isinstance(value, list) else value}")
    Screen().print(tree, highlight=False)
    return 0


def _notes(opened: Opened) -> list[str]:
    """Notes of the network, such as inputs that it leaves unused."""
    contents = opened.contents
    # The network may have a kind of layer that is not installed here.
    with suppress(UserError):
        model = from_toml(contents.config, str(opened.path), foreign=True).model
        return network_in(contents, model).notes
    return []


def _tables(opened: Opened, group: str) -> list[dict[str, Any]]:
    """Name, shape, dtype and bytes of each table of a group."""
    return [
        {"name": path.partition("/")[2], "shape": shape, "dtype": str(dtype), "bytes": prod(shape) * dtype.itemsize}
        for path, (shape, dtype) in opened.tables.items()
        if path.startswith(f"{group}/")
    ]


def list_(run: Positional[Annotated[Path, arg(metavar="RUN")]], /, json: bool = False) -> int:
    """List the checkpoints of a run directory: step, epoch, accuracy, size, whole or damaged.

    Args:
        run: Run directory.
        json: Print JSON.
    """
    rows = []
    for path in _all(run):
        row: dict[str, Any] = {"file": str(path), "step": None, "epoch": None, "accuracy": None, "score": "-"}
        named = NAME.fullmatch(path.name)
        row["step"] = int(named[1]) if named else None
        try:
            row["bytes"] = path.stat().st_size
            row["state"], row["problem"] = state(path)
            if row["state"] == "whole":
                progress = read_contents(path).progress
                row |= {"step": progress.step, "epoch": progress.epoch, "accuracy": progress.accuracy}
                row["score"] = progress.score.removeprefix("test accuracy ").removeprefix("test ")
        except OSError:
            # Training removes old checkpoints at any time.
            continue
        rows.append(row)
    if json:
        return print_json(rows)
    table = Table()
    for name in ("step", "epoch", "accuracy", "size"):
        table.add_column(name, justify="right")
    for name in ("file", "state"):
        table.add_column(name, overflow="fold")
    for row in rows:
        texts = (text(row["step"]), text(row["epoch"]), row["score"], size_text(row["bytes"]))
        table.add_row(*texts, Text(Path(row["file"]).name), row["state"])
    Screen().print(table)
    return 0


def verify(files: Positional[Annotated[tuple[Path, ...], arg(metavar="CHECKPOINT")]], /, json: bool = False) -> int:
    """Read checkpoints whole and compare them with their digests. Exit status 1 if one is damaged.

    Args:
        files: Checkpoint files, or run directories for all of theirs.
        json: Print JSON.
    """
    if not files:
        raise UserError("verify: give at least one checkpoint or run directory")
    rows = []
    for argument in files:
        for path in _all(argument) if argument.is_dir() else [argument]:
            found_state, problem = state(path)
            parts = damaged_parts(path) if found_state == "damaged" else []
            rows.append({"file": str(path), "state": found_state, "problem": problem, "tensors": parts})
    if json:
        print_json(rows)
    else:
        for row in rows:
            tell(str(row["problem"]) or f"{row['file']}: whole")
            for line in row["tensors"]:
                tell(f"    {line}")
    return int(any(row["state"] != "whole" for row in rows))


def state(path: Path) -> tuple[str, str]:
    """State of a checkpoint and its problem, "" for none: "whole", "damaged" or "unreadable".

    A whole checkpoint has every byte as it was written, and all of its tensors can be read.
    """
    try:
        opened = Opened(path)
        for vector in [*opened.vectors, *opened.spaces]:
            for name in opened.of(vector):
                for _ in opened.slabs(vector, name):
                    pass
    except DamagedError as error:
        return "damaged", str(error)
    except UserError as error:
        return "unreadable", str(error)
    return "whole", ""


def _all(run: Path) -> list[Path]:
    """Checkpoints of a run directory, or the .h5 files of another folder; UserError if there are none."""
    if not run.is_dir():
        raise UserError(f"{run} is not a folder: give a run directory")
    checkpoints = available(run) or sorted(run.glob("*.h5"))
    if not checkpoints:
        raise UserError(f"{run} has no checkpoints: give a run directory")
    return checkpoints
