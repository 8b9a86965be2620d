"""Finding a checkpoint, and filling a rank's shard from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from psmpi.checkpoint.contents import group_of
from psmpi.checkpoint.format import available, folder, open_file
from psmpi.checkpoint.scan import damaged_parts
from psmpi.checkpoint.selection import read_runs
from psmpi.checkpoint.soundness import validate
from psmpi.checkpoint.tensors import Tensor, held_runs, make_tensors
from psmpi.errors import DamagedError, UserError
from psmpi.layout import Layout, Runs, TableRows


def find(resume: str, out: Path, tell: Callable[[str], None]) -> Path | None:
    """The file that --resume names; `auto`: the newest whole one in `out`, None where there is none.

    Reads and checks the file whole. `tell` hears of damaged files that are passed over. UserError where a file is
    missing, cannot be read, or is of a newer format, and where one that is named is damaged.
    """
    if resume == "auto":
        for path in reversed(available(out)):
            try:
                step = validate(path).progress.step
            except DamagedError as error:
                tell(f"passed over: {error}")
                continue
            if step != step_of(path):
                raise UserError(f"{path} holds step {step}: it is not of this run; move it out of the folder")
            return path
        return None
    path = newest(Path(resume))
    try:
        validate(path)
    except DamagedError as error:
        parts = damaged_parts(path)
        raise DamagedError(f"{error} (not to be read any more: {'; '.join(parts)})" if parts else str(error)) from None
    return path


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint of a run."""
    return int(path.stem.removeprefix("step-"))


def clear(out: Path, step: int, *, damaged: bool, tell: Callable[[str], None]) -> None:
    """Make a run directory ready for a run that goes on at `step` (-1: starts).

    Removes what a killed writer left. Checkpoints of later steps would pass for newer ones of this run: where they are
    `damaged` they get another name, else they are another run's, which is a UserError, after which all is as before.
    """
    later = [path for path in available(out) if step_of(path) > step]
    if later and step < 0 and not damaged:
        raise UserError(f"--out {out} holds a run already: add --resume auto to go on with it, or name another folder")
    if later and step < 0:
        raise UserError(
            f"the checkpoints of --out {out} are all damaged (python -m psmpi.inspect verify {out}): move them away to "
            "start afresh"
        )
    if later and not damaged:
        raise UserError(
            f"--out {out} holds checkpoints of later steps than {step}, up to {later[-1].name}: name another folder"
        )
    for leftover in folder(out).glob(".*.part"):
        leftover.unlink(missing_ok=True)
    for path in later:
        aside = path.with_name(path.name + ".damaged")
        path.rename(aside)
        tell(f"renamed to {aside}")


def newest(path: Path) -> Path:
    """`path` itself, or the newest checkpoint of a run directory; UserError where there is none."""
    if not path.is_dir():
        return path
    found = available(path)
    if not found:
        raise UserError(f"{path}: no checkpoint in {folder(path)}; give a run directory or the path of an .h5 file")
    return found[-1]


def load(
    path: Path, layout: Layout, runs: Runs, vectors: Mapping[str, np.ndarray], part: Sequence[int] | None = None
) -> None:
    """Fill `vectors`, (runs.size,) each, with the elements of the flat vector that `runs` names, reading only these.

    `layout` is the model's; `part` are the classes whose part alone the file holds, None for all. UserError names a
    tensor that is missing or has another shape, with what the file has and what the model wants.
    """
    missing = runs - held_runs(layout, part)
    if missing.size:
        raise UserError(
            f"checkpoint {path} holds only the part of the classes {', '.join(map(str, part or ()))}, and this needs "
            f"{missing.size:,} more weights: put the parts together with python -m psmpi.inspect join"
        )
    _fill(path, make_tensors(layout, part), runs, {group_of(name): vector for name, vector in vectors.items()})


def load_space(path: Path, space: str, layout: Layout, runs: Runs, vector: np.ndarray) -> None:
    """Fill `vector` (runs.size,) with the elements that `runs` names of a space, whose layout that is.

    UserError as that of `load`.
    """
    _fill(path, make_tensors(layout), runs, {space: vector})


def _fill(path: Path, tensors: Sequence[Tensor], runs: Runs, groups: Mapping[str, np.ndarray]) -> None:
    """Fill the vectors of groups of the file with the elements of tensors that `runs` names."""
    with open_file(path) as file:
        for tensor in tensors:
            datasets = [(find_tensor(file, group, tensor, path), vector) for group, vector in groups.items()]
            for slab in tensor.slabs():
                first, last, _, start = tensor.meet(runs.starts, runs.stops, *slab)
                places = runs.places(start, start + last - first)
                for dataset, vector in datasets:
                    try:
                        read_runs(dataset, first, last, places, vector)
                    except OSError as error:
                        raise UserError(f"checkpoint {path}, {dataset.name}: {error}; the file is damaged") from None


def load_tables(path: Path, tables: Mapping[str, np.ndarray], rows: TableRows, rank: int) -> bool:
    """Fill this rank's rows of `tables`; False, and nothing is changed, where the file has not the same ones."""
    with open_file(path) as file:
        # Earlier files have the tables of ranks among those of elements.
        found = {name: file.get(f"{rows.group}/{name}", file.get(f"elements/{name}")) for name in tables}
        for name, table in tables.items():
            there = found[name]
            shape = (rows.total, *table.shape[1:])
            if not isinstance(there, h5py.Dataset) or (there.shape, there.dtype) != (shape, table.dtype):
                return False
        for name, table in tables.items():
            for first, local, count in rows.runs(rank):
                try:
                    found[name].read_direct(table, np.s_[first : first + count], np.s_[local : local + count])
                except OSError as error:
                    raise UserError(f"checkpoint {path}, {found[name].name}: {error}; the file is damaged") from None
    return True


def find_tensor(file: h5py.File, group: str, tensor: Tensor, path: Path) -> h5py.Dataset:
    """The data set of a tensor in a group; UserError where it is missing or of another shape."""
    name = f"{group}/{tensor.name}"
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        kept = ", ".join(file["optimizer"]) if "optimizer" in file else "none: it holds weights only"
        raise UserError(
            f"checkpoint {path} has no {name}: it is of another model or optimizer (its optimizer vectors: {kept}); "
            "use the settings stored in it"
        )
    if dataset.shape != tensor.shape:
        raise UserError(
            f"checkpoint {path}, {name}: shape {dataset.shape} in the file, {tensor.shape} in the model; use the "
            "model and data set that the checkpoint was made with"
        )
    return dataset
