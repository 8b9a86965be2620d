"""Contents of a checkpoint besides tensors: configuration, layouts and progress, as readable texts."""

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
# The training method's own vectors in a file that does not name them.
FORMER_OWN = frozenset({"anchor", "handed", "left", "moving", "outer"})
SPACE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Progress:
    """Progress of a run: `step` steps in all, `cursor` of them in the present `epoch` (from 0).

    loss_sum: sum of the losses in the present epoch. seconds, bytes_sent, bytes_received: of the run so far. rows:
    metrics of the epochs done.
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
        """Accuracy on the test or validation samples after the last whole epoch, in 0..1; None: not measured."""
        row = self.rows[-1] if self.rows else {}
        return row.get("test_accuracy", row.get("validation_accuracy"))

    @property
    def score(self) -> str:
        """Text with the score after the last whole epoch: accuracy or RMSE."""
        row = self.rows[-1] if self.rows else {}
        shown = (SCORES[key](row[key]) for key in SCORES if key in row and key.endswith(("accuracy", "rmse")))
        return next(shown, "test accuracy -")


@dataclass(frozen=True)
class Contents:
    """Contents of a checkpoint without its tensors.

    config: configuration, TOML. in_shape: shape of a sample. layout: of the whole network. progress: of the run.
    scalars: numbers of the optimizer and of the method. random: seed and counters that random numbers follow from.
    placement, provenance: ranks, hosts and versions, for people. part: classes whose part the file holds; None: all.
    vectors: names of the vectors under /optimizer. spaces: layouts, by name, of other vectors, of any dtype. task:
    "classes" or "regression". by_step: whether each step of a sequence has scores. own: vectors under /optimizer of the
    training method, not of the optimizer. data: identity of the data set, see `psmpi.data.identity`, {} if the file has
    none. characters: characters of a text, one for each token and class; "": no text. names: names of the classes,
    strings, or numbers or booleans of labels in arrays; (): labels are numbers of classes. columns: names of a table's
    features; (): none.
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
        """The file's data sets of text, by name."""
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
        # json.dumps escapes to ASCII: HDF5 would end a string at a NUL.
        texts |= {"characters": json.dumps(self.characters)} if self.characters else {}
        texts |= {"names": json.dumps(self.names)} if self.names else {}
        texts |= {"columns": json.dumps(self.columns)} if self.columns else {}
        return texts if self.part is None else {**texts, "part": json.dumps(self.part)}

    @staticmethod
    def of(texts: Mapping[str, str]) -> Contents:
        """The inverse of `texts`. Missing or wrong entries raise an exception, such as ValueError or KeyError."""
        rows = tuple(_row(line) for line in texts["metrics"].splitlines())
        # Sparsity patterns have to be in the text: a file must not make psmpi open other files.
        expect(not names_files(parse_toml(texts["config"])), "config, pattern")
        layout = table_of(texts["layout"])
        progress = replace(_progress(table_of(texts["progress"])), rows=rows)
        scalars = {str(name): finite(value, name) for name, value in table_of(texts["scalars"]).items()}
        expect(min(scalars.values(), default=0) >= 0, f"scalars {scalars}"[:80])
        contents = Contents(
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
        expect(all(isinstance(name, str) for name in contents.own), "layout, own")
        expect(contents.task in ("classes", "regression"), "layout, task")
        by_step = contents.by_step
        expect(isinstance(by_step, bool) and by_step <= (len(contents.in_shape) == 2), "layout, by_step")
        part, classes = contents.part, range(contents.layout.classes)
        expect(part is None or (len(part) > 0 and all(type(c) is int and c in classes for c in part)), "part")
        return contents

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the classes as text."""
        return tuple(map(str, self.names))

    def weight_runs(self) -> Runs:
        """Runs of the flat vector of weights that the file holds."""
        return held_runs(self.layout, self.part)

    def layout_of(self, vector: str) -> Layout:
        """Layout of a vector: that of the space with this name, else that of the weights."""
        return self.spaces.get(vector, self.layout)

    def tensors(self, vector: str = "weights") -> list[Tensor]:
        """Tensors of a vector: "weights", a vector of the optimizer, or a space."""
        return make_tensors(self.spaces[vector]) if vector in self.spaces else make_tensors(self.layout, self.part)

    def group(self, vector: str) -> str:
        """HDF5 group of the tensors of a vector: weights, optimizer/NAME, or the space's name."""
        return vector if vector in self.spaces else group_of(vector)


def group_of(vector: str) -> str:
    """HDF5 group of the weights or of a vector of the optimizer."""
    return vector if vector == "weights" else f"optimizer/{vector}"


def _progress(table: dict[str, Any]) -> Progress:
    for name in COUNTS:
        whole(table[name], f"progress, {name}")
    for name in ("seconds", "loss_sum"):
        expect(finite(table[name], f"progress, {name}") >= 0, f"progress, {name}")
    expect(table["cursor"] <= table["step"], "progress, cursor")
    return Progress(**table)


def _row(line: str) -> dict[str, Any]:
    """Parse a row of the metrics. A loss may be infinite or NaN if the training diverged."""
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
    # JSON escapes a character to 12 letters at most, as a surrogate pair.
    expect(len(text) <= 12 * MOST + 2, "characters")
    characters = read_json(text)
    expect(isinstance(characters, str) and len(characters) == layout["classes"] <= MOST, "characters")
    characters.encode()
    expect(all(a < b for a, b in pairwise(characters)), "characters")
    return str(characters)


def _columns(text: str, layout: Mapping[str, Any]) -> tuple[str, ...]:
    names = read_json(text)
    expect(isinstance(names, list) and len(names) == prod(sizes(layout["in_shape"])), "columns")
    expect(all(isinstance(name, str) for name in names) and len(set(names)) == len(names), "columns")
    return tuple(names)


def _names(text: str, layout: Mapping[str, Any]) -> tuple[str | int | float | bool, ...]:
    # JSON takes 12 letters at most for a character, and quotes, a comma and a space for each name.
    expect(len(text) <= layout["classes"] * (12 * LONGEST + 4) + 2, "names")
    names = read_json(text)
    expect(isinstance(names, list) and len(names) == layout["classes"], "names")
    if all(isinstance(name, str) for name in names):
        return check_names(names)
    expect({type(name) for name in names} in ({int}, {float}, {bool}), "names")
    expect(all(a < b for a, b in pairwise(names)), "names")
    return tuple(names)


def read_contents(path: Path) -> Contents:
    """Read the contents of a file that `check_file` has passed. DamagedError for texts that break the format."""
    with open_file(path) as file:
        try:
            texts = {name: str(file[name].asstr()[0]) for name in TEXTS if isinstance(file.get(name), h5py.Dataset)}
            return replace(Contents.of(texts), vectors=frozenset(file.get("optimizer", ())))
        except Exception as error:
            raise DamagedError(
                f"checkpoint {path} was not written as psmpi/checkpoint/FORMAT.md says ({repr(error)[:200]}); use "
                "another one"
            ) from None
