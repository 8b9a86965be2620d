"""Finding a checkpoint, and filling a rank's shard from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import h5py
import numpy as np

from psmpi.checkpoint.format import available, check, folder, group_of, open_file
from psmpi.errors import UserError
from psmpi.partition import Layout, Parameter, Runs


def find(resume: str, out: Path, tell: Callable[[str], None]) -> Path | None:
    """The file that --resume names; `auto`: the newest whole one in `out`, None where there is none.

    Reads and checks the file whole. `tell` hears of damaged files that are passed over. UserError where a named file is
    missing or damaged.
    """
    if resume == "auto":
        for path in reversed(available(out)):
            try:
                check(path)
            except UserError as error:
                tell(f"passed over: {error}")
                continue
            return path
        return None
    path = Path(resume)
    if path.is_dir():
        newest = available(path)
        if not newest:
            raise UserError(f"--resume {path}: no checkpoint in {folder(path)}; give the path of an .h5 file")
        path = newest[-1]
    check(path)
    return path


def load(path: Path, layout: Layout, runs: Runs, vectors: Mapping[str, np.ndarray]) -> None:
    """Fill `vectors`, (runs.size,) each, with the elements of the flat vector that `runs` names, reading only these.

    UserError names a tensor that is missing or has another shape, with what the file has and what the model wants.
    """
    with open_file(path) as file:
        for name, vector in vectors.items():
            for k, parameter in enumerate(layout.parameters):
                dataset = _dataset(file, f"{group_of(name)}/{parameter.name}", parameter, path)
                for a, b, local in _spans(layout, k, runs):
                    try:
                        _read(dataset, a, b, vector[local])
                    except OSError as error:
                        raise UserError(f"checkpoint {path}, {dataset.name}: {error}; the file is damaged") from None


def _spans(layout: Layout, parameter: int, runs: Runs) -> list[tuple[int, int, slice]]:
    """Where runs and a parameter meet: (first element, last element of the flattened tensor, slice of the runs)."""
    spans = []
    size = layout.parameters[parameter].unit_size
    for piece in layout.pieces():
        if piece.parameter == parameter:
            whole = Runs(((piece.offset, piece.offset + (piece.last - piece.first) * size),))
            for a, b in (whole & runs).intervals:
                at = piece.first * size + a - piece.offset
                spans.append((at, at + b - a, runs.local(a, b)))
    return spans


def _dataset(file: h5py.File, name: str, parameter: Parameter, path: Path) -> h5py.Dataset:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        kept = ", ".join(file["optimizer"]) if "optimizer" in file else "none: it holds weights only"
        raise UserError(
            f"checkpoint {path} has no {name}: it is of another model or optimizer (its optimizer vectors: {kept}); "
            "resume with the settings stored in it"
        )
    if dataset.shape != parameter.shape:
        raise UserError(
            f"checkpoint {path}, {name}: shape {dataset.shape} in the file, {parameter.shape} in the model; use the "
            "model and data set that the checkpoint was made with"
        )
    return dataset


def _read(dataset: h5py.Dataset, first: int, last: int, into: np.ndarray) -> None:
    """Elements [first, last) of the flattened tensor, reading only the leading rows they lie in."""
    row = prod(dataset.shape[1:])
    top, bottom = first // row, -(-last // row)
    if first == top * row and last == bottom * row:
        dataset.read_direct(into.reshape(-1, *dataset.shape[1:]), np.s_[top:bottom])
    else:
        into[...] = dataset[top:bottom].reshape(-1)[first - top * row : last - top * row]
