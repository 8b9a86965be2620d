"""Commands that write or remove checkpoints: average, cut, join, prune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, arg

from psmpi.checkpoint import Contents, available
from psmpi.checkpoint.build import Source, write_file
from psmpi.checkpoint.format import NAME, folder
from psmpi.checkpoint.tensors import Tensor
from psmpi.errors import UserError
from psmpi.inspect.look import state
from psmpi.inspect.opened import Opened
from psmpi.output import tell

Checkpoints = Positional[Annotated[tuple[Path, ...], arg(metavar="CHECKPOINT")]]


def average(files: Checkpoints, /, out: Path) -> int:
    """Write the mean of the weights of several checkpoints of one model, without optimizer state.

    Args:
        files: Checkpoint files or run directories. The last one gives configuration and progress.
        out: File to write.
    """
    opened = [Opened(path) for path in files]
    if not opened:
        raise UserError("average: give at least one checkpoint")
    _same_network(opened)
    for other in opened[1:]:
        if other.contents.part != opened[0].contents.part:
            raise UserError(f"{other.path} and {opened[0].path} hold the parts of different classes")

    def read(vector: str, tensor: Tensor, first: int, into: np.ndarray) -> None:
        total, values = np.zeros(len(into)), np.empty_like(into)
        for each in opened:
            each.fill(vector, tensor.name, first, values)
            total += values
        into[...] = total / len(opened)

    origin = {**opened[-1].contents.provenance, "average_of": [str(each.path) for each in opened]}
    contents = replace(opened[-1].contents, scalars={}, provenance=origin, spaces={})
    write(out, contents, ["weights"], opened[-1].dtype, read)
    return 0


def cut(checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]], /, classes: tuple[int, ...], out: Path,
        weights_only: bool = False) -> int:  # fmt: skip
    """Write the part of some classes: the tensors that a device needs to compute their scores.

    Args:
        checkpoint: Checkpoint file, or a run directory for its newest one.
        classes: Classes of the part.
        out: File to write.
        weights_only: Leave the optimizer's state out. Tables and other tensors are left out in any case.
    """
    opened = Opened(checkpoint)
    classes_held = range(opened.contents.layout.classes) if opened.contents.part is None else opened.contents.part
    part = tuple(sorted(set(classes)))
    missing = [c for c in part if c not in classes_held]
    if missing or not part:
        raise UserError(
            f"cut --classes {' '.join(map(str, classes))}: {opened.path} has {' '.join(map(str, classes_held))}"
        )
    vectors = ["weights"] if weights_only else opened.vectors
    scalars = {} if weights_only else opened.contents.scalars
    # A part of a part names the same whole checkpoint.
    origin = {"cut_from": opened.digest, **opened.contents.provenance}
    contents = replace(opened.contents, part=part, scalars=scalars, provenance=origin, spaces={})
    write(out, contents, vectors, opened.dtype, _from_parts([opened]))
    return 0


def join(files: Checkpoints, /, out: Path) -> int:
    """Join parts of one checkpoint, bit for bit.

    Args:
        files: Files from psmpi inspect cut; together they must hold all classes.
        out: File to write.
    """
    opened = [Opened(path) for path in files]
    if not opened:
        raise UserError("join: give the files of the parts")
    _same_network(opened)
    first = opened[0]
    for other in opened[1:]:
        if other.vectors != first.vectors or _whole(other) != _whole(first):
            raise UserError(f"{other.path} and {first.path} are parts of different checkpoints: cut them from one")
    joined = {c for each in opened for c in each.contents.part or range(each.contents.layout.classes)}
    missing = sorted(set(range(first.contents.layout.classes)) - joined)
    if missing:
        raise UserError(f"join: the part of the classes {' '.join(map(str, missing))} is not among the files: add it")
    origin = {name: value for name, value in first.contents.provenance.items() if name != "cut_from"}
    contents = replace(first.contents, part=None, provenance=origin, spaces={})
    write(out, contents, first.vectors, first.dtype, _from_parts(opened))
    return 0


def prune(run: Positional[Annotated[Path, arg(metavar="RUN")]], /, keep: int, dry_run: bool = False) -> int:
    """Keep the newest whole checkpoints of a run, and remove the others, damaged ones too.

    Args:
        run: Run directory.
        keep: Number of checkpoints to keep, at least 1.
        dry_run: Print the files that would be removed, and remove none.
    """
    if keep < 1:
        raise UserError(f"prune --keep {keep}: expected a whole number from 1 up")
    checkpoints = available(run)
    if not checkpoints:
        raise UserError(f"{run} has no checkpoints: give a run directory")
    states = {path: state(path)[0] for path in checkpoints}
    whole = [path for path in checkpoints if states[path] == "whole"]
    if not whole:
        raise UserError(f"no checkpoint of {run} is whole: nothing is removed; see verify")
    newest = whole[-keep:]
    for path in checkpoints:
        # A file that cannot be read now, or by this version of psmpi, may be sound.
        if path not in newest and states[path] != "unreadable":
            if not dry_run:
                path.unlink(missing_ok=True)
            tell(f"{'would remove' if dry_run else 'removed'} {path}")
    return 0


def _whole(part: Opened) -> str:
    """Digest of the checkpoint that a part was cut from; of a whole checkpoint, its own digest."""
    return str(part.contents.provenance.get("cut_from", part.digest))


def _same_network(opened: Sequence[Opened]) -> None:
    """Raise UserError unless all checkpoints are of the same network."""
    for other in opened[1:]:
        layout, other_layout = opened[0].contents.layout, other.contents.layout
        # Files of version 1 have a block for each class where later ones have one block, so compare blocks too.
        if layout != other_layout and (layout.parameters, layout.blocks) != (
            other_layout.parameters,
            other_layout.blocks,
        ):
            names = [t.name for t in opened[0].tensors.values() if other.tensors.get(t.name) != t]
            which = f" (they differ in {names[0]})" if names else ""
            raise UserError(f"{other.path} and {opened[0].path} are of different networks{which}")


def _from_parts(opened: Sequence[Opened]) -> Source:
    """A source that reads elements from any of the parts that hold them; UserError if two parts differ."""

    def read(vector: str, tensor: Tensor, first: int, into: np.ndarray) -> None:
        last = first + len(into)
        for a, b, offset in tensor.spans:
            start, stop = max(a, first), min(b, last)
            if start >= stop:
                continue
            target, source = into[start - first : stop - first], None
            for each in opened:
                for sa, _, place in each.tensors[tensor.name].spans if tensor.name in each.tensors else ():
                    if place == offset and source is None:
                        each.fill(vector, tensor.name, sa + start - a, target)
                        source = each
                    elif place == offset and source is not None:
                        again = np.empty_like(target)
                        each.fill(vector, tensor.name, sa + start - a, again)
                        if again.tobytes() != target.tobytes():
                            raise UserError(
                                f"{source.path} and {each.path} have different values in {vector} {tensor.name}: they "
                                "are parts of different checkpoints"
                            )

    return read


def write(out: Path, contents: Contents, vectors: Sequence[str], dtype: np.dtype, read: Source) -> None:
    """Write a checkpoint by `put`, and print its name."""
    put(out, contents, vectors, dtype, read)
    tell(f"wrote {out}")


def put(out: Path, contents: Contents, vectors: Sequence[str], dtype: np.dtype, read: Source) -> None:
    """Write a checkpoint outside of runs. UserError if `out` exists, is inside a run, or cannot be written."""
    if out.exists():
        raise UserError(f"--out {out} is there already: name another file")
    if NAME.fullmatch(out.name) and out.absolute().parent.name == folder(Path()).name:
        raise UserError(f"--out {out} would pass for a checkpoint of that run: name a file elsewhere")
    try:
        write_file(out, contents, dict.fromkeys(vectors, dtype), read)
    except OSError as error:
        raise UserError(f"--out {out}: {error}") from None
