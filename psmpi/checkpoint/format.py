"""What a checkpoint file holds; FORMAT.md beside this file describes it.

The first `HEADER` bytes are a text that HDF5 skips (its user block): format version, length and SHA-256 of all bytes
behind it. They are read before HDF5 sees the file, so that no damaged byte ever reaches it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from psmpi.config import tomllib
from psmpi.errors import DamagedError, UserError
from psmpi.layout import Block, Layout, Parameter, Piece, Runs

FORMAT = 1
HEADER = 512
NAME = re.compile(r"step-(\d{9})\.h5")
# Elements of a chunk at most, where a tensor's rows allow it.
CHUNK = 1 << 18
READ = 1 << 20
HEADER_TEXT = re.compile(rb"psmpi checkpoint (\d{1,9})\nbytes (\d{1,18})\nsha256 ([0-9a-f]{64})\n\0*")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` steps done in all, `cursor` of them in `epoch` (from 0); `loss_sum` of that epoch.

    `rows` are the metrics of the epochs done.
    """

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    rows: tuple[dict[str, Any], ...] = field(default=())

    @property
    def accuracy(self) -> float | None:
        """Test accuracy after the last whole epoch."""
        return self.rows[-1].get("test_accuracy") if self.rows else None


@dataclass(frozen=True)
class Contents:
    """Everything in a checkpoint but its tensors.

    config: TOML; in_shape: of a sample; task: what the scores are for, "classes" or "regression"; layout: of the whole
    network; part: the classes whose part alone the file holds, None for all; placement, provenance: what ranks did and
    where, for people; random: what random numbers are drawn from; scalars: of the optimizer.
    """

    config: str
    in_shape: tuple[int, ...]
    layout: Layout
    progress: Progress = Progress()
    scalars: Mapping[str, float | int] = field(default_factory=dict)
    random: Mapping[str, Any] = field(default_factory=dict)
    placement: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    part: tuple[int, ...] | None = None
    # The optimizer's vectors that a file has besides the weights.
    vectors: frozenset[str] = frozenset()
    task: str = "classes"

    def texts(self) -> dict[str, str]:
        """The data sets of text: their names and what they say."""
        progress = asdict(self.progress)
        rows = progress.pop("rows")
        texts = {
            "config": self.config,
            "layout": json.dumps({"in_shape": self.in_shape, "task": self.task, **_describe(self.layout)}),
            "metrics": "".join(json.dumps(row) + "\n" for row in rows),
            "placement": json.dumps(dict(self.placement)),
            "progress": json.dumps(progress),
            "provenance": json.dumps(dict(self.provenance)),
            "random": json.dumps(dict(self.random)),
            "scalars": json.dumps(dict(self.scalars)),
        }
        return texts if self.part is None else {**texts, "part": json.dumps(self.part)}

    @staticmethod
    def of(texts: Mapping[str, str]) -> Contents:
        """The reverse of `texts`. An exception of some kind where something is missing or wrong."""
        rows = tuple(_table(line) for line in texts["metrics"].splitlines())
        for row in rows:
            _expect(isinstance(row.get("test_accuracy", 0.0), float | int), "metrics")
        tomllib.loads(texts["config"])
        layout = json.loads(texts["layout"])
        progress = replace(Progress(**_table(texts["progress"])), rows=rows)
        for name, value in vars(progress).items():
            _expect(name == "rows" or (isinstance(value, float | int) and value >= 0), f"progress, {name}")
        scalars = _table(texts["scalars"])
        _expect(all(isinstance(value, float | int) for value in scalars.values()), "scalars")
        made = Contents(
            config=texts["config"],
            in_shape=_sizes(layout["in_shape"]),
            layout=_layout(layout),
            progress=progress,
            scalars=scalars,
            random=_table(texts["random"]),
            placement=_table(texts["placement"]),
            provenance=_table(texts["provenance"]),
            part=tuple(json.loads(texts["part"])) if "part" in texts else None,
            task=layout.get("task", "classes"),
        )
        _expect(made.task in ("classes", "regression"), "layout, task")
        known = set(range(made.layout.classes))
        _expect(made.part is None or (len(made.part) > 0 and set(made.part) <= known), "part")
        return made

    def held(self) -> Runs:
        """The runs of the flat vector that the file holds."""
        return held_runs(self.layout, self.part)

    def tensors(self) -> list[Tensor]:
        """The tensors of the weights, and of each vector of the optimizer."""
        return make_tensors(self.layout, self.part)


@dataclass(frozen=True)
class Tensor:
    """A named tensor in a file: `spans` say which elements of it, [first, last), lie where in the flat vector.

    A tensor of a part has only its units, (units, the shape of one); a whole one has its parameter's shape.
    """

    name: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int, int], ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @staticmethod
    def of(parameter: Parameter, pieces: list[Piece]) -> Tensor:
        pieces = sorted(pieces, key=lambda p: p.first)
        sizes = [(p.last - p.first) * parameter.unit_size for p in pieces]
        starts = accumulate(sizes, initial=0)
        spans = tuple((at, at + n, p.offset) for at, n, p in zip(starts, sizes, pieces, strict=False))
        units = sum(p.last - p.first for p in pieces)
        if units == parameter.units:
            return Tensor(parameter.name, parameter.shape, spans)
        axes = [*accumulate(parameter.shape, lambda a, b: a * b)]
        rest = parameter.shape[axes.index(parameter.units) + 1 :]
        return Tensor(parameter.name, (units, *rest), spans)


def held_runs(layout: Layout, part: Sequence[int] | None) -> Runs:
    """What a file holds of the flat vector; what no class uses goes with class 0, so that all parts make the whole."""
    if part is None:
        return Runs.union([(0, layout.size)])
    return Runs.union(layout.part(part).intervals + (layout.dead.intervals if 0 in part else ()))


def make_tensors(layout: Layout, part: Sequence[int] | None = None) -> list[Tensor]:
    """The tensors of a file with the parameters of `layout`, or with the part of some classes."""
    held = held_runs(layout, part)
    found = []
    for k, parameter in enumerate(layout.parameters):
        pieces = [p for p in layout.pieces() if p.parameter == k and any(a <= p.offset < b for a, b in held.intervals)]
        if pieces:
            found.append(Tensor.of(parameter, pieces))
    return found


def _describe(layout: Layout) -> dict[str, Any]:
    """A layout as plain data; pieces are [number of the parameter, first unit, last unit, offset]."""
    return {
        "classes": layout.classes,
        "parameters": [{"name": p.name, "shape": p.shape, "units": p.units} for p in layout.parameters],
        "blocks": [
            {
                "classes": sorted(b.classes),
                "start": b.start,
                "stop": b.stop,
                "pieces": [[p.parameter, p.first, p.last, p.offset] for p in b.pieces],
            }
            for b in layout.blocks
        ],
    }


def _layout(table: Mapping[str, Any]) -> Layout:
    parameters = tuple(Parameter(str(p["name"]), _sizes(p["shape"]), int(p["units"])) for p in table["parameters"])
    for p in parameters:
        # Units are the elements of some leading axes.
        _expect(p.units in accumulate(p.shape, lambda a, b: a * b), f"layout, {p.name}")
    _expect(len({p.name for p in parameters}) == len(parameters), "layout, parameters")
    at, units, blocks = 0, [0] * len(parameters), []
    for b in table["blocks"]:
        _expect(b["start"] == at, "layout, blocks")
        pieces = tuple(Piece(*map(int, p)) for p in b["pieces"])
        for piece in pieces:
            _expect(0 <= piece.parameter < len(parameters) and piece.first < piece.last, "layout, pieces")
            _expect(piece.offset == at, "layout, pieces")
            units[piece.parameter] += piece.last - piece.first
            at += (piece.last - piece.first) * parameters[piece.parameter].unit_size
        _expect(b["stop"] == at, "layout, blocks")
        blocks.append(Block(frozenset(map(int, b["classes"])), b["start"], b["stop"], pieces))
    _expect(units == [p.units for p in parameters], "layout, pieces")
    classes = int(table["classes"])
    _expect(all(block.classes <= set(range(classes)) for block in blocks), "layout, classes")
    return Layout(parameters, tuple(blocks), classes)


def _table(text: str) -> dict[str, Any]:
    found = json.loads(text)
    _expect(isinstance(found, dict), text[:40])
    return dict(found)


def _sizes(numbers: Any) -> tuple[int, ...]:
    _expect(all(isinstance(n, int) and n > 0 for n in numbers), f"sizes {numbers}")
    return tuple(numbers)


def _expect(true: bool, what: str) -> None:
    if not true:
        raise ValueError(what)


def group_of(vector: str) -> str:
    """The HDF5 group that holds the tensors of a vector of the run: `weights`, `optimizer/m`, ..."""
    return vector if vector == "weights" else f"optimizer/{vector}"


def table_path(name: str) -> str:
    """The HDF5 data set of a table."""
    return f"elements/{name}"


def chunk_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Chunks of whole rows, or of parts of one row where it is longer than `CHUNK` elements."""
    chunk: list[int] = []
    room = CHUNK
    for length in reversed(shape):
        chunk.insert(0, max(1, min(length, room)))
        room //= chunk[0]
    return tuple(chunk)


def filters(gzip: int) -> dict[str, Any]:
    """Options of a data set of numbers: checksums, and compression from 1 to 9 if wanted."""
    return {"fletcher32": True, **({"compression": "gzip", "compression_opts": gzip, "shuffle": True} if gzip else {})}


def as_data(text: str) -> np.ndarray:
    """A text as an array of one string that fits it, which a data set of numbers' filters can guard."""
    return np.array([text.encode()], h5py.string_dtype("utf-8", max(1, len(text.encode()))))


def folder(out: Path) -> Path:
    return out / "checkpoints"


def available(out: Path) -> list[Path]:
    """The checkpoints of a run directory (or of its folder of checkpoints), whole or damaged, oldest first."""
    place = out if out.name == folder(out).name and not folder(out).is_dir() else folder(out)
    found = place.iterdir() if place.is_dir() else ()
    return sorted(path for path in found if NAME.fullmatch(path.name) and path.is_file())


def partial_of(target: Path) -> Path:
    """The name of a checkpoint while it is being written."""
    return target.with_name(f".{target.name}.part")


def digest(path: Path) -> tuple[int, str]:
    """Length and SHA-256 of what follows the header."""
    total, length = hashlib.sha256(), 0
    with path.open("rb") as file:
        file.seek(HEADER)
        while data := file.read(READ):
            total.update(data)
            length += len(data)
    return length, total.hexdigest()


def seal(path: Path) -> None:
    """Write the header of a finished HDF5 file and flush it to the disk."""
    length, sha256 = digest(path)
    with path.open("r+b") as file:
        file.write(f"psmpi checkpoint {FORMAT}\nbytes {length}\nsha256 {sha256}\n".encode().ljust(HEADER, b"\0"))
        file.flush()
        os.fsync(file.fileno())


def check(path: Path) -> None:
    """Read the whole file and compare it with its header.

    DamagedError where it is not what was written or no checkpoint; UserError where it is missing, cannot be read or is
    of a newer format.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER)
        size = path.stat().st_size
        found = HEADER_TEXT.fullmatch(header) if len(header) == HEADER else None
        if found is None:
            if header.startswith(b"\x89HDF"):
                raise DamagedError(
                    f"{path} is HDF5 but not a psmpi checkpoint: give a file of a run's checkpoints folder"
                )
            if header.startswith(b"psmpi checkpoint"):
                raise DamagedError(f"checkpoint {path} is damaged in its first {HEADER} bytes; use another one")
            raise DamagedError(f"{path} is not a psmpi checkpoint: give a file of a run's checkpoints folder")
        version, length = int(found[1]), int(found[2])
        if version > FORMAT:
            raise UserError(
                f"checkpoint {path} has format {version}, this psmpi reads up to {FORMAT}: install a newer psmpi"
            )
        if size != HEADER + length:
            raise DamagedError(
                f"checkpoint {path} has {size:,} bytes, its header says {HEADER + length:,}: it was cut short or "
                "something was added; use another one"
            )
        if digest(path)[1] != found[3].decode():
            raise DamagedError(
                f"checkpoint {path} is damaged: its bytes do not have the SHA-256 that its header says; use another one"
            )
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such checkpoint; give a file of a checkpoints folder, or a run directory"
        ) from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None


def open_file(path: Path) -> h5py.File:
    """Open a file that `check` has passed."""
    try:
        # Best effort: file systems without locks are no reason to fail.
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None


def read_contents(path: Path) -> Contents:
    """What a file that `check` has passed says of itself. DamagedError where that makes no sense."""
    with open_file(path) as file:
        try:
            texts = {name: str(item.asstr()[0]) for name, item in file.items() if isinstance(item, h5py.Dataset)}
            return replace(Contents.of(texts), vectors=frozenset(file.get("optimizer", ())))
        except Exception as error:
            raise DamagedError(
                f"checkpoint {path} was not written as psmpi/checkpoint/FORMAT.md says ({error!r}); use another one"
            ) from None


def validate(path: Path) -> Contents:
    """`check`, and all that a file says of itself, and that every tensor is there. Errors as those of `check`."""
    check(path)
    contents = read_contents(path)
    with open_file(path) as file:
        vectors = ["weights", *(f"optimizer/{name}" for name in file.get("optimizer", ()))]
        names = [f"{group}/{tensor.name}" for group in vectors for tensor in contents.tensors()]
        shapes = [tensor.shape for _ in vectors for tensor in contents.tensors()]
        dtypes = set()
        for name, shape in zip(names, shapes, strict=True):
            found = file.get(name)
            has = f"is {found.dtype} {found.shape}" if isinstance(found, h5py.Dataset) else "is missing"
            if isinstance(found, h5py.Dataset) and found.shape == shape and found.dtype in ("f4", "f8"):
                dtypes.add(found.dtype)
                if len(dtypes) == 1:
                    continue
            raise DamagedError(f"checkpoint {path}: {name} {has}, its layout says {shape}, float; use another one")
        tables = file.get("elements", {})
        rows = {table.shape[:1] if isinstance(table, h5py.Dataset) else () for table in tables.values()}
        if len(rows) > 1 or () in rows:
            raise DamagedError(f"checkpoint {path}: its tables of elements are not of one length; use another one")
    return contents
