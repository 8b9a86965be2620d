"""Contents of a checkpoint beside tensors: configuration, layouts, progress, in texts that people can read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import h5py

from psmpi.checkpoint.described import (
    describe_layout,
    expect,
    finite,
    layout_of,
    read_json,
    sizes,
    table_of,
    whole,
)
from psmpi.checkpoint.format import open_file
from psmpi.checkpoint.tensors import Tensor, held_runs, make_tensors
from psmpi.config import parse_toml
from psmpi.data import Identity
from psmpi.data.names import LONGEST, check_names
from psmpi.data.text import MOST
from psmpi.errors import DamagedError
from psmpi.layout import Layout, Runs
from psmpi.metrics import SCORES
from psmpi.nn.layers.pattern_file import names_files

TABLES = ("elements", "rank")
TEXTS = (
    "characters", "columns", "config", "data", "layout", "metrics", "names", "part", "placement", "progress",
    "provenance", "random", "scalars",
)  # fmt: skip
COUNTS = ("step", "epoch", "cursor", "bytes_sent", "bytes_received")
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
        """Test, or validation, accuracy after the last whole epoch."""
        row = self.rows[-1] if self.rows else {}
        return row.get("test_accuracy", row.get("validation_accuracy"))

    @property
    def score(self) -> str:
        """The test scores after the last whole epoch, for people: accuracy, or RMSE."""
        row = self.rows[-1] if self.rows else {}
        shown = (SCORES[key](row[key]) for key in SCORES if key in row and key.endswith(("accuracy", "rmse")))
        return next(shown, "test accuracy -")


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
    columns: of a table, the names of the features, else (); names: of the classes, where labels are not their numbers;
    strings, or of labels in arrays numbers or booleans.
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
    names: tuple[str | int | float | bool, ...] = ()
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.spaces:
            if not SPACE.fullmatch(name) or name in ("weights", "optimizer", *TABLES, *TEXTS):
                raise ValueError(f"{name!r} cannot name tensors of a checkpoint: it is taken, or no plain name")

    def texts(self) -> dict[str, str]:
        """The data sets of text: their names and what they say."""
        progress = asdict(self.progress)
        rows = progress.pop("rows")
        spaces = {"spaces": {name: describe_layout(of) for name, of in self.spaces.items()}} if self.spaces else {}
        texts = {
            "config": self.config,
            "layout": json.dumps(
                {
                    "in_shape": self.in_shape,
                    "task": self.task,
                    **({"by_step": True} if self.by_step else {}),
                    "own": sorted(self.own),
                    **describe_layout(self.layout),
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
        texts |= {"names": json.dumps(self.names)} if self.names else {}
        texts |= {"columns": json.dumps(self.columns)} if self.columns else {}
        return texts if self.part is None else {**texts, "part": json.dumps(self.part)}

    @staticmethod
    def of(texts: Mapping[str, str]) -> Contents:
        """The reverse of `texts`. An exception of some kind where something is missing or wrong."""
        rows = tuple(_row(line) for line in texts["metrics"].splitlines())
        # Patterns of layers are in the text itself.
        expect(not names_files(parse_toml(texts["config"])), "config, pattern")
        layout = table_of(texts["layout"])
        progress = replace(_progress(table_of(texts["progress"])), rows=rows)
        scalars = {str(name): finite(value, name) for name, value in table_of(texts["scalars"]).items()}
        expect(min(scalars.values(), default=0) >= 0, f"scalars {scalars}"[:80])
        made = Contents(
            config=texts["config"],
            in_shape=sizes(layout["in_shape"]),
            layout=layout_of(layout),
            progress=progress,
            scalars=scalars,
            random=_random(table_of(texts["random"])),
            placement=table_of(texts["placement"]),
            provenance=table_of(texts["provenance"]),
            part=tuple(read_json(texts["part"])) if "part" in texts else None,
            spaces={name: layout_of(of) for name, of in layout.get("spaces", {}).items()},
            task=layout.get("task", "classes"),
            by_step=layout.get("by_step", False),
            own=frozenset(layout.get("own", FORMER_OWN)),
            data=_identity(table_of(texts["data"])) if "data" in texts else {},
            characters=_characters(texts["characters"], layout) if "characters" in texts else "",
            names=_names(texts["names"], layout) if "names" in texts else (),
            columns=_columns(texts["columns"], layout) if "columns" in texts else (),
        )
        expect(all(isinstance(name, str) for name in made.own), "layout, own")
        expect(made.task in ("classes", "regression"), "layout, task")
        expect(isinstance(made.by_step, bool) and made.by_step <= (len(made.in_shape) == 2), "layout, by_step")
        known = range(made.layout.classes)
        expect(
            made.part is None or (len(made.part) > 0 and all(type(c) is int and c in known for c in made.part)), "part"
        )
        return made

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the classes as text."""
        return tuple(map(str, self.names))

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


def _progress(table: dict[str, Any]) -> Progress:
    for name in COUNTS:
        whole(table[name], f"progress, {name}")
    for name in ("seconds", "loss_sum"):
        expect(finite(table[name], f"progress, {name}") >= 0, f"progress, {name}")
    expect(table["cursor"] <= table["step"], "progress, cursor")
    return Progress(**table)


def _row(line: str) -> dict[str, Any]:
    """A row of the metrics. A loss may be infinite, or no number, where a training went wrong."""
    row = json.loads(line)
    expect(isinstance(row, dict), "metrics")
    for name in ("epoch", "step"):
        whole(row.get(name, 0), f"metrics, {name}")
    expect(0 <= finite(row.get("test_accuracy", 0), "metrics, test_accuracy") <= 1, "metrics, test_accuracy")
    for name, value in row.items():
        expect(type(value) in (int, float) or name not in SCORES, f"metrics, {name}")
    return dict(row)


def _random(table: dict[str, Any]) -> dict[str, Any]:
    whole(table.get("samples", 0), "random, samples")
    return table


def _identity(table: dict[str, Any]) -> dict[str, Any]:
    return Identity.of(table).table()


def _characters(text: str, layout: Mapping[str, Any]) -> str:
    # A character takes 12 letters at most, as two escaped halves.
    expect(len(text) <= 12 * MOST + 2, "characters")
    found = read_json(text)
    expect(isinstance(found, str) and len(found) == layout["classes"] <= MOST, "characters")
    found.encode()
    expect(all(a < b for a, b in pairwise(found)), "characters")
    return str(found)


def _columns(text: str, layout: Mapping[str, Any]) -> tuple[str, ...]:
    found = read_json(text)
    expect(isinstance(found, list) and len(found) == prod(sizes(layout["in_shape"])), "columns")
    expect(all(isinstance(name, str) for name in found) and len(set(found)) == len(found), "columns")
    return tuple(found)


def _names(text: str, layout: Mapping[str, Any]) -> tuple[str | int | float | bool, ...]:
    # A character takes 12 letters at most, and each name quotes, a comma and a space.
    expect(len(text) <= layout["classes"] * (12 * LONGEST + 4) + 2, "names")
    found = read_json(text)
    expect(isinstance(found, list) and len(found) == layout["classes"], "names")
    if all(isinstance(name, str) for name in found):
        return check_names(found)
    expect({type(name) for name in found} in ({int}, {float}, {bool}), "names")
    expect(all(a < b for a, b in pairwise(found)), "names")
    return tuple(found)


def read_contents(path: Path) -> Contents:
    """The contents of a file that `validate` has passed. DamagedError where they make no sense."""
    with open_file(path) as file:
        try:
            texts = {name: str(file[name].asstr()[0]) for name in TEXTS if isinstance(file.get(name), h5py.Dataset)}
            return replace(Contents.of(texts), vectors=frozenset(file.get("optimizer", ())))
        except Exception as error:
            raise DamagedError(
                f"checkpoint {path} was not written as psmpi/checkpoint/FORMAT.md says ({repr(error)[:200]}); use "
                "another one"
            ) from None
