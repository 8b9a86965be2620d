"""Search for a checkpoint, and loading of a rank's shard from it."""

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
    """The checkpoint that --resume names; "auto": the newest sound one in `out`, None if there is none.

    The whole file is read and checked. tell: prints a line about each damaged file that is skipped. UserError if a file
    is missing, cannot be read or has a newer format; DamagedError if the file that `resume` names is damaged.
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
        raise DamagedError(f"{error} (data that cannot be read: {'; '.join(parts)})" if parts else str(error)) from None
    return path


def step_of(path: Path) -> int:
    """Number of the step in the name of a checkpoint."""
    return int(path.stem.removeprefix("step-"))


def clear(out: Path, step: int, *, damaged: bool, tell: Callable[[str], None]) -> None:
    """Prepare a run directory for a run that resumes at `step`; -1: a new run.

    Files that a killed writer left are removed. Checkpoints of later steps would be taken for newer ones of this run.
    damaged True: they are damaged, and are renamed. damaged False: they belong to another run; UserError, and nothing
    is changed. tell: prints a line about each renamed file.
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
    """The newest checkpoint of a run directory, or `path` itself if it is no directory; UserError if there is none."""
    if not path.is_dir():
        return path
    checkpoints = available(path)
    if not checkpoints:
        raise UserError(f"{path}: no checkpoint in {folder(path)}; give a run directory or the path of an .h5 file")
    return checkpoints[-1]


def load(
    path: Path, layout: Layout, runs: Runs, vectors: Mapping[str, np.ndarray], part: Sequence[int] | None = None
) -> None:
    """Fill `vectors`, (runs.size,) each, with the elements `runs` of the flat vector. Only these elements are read.

    layout: the model's. vectors: by name, "weights" or that of a vector of the optimizer. part: classes whose part the
    file holds; None: all. UserError if a tensor is missing or has another shape than in the model.
    """
    missing = runs - held_runs(layout, part)
    if missing.size:
        raise UserError(
            f"checkpoint {path} holds only the part of the classes {', '.join(map(str, part or ()))}, and this needs "
            f"{missing.size:,} more weights: put the parts together with python -m psmpi.inspect join"
        )
    _fill(path, make_tensors(layout, part), runs, {group_of(name): vector for name, vector in vectors.items()})


def load_space(path: Path, space: str, layout: Layout, runs: Runs, vector: np.ndarray) -> None:
    """Fill `vector` (runs.size,) with the elements `runs` of a space; layout: of the space. UserError as in `load`."""
    _fill(path, make_tensors(layout), runs, {space: vector})


def _fill(path: Path, tensors: Sequence[Tensor], runs: Runs, groups: Mapping[str, np.ndarray]) -> None:
    """Fill a vector for each group of the file with the elements `runs` of the group's tensors."""
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
    """Fill this rank's rows of `tables`; return False, and change nothing, if the file has other tables."""
    with open_file(path) as file:
        # Files of earlier versions have the tables of ranks under /elements.
        datasets = {name: file.get(f"{rows.group}/{name}", file.get(f"elements/{name}")) for name in tables}
        for name, table in tables.items():
            dataset = datasets[name]
            shape = (rows.total, *table.shape[1:])
            if not isinstance(dataset, h5py.Dataset) or (dataset.shape, dataset.dtype) != (shape, table.dtype):
                return False
        for name, table in tables.items():
            for first, local, count in rows.runs(rank):
                try:
                    datasets[name].read_direct(table, np.s_[first : first + count], np.s_[local : local + count])
                except OSError as error:
                    raise UserError(f"checkpoint {path}, {datasets[name].name}: {error}; the file is damaged") from None
    return True


def find_tensor(file: h5py.File, group: str, tensor: Tensor, path: Path) -> h5py.Dataset:
    """The data set of a tensor in a group; UserError if it is missing or has another shape."""
    name = f"{group}/{tensor.name}"
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        vectors = ", ".join(file["optimizer"]) if "optimizer" in file else "none: it holds weights only"
        raise UserError(
            f"checkpoint {path} has no {name}: it is of another model or optimizer (its optimizer vectors: {vectors}); "
            "use the settings stored in it"
        )
    if dataset.shape != tensor.shape:
        raise UserError(
            f"checkpoint {path}, {name}: shape {dataset.shape} in the file, {tensor.shape} in the model; use the "
            "model and data set that the checkpoint was made with"
        )
    return dataset
