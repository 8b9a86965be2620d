"""Contents of a checkpoint beside tensors: configuration, layouts, progress, in texts that people can read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import h5py

from psmpi.checkpoint.format import check_file, open_file
from psmpi.checkpoint.tensors import Tensor, held_runs, make_tensors
from psmpi.config import parse_toml
from psmpi.data import Identity
from psmpi.data.text import MOST
from psmpi.errors import DamagedError
from psmpi.layout import Block, Classes, Each, Layout, Parameter, Piece, Runs, Users
from psmpi.layout.classes import as_users
from psmpi.metrics import SCORES

TABLES = ("elements", "rank")
TEXTS = (
    "characters", "config", "data", "labels", "layout", "metrics", "part", "placement", "progress", "provenance",
    "random", "scalars",
)  # fmt: skip
# In files that do not say which vectors are the method's own, these are.
FORMER_OWN = frozenset({"anchor", "handed", "left", "moving", "outer"})
SPACE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Progress:
    """The progress of a run: `step` steps done in all, `cursor` of them in `epoch` (from 0); `loss_sum` of that epoch.

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

    @property
    def score(self) -> str:
        """The test scores after the last whole epoch, for people: accuracy, or RMSE."""
        row = self.rows[-1] if self.rows else {}
        return next((SCORES[key](row[key]) for key in ("test_accuracy", "test_rmse") if key in row), "test accuracy -")


@dataclass(frozen=True)
class Contents:
    """Everything in a checkpoint but its tensors.

    config: TOML; in_shape: of a sample; task: what the scores are for, "classes" or "regression"; by_step: whether
    there are scores at each step of sequences; layout: of the whole network; part: the classes whose part alone the
    file holds, None for all; placement, provenance: what ranks did and where, for people; random: what random numbers
    are drawn from; data: the identity of the data set, see `psmpi.data.identity`, empty in files that do not have it;
    scalars: of the optimizer; spaces: layouts, by name, of tensors that are neither weights nor vectors of the
    optimizer, each a vector of that name, of any dtype; own: the vectors under /optimizer that are the training
    method's, not the optimizer's; characters: of a text, what its tokens, and so the classes, stand for, else "";
    labels: what the classes are called, in ascending order, all of one type; () where they are their numbers.
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
    spaces: Mapping[str, Layout] = field(default_factory=dict)
    task: str = "classes"
    by_step: bool = False
    own: frozenset[str] = FORMER_OWN
    data: Mapping[str, Any] = field(default_factory=dict)
    characters: str = ""
    labels: tuple[str | int | float | bool, ...] = ()

    def __post_init__(self) -> None:
        for name in self.spaces:
            if not SPACE.fullmatch(name) or name in ("weights", "optimizer", *TABLES, *TEXTS):
                raise ValueError(f"{name!r} cannot name tensors of a checkpoint: it is taken, or no plain name")

    def texts(self) -> dict[str, str]:
        """The data sets of text: their names and what they say."""
        progress = asdict(self.progress)
        rows = progress.pop("rows")
        spaces = {"spaces": {name: _describe(of) for name, of in self.spaces.items()}} if self.spaces else {}
        texts = {
            "config": self.config,
            "layout": json.dumps(
                {
                    "in_shape": self.in_shape,
                    "task": self.task,
                    **({"by_step": True} if self.by_step else {}),
                    "own": sorted(self.own),
                    **_describe(self.layout),
                    **spaces,
                }
            ),
            "metrics": "".join(json.dumps(row) + "\n" for row in rows),
            "placement": json.dumps(dict(self.placement)),
            "progress": json.dumps(progress),
            "provenance": json.dumps(dict(self.provenance)),
            "random": json.dumps(dict(self.random)),
            "scalars": json.dumps(dict(self.scalars)),
        }
        texts |= {"data": json.dumps(dict(self.data))} if self.data else {}
        # In ASCII: a string of HDF5 ends at a NUL.
        texts |= {"characters": json.dumps(self.characters)} if self.characters else {}
        texts |= {"labels": json.dumps(self.labels)} if self.labels else {}
        return texts if self.part is None else {**texts, "part": json.dumps(self.part)}

    @staticmethod
    def of(texts: Mapping[str, str]) -> Contents:
        """The reverse of `texts`. An exception of some kind where something is missing or wrong."""
        rows = tuple(_table(line) for line in texts["metrics"].splitlines())
        for row in rows:
            _expect(isinstance(row.get("test_accuracy", 0.0), float | int), "metrics")
        parse_toml(texts["config"])
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
            spaces={name: _layout(of) for name, of in layout.get("spaces", {}).items()},
            task=layout.get("task", "classes"),
            by_step=layout.get("by_step", False),
            own=frozenset(layout.get("own", FORMER_OWN)),
            data=_identity(_table(texts["data"])) if "data" in texts else {},
            characters=_characters(texts["characters"], layout) if "characters" in texts else "",
            labels=_labels(texts["labels"], layout) if "labels" in texts else (),
        )
        _expect(all(isinstance(name, str) for name in made.own), "layout, own")
        _expect(made.task in ("classes", "regression"), "layout, task")
        _expect(isinstance(made.by_step, bool) and made.by_step <= (len(made.in_shape) == 2), "layout, by_step")
        known = range(made.layout.classes)
        _expect(made.part is None or (len(made.part) > 0 and all(c in known for c in made.part)), "part")
        return made

    def held(self) -> Runs:
        """The runs of the flat vector of the weights that the file holds."""
        return held_runs(self.layout, self.part)

    def layout_of(self, vector: str) -> Layout:
        """The layout of the weights and of each vector of the optimizer, or of a space."""
        return self.spaces.get(vector, self.layout)

    def tensors(self, vector: str = "weights") -> list[Tensor]:
        """The tensors of the weights and of each vector of the optimizer, or of a space."""
        return make_tensors(self.spaces[vector]) if vector in self.spaces else make_tensors(self.layout, self.part)

    def group(self, vector: str) -> str:
        """The HDF5 group that holds the tensors of a vector: `weights`, `optimizer/m`, a space's own."""
        return vector if vector in self.spaces else group_of(vector)


def group_of(vector: str) -> str:
    """The HDF5 group of the weights or of a vector of the optimizer."""
    return vector if vector == "weights" else f"optimizer/{vector}"


def _describe(layout: Layout) -> dict[str, Any]:
    """A layout as plain data; pieces are [number of the parameter, first unit, last unit, offset]."""
    return {
        "classes": layout.classes,
        "parameters": [{"name": p.name, "shape": p.shape, "units": p.units} for p in layout.parameters],
        "blocks": [
            {
                "classes": b.classes.ranges,
                **({"each": True} if isinstance(b.users, Each) else {}),
                "start": b.start,
                "stop": b.stop,
                "pieces": [[p.parameter, p.first, p.last, p.offset] for p in b.pieces],
            }
            for b in layout.bands
        ],
    }


def _layout(table: Mapping[str, Any]) -> Layout:
    parameters = tuple(Parameter(str(p["name"]), _sizes(p["shape"]), int(p["units"])) for p in table["parameters"])
    for p in parameters:
        # Units are the elements of some leading axes.
        _expect(p.units in accumulate(p.shape, lambda a, b: a * b), f"layout, {p.name}")
    _expect(len({p.name for p in parameters}) == len(parameters), "layout, parameters")
    classes, at, units, bands = int(table["classes"]), 0, [0] * len(parameters), []
    for b in table["blocks"]:
        _expect(b["start"] == at, "layout, blocks")
        users = _users(b["classes"], b.get("each", False), classes)
        count = users.count if isinstance(users, Each) else 1
        step, rest = divmod(b["stop"] - at, count)
        _expect(rest == 0, "layout, blocks")
        pieces = []
        for k, first, last, offset in (map(int, p) for p in b["pieces"]):
            _expect(0 <= k < len(parameters) and first < last and (last - first) % count == 0, "layout, pieces")
            _expect(offset == at, "layout, pieces")
            pieces.append(Piece(k, first, last, offset, count, step if count > 1 else 0))
            units[k] += last - first
            at += (last - first) // count * parameters[k].unit_size
        _expect(b["start"] + step == at, "layout, blocks")
        at = b["stop"]
        bands.append(Block(users, b["start"], b["stop"], tuple(pieces)))
    _expect(units == [p.units for p in parameters], "layout, pieces")
    return Layout(parameters, tuple(bands), classes)


def _users(table: Sequence[Any], each: bool, classes: int) -> Users:
    """The users of a block. In files of version 1 it is a list of the classes."""
    if table and isinstance(table[0], int):
        _expect(all(0 <= int(c) < classes for c in table), "layout, classes")
        return as_users(list(map(int, table)))
    some = Classes(tuple((int(first), int(last)) for first, last in table))
    ends = [-1, *(end for ends in some.ranges for end in ends), classes + 1]
    _expect(all(a < b for a, b in pairwise(ends)), "layout, classes")
    _expect(not each or len(some.ranges) == 1, "layout, classes")
    return Each(*some.ranges[0]) if each else as_users(some)


def _table(text: str) -> dict[str, Any]:
    found = json.loads(text)
    _expect(isinstance(found, dict), text[:40])
    return dict(found)


def _identity(table: dict[str, Any]) -> dict[str, Any]:
    return Identity.of(table).table()


def _characters(text: str, layout: Mapping[str, Any]) -> str:
    # A character takes 12 letters at most, as two escaped halves.
    _expect(len(text) <= 12 * MOST + 2, "characters")
    found = json.loads(text)
    _expect(isinstance(found, str) and len(found) == layout["classes"] <= MOST, "characters")
    found.encode()
    _expect(all(a < b for a, b in pairwise(found)), "characters")
    return str(found)


def _labels(text: str, layout: Mapping[str, Any]) -> tuple[str | int | float | bool, ...]:
    found = json.loads(text)
    _expect(isinstance(found, list) and len(found) == layout["classes"], "labels")
    _expect({type(label) for label in found} in ({str}, {int}, {float}, {bool}), "labels")
    _expect(all(a < b for a, b in pairwise(found)), "labels")
    return tuple(found)


def _sizes(numbers: Any) -> tuple[int, ...]:
    _expect(all(isinstance(n, int) and n > 0 for n in numbers), f"sizes {numbers}")
    return tuple(numbers)


def _expect(true: bool, what: str) -> None:
    if not true:
        raise ValueError(what)


def read_contents(path: Path) -> Contents:
    """The contents of a file that `check_file` has passed. DamagedError where they make no sense."""
    with open_file(path) as file:
        try:
            texts = {name: str(item.asstr()[0]) for name, item in file.items() if isinstance(item, h5py.Dataset)}
            return replace(Contents.of(texts), vectors=frozenset(file.get("optimizer", ())))
        except Exception as error:
            raise DamagedError(
                f"checkpoint {path} was not written as psmpi/checkpoint/FORMAT.md says ({error!r}); use another one"
            ) from None


def validate(path: Path) -> Contents:
    """`check_file`, and what a file says of itself, and that every tensor is there. Errors as those of `check_file`.

    A file that is as it was at the last call is not read again.
    """
    try:
        now = path.stat()
    except OSError:
        return _validate(path, ())
    return _validate(path, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))


@lru_cache(maxsize=2)
def _validate(path: Path, state: tuple[int, ...]) -> Contents:
    """`validate`; state: what changes when the file does."""
    check_file(path)
    contents = read_contents(path)
    with open_file(path) as file:
        dtypes = set()
        for vector in ["weights", *file.get("optimizer", ()), *contents.spaces]:
            for tensor in contents.tensors(vector):
                name, space = f"{contents.group(vector)}/{tensor.name}", vector in contents.spaces
                found = file.get(name)
                has = f"is {found.dtype} {found.shape}" if isinstance(found, h5py.Dataset) else "is missing"
                if isinstance(found, h5py.Dataset) and found.shape == tensor.shape:
                    if space and found.dtype.kind in "fiu":
                        continue
                    if not space and found.dtype in ("f4", "f8"):
                        dtypes.add(found.dtype)
                        if len(dtypes) == 1:
                            continue
                wanted = "numbers" if space else "float"
                raise DamagedError(
                    f"checkpoint {path}: {name} {has}, its layout says {tensor.shape}, {wanted}; use another one"
                )
        for group in TABLES:
            tables = file.get(group, {})
            rows = {table.shape[:1] if isinstance(table, h5py.Dataset) else () for table in tables.values()}
            if len(rows) > 1 or () in rows:
                raise DamagedError(f"checkpoint {path}: its tables in /{group} are not of one length; use another one")
    return contents
