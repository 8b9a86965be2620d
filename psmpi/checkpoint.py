"""Checkpoints in HDF5: named tensors in their global shapes, whatever ranks wrote or read them.

/weights/<parameter>, /optimizer/<vector>/<parameter>: tensors; /progress (JSON: step, epoch, cursor, metrics so far),
/scalars (JSON: the rest of the optimizer's state), /config (TOML): texts; attribute `format` of /: version number.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psmpi.errors import UserError
from psmpi.partition import Layout, Parameter, Piece, Runs

FORMAT = 1
NAME = re.compile(r"step-(\d{9})\.h5")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` steps done in all, `cursor` of them in `epoch` (from 0); `loss_sum` of that epoch."""

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    rows: tuple[dict[str, Any], ...] = field(default=())


def folder(out: Path) -> Path:
    return out / "checkpoints"


def available(out: Path) -> list[Path]:
    """The checkpoints of a run directory, oldest first."""
    found = folder(out).iterdir() if folder(out).is_dir() else ()
    return sorted(path for path in found if NAME.fullmatch(path.name))


def find(resume: str, out: Path) -> Path | None:
    """The file that --resume names; `auto`: the newest readable one in `out`, None where there is none.

    UserError where a named file is missing or is not a checkpoint.
    """
    if resume == "auto":
        for path in reversed(available(out)):
            try:
                read_progress(path)
            except UserError:
                continue
            return path
        return None
    path = Path(resume)
    if path.is_dir():
        newest = available(path)
        if not newest:
            raise UserError(f"--resume {path}: no checkpoint in {folder(path)}; give the path of an .h5 file")
        path = newest[-1]
    read_progress(path)
    return path


def _open(path: Path) -> h5py.File:
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise UserError(f"--resume {path}: there is no such file; use --resume auto for the newest in --out") from None
    except OSError as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error}): it is damaged or not HDF5; use another one"
        ) from None
    version = file.attrs.get("format")
    if version is None or "progress" not in file:
        file.close()
        raise UserError(f"{path} is HDF5 but not a psmpi checkpoint (it has no attribute `format` or no `progress`)")
    if int(version) > FORMAT:
        file.close()
        raise UserError(
            f"checkpoint {path} has format {version}, this psmpi reads up to {FORMAT}: install a newer psmpi"
        )
    return file


def _text(file: h5py.File, name: str) -> str:
    try:
        return str(file[name].asstr()[()])
    except (KeyError, OSError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {file.filename}: {name} cannot be read ({error}); the file is damaged") from None


def read_progress(path: Path) -> Progress:
    """Where the run stood; UserError where the file is missing, damaged, of a newer format or no checkpoint."""
    with _open(path) as file:
        table = json.loads(_text(file, "progress"))
    return Progress(**{**table, "rows": tuple(table["rows"])})


def read_config(path: Path) -> str:
    """The configuration, as TOML."""
    with _open(path) as file:
        return _text(file, "config")


def _spans(layout: Layout, parameter: int, shard: Runs) -> list[tuple[int, int, slice]]:
    """Where a shard and a parameter meet: (first element, last element of the flattened tensor, slice of the shard)."""
    spans = []
    size = layout.parameters[parameter].unit_size
    for piece in layout.pieces():
        if piece.parameter == parameter:
            whole = Runs(((piece.offset, _end(piece, size)),))
            for a, b in (whole & shard).intervals:
                at = piece.first * size + a - piece.offset
                spans.append((at, at + b - a, shard.local(a, b)))
    return spans


def _end(piece: Piece, unit_size: int) -> int:
    return piece.offset + (piece.last - piece.first) * unit_size


class Writer:
    """Writes checkpoints of a method's shards from rank 0, tensor by tensor; at most one tensor is held besides."""

    def __init__(self, world: Any, layout: Layout, shards: Sequence[Runs], out: Path, keep: int):
        self.world, self.layout, self.out, self.keep = world, layout, out, keep
        # A run that several ranks own is written by the first of them.
        self.writes, claimed = [], Runs()
        for shard in shards:
            self.writes.append(shard - claimed)
            claimed = Runs.union(claimed.intervals + shard.intervals)
        self.shard = shards[world.rank]

    def _collect(self, vector: np.ndarray, parameter: int) -> np.ndarray | None:
        """The whole tensor on rank 0, from the ranks that own its pieces; None elsewhere."""
        world, shape = self.world, self.layout.parameters[parameter].shape
        whole = np.empty(prod(shape), vector.dtype) if world.rank == 0 else None
        for rank, runs in enumerate(self.writes):
            if rank not in (0, world.rank) and world.rank != 0:
                continue
            for a, b, local in _spans(self.layout, parameter, runs):
                if rank == world.rank:
                    at = self._position(runs, local)
                    if whole is None:
                        world.Send(np.ascontiguousarray(vector[at]), dest=0)
                    else:
                        whole[a:b] = vector[at]
                elif whole is not None:
                    world.Recv(whole[a:b], source=rank)
        return None if whole is None else whole.reshape(shape)

    def _position(self, runs: Runs, local: slice) -> slice:
        """From a slice of this rank's written runs to the slice of its whole shard."""
        k = int(np.searchsorted(runs.offsets, local.start, side="right")) - 1
        start = runs.intervals[k][0] + local.start - runs.offsets[k]
        return self.shard.local(start, start + local.stop - local.start)

    def write(
        self, vectors: Mapping[str, np.ndarray], scalars: Mapping[str, float | int], progress: Progress, config: str
    ) -> None:
        """Write one checkpoint; it appears under its name whole or not at all. Older ones beyond `keep` are removed."""
        target = folder(self.out) / f"step-{progress.step:09d}.h5"
        try:
            self._write(target, vectors, {"scalars": json.dumps(dict(scalars)), "config": config,
                                          "progress": json.dumps(vars(progress))})  # fmt: skip
        except OSError as error:
            raise UserError(f"cannot write the checkpoint {target}: {error}; check --out, space and rights") from None

    def _write(self, target: Path, vectors: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> None:
        partial, file = target.with_name(f".{target.name}.part"), None
        if self.world.rank == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = h5py.File(partial, "w")
            file.attrs["format"] = FORMAT
            # Data sets, not attributes: these end at 64 kB.
            for name, text in texts.items():
                file[name] = text
        for name, vector in vectors.items():
            group = "weights" if name == "weights" else f"optimizer/{name}"
            for k, parameter in enumerate(self.layout.parameters):
                tensor = self._collect(vector, k)
                if file is not None:
                    file.create_dataset(f"{group}/{parameter.name}", data=tensor, fletcher32=True)
        if file is not None:
            file.close()
            _settle(partial, target)
            for old in available(self.out)[: -self.keep] if self.keep > 0 else ():
                old.unlink()


def _settle(partial: Path, target: Path) -> None:
    """Rename a complete file to its name, so that a crash leaves the old state or the new one."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(
    path: Path,
    layout: Layout,
    shard: Runs,
    vectors: Mapping[str, np.ndarray],
    scalars: dict[str, float | int],
) -> None:
    """Fill this rank's `vectors` and `scalars` from a checkpoint, reading only the rows of its own shard.

    UserError names a tensor that is missing or has another shape, with what the file has and what the model wants.
    """
    with _open(path) as file:
        for name, vector in vectors.items():
            group = "weights" if name == "weights" else f"optimizer/{name}"
            for k, parameter in enumerate(layout.parameters):
                dataset = _dataset(file, f"{group}/{parameter.name}", parameter, path)
                for a, b, local in _spans(layout, k, shard):
                    try:
                        vector[local] = _read(dataset, parameter, a, b)
                    except OSError as error:
                        raise UserError(f"checkpoint {path}, {dataset.name}: {error}; the file is damaged") from None
        scalars.update(json.loads(_text(file, "scalars")))


def _dataset(file: h5py.File, name: str, parameter: Parameter, path: Path) -> h5py.Dataset:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        kept = ", ".join(file["optimizer"]) if "optimizer" in file else "none"
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


def _read(dataset: h5py.Dataset, parameter: Parameter, first: int, last: int) -> np.ndarray:
    """Elements [first, last) of the flattened tensor, reading only the leading rows they lie in."""
    row = prod(parameter.shape[1:])
    top = first // row
    rows = dataset[top : -(-last // row)].reshape(-1)
    return rows[first - top * row : last - top * row]
