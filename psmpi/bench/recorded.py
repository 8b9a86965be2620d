"""The figures of the documents: a TOML file with their commands, and the page that lists them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from psmpi.config.text import parse_toml
from psmpi.errors import UserError, nearest
from psmpi.files.whole import written

FILE = Path(__file__).with_name("figures.toml")
KINDS = ("score", "count", "time")
# Factor and offset from a number of metrics.jsonl to each unit.
UNITS = {"%": (100.0, 0.0), "% wrong": (-100.0, 100.0), "": (1.0, 0.0)}


@dataclass(frozen=True)
class Tolerance:
    """The largest difference of two values that count as the same: `within` + `share` of the recorded one."""

    why: str
    within: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class Figure:
    """Numbers that stand together in the documents, with the command that makes them.

    id: a unique name. page: the file below docs/ that shows the numbers. what: their names, in a few words.
    command: words of a shell, several commands joined by `&&`; `{data}` is the folder of data sets.
    read: where each number is found: `test_accuracy@5` is a key of epoch 5 in metrics.jsonl, `test_accuracy` of the
    last epoch, `rows.0.ms` a path in the JSON that a command of psmpi.bench writes. Empty: a person reads the output,
    or the command is a test, which passes or fails.
    value: the recorded numbers, in the order of `read`. shown: the text of the page, where no number is read.
    unit: see UNITS. tolerance: the name of one in the file. kind: score, count, or time, which other machines change.
    seconds: processor seconds of all processes. machine: the name of one in the file, "" where it is not known.
    """

    id: str
    page: str
    what: str
    command: str
    version: str
    date: str
    read: tuple[str, ...] = ()
    value: tuple[float, ...] = ()
    shown: str = ""
    unit: str = ""
    tolerance: str = "none"
    kind: str = "score"
    quick: bool = False
    seconds: float = 0.0
    machine: str = ""

    @property
    def test(self) -> bool:
        """Whether the command is a test of the checkout."""
        return "-m pytest" in self.command

    @property
    def remade(self) -> bool:
        """Whether a program can compare the figure."""
        return bool(self.read) or self.test

    @property
    def text(self) -> str:
        """The recorded numbers as a page shows them."""
        return numbers(self.value) if self.read else self.shown


@dataclass(frozen=True)
class Recorded:
    """The contents of the file. machines: descriptions by name."""

    figures: tuple[Figure, ...]
    tolerances: dict[str, Tolerance]
    machines: dict[str, str]

    def agrees(self, figure: Figure, values: Sequence[float]) -> bool:
        """Whether new values equal the recorded ones within the tolerance."""
        tolerance = self.tolerances[figure.tolerance]
        return len(values) == len(figure.value) and all(
            abs(new - old) <= tolerance.within + tolerance.share * abs(old) + 1e-9
            for new, old in zip(values, figure.value, strict=True)
        )

    def changed(self, changes: Iterable[Figure], machine: str) -> Recorded:
        """A copy with new versions of some figures, all made on the machine with this description."""
        machines = dict(self.machines)
        name = next((key for key, text in machines.items() if text == machine), f"m{len(machines) + 1}")
        machines[name] = machine
        new = {one.id: replace(one, machine=name) for one in changes}
        return replace(self, figures=tuple(new.get(one.id, one) for one in self.figures), machines=machines)


def numbers(values: Iterable[float]) -> str:
    """Numbers as tables show them."""
    return ", ".join(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}" for value in values)


def load(file: Path) -> Recorded:
    """Read the figures of a TOML file. UserError for a file of another form."""
    try:
        tables = parse_toml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--file {file}: {error.strerror}; give the path of a file of figures") from None
    except ValueError as error:
        raise UserError(f"--file {file}: not valid TOML: {error}") from None
    figures = Recorded(
        tuple(_made(Figure, one, f"{file}, figure {k + 1}") for k, one in enumerate(tables.get("figure", []))),
        {key: _made(Tolerance, one, f"{file}, tolerance {key}") for key, one in tables.get("tolerances", {}).items()},
        tables.get("machines", {}),
    )
    ids: set[str] = set()
    for one in figures.figures:
        _check(one, figures, f"{file}, figure {one.id}", ids)
        ids.add(one.id)
    return figures


def _made(kind: Any, table: Any, where: str) -> Any:
    """Make a dataclass from a table. UserError for missing and unknown keys."""
    if not isinstance(table, dict):
        raise UserError(f"{where}: expected a table of settings")
    known = {field.name for field in fields(kind)}
    for key in table:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near}?" if near else f"known are {', '.join(sorted(known))}"
            raise UserError(f"{where}: unknown key {key!r}: {hint}")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
    except TypeError as error:
        raise UserError(f"{where}: {str(error).partition(') ')[2]}") from None


def _check(figure: Figure, recorded: Recorded, where: str, ids: Collection[str]) -> None:
    for wrong, says in (
        (figure.id in ids, "this id is another figure's too"),
        (figure.kind not in KINDS, f"kind {figure.kind!r}: choose one of {', '.join(KINDS)}"),
        (figure.unit not in UNITS and bool(figure.read), f"unit {figure.unit!r}: choose one of {list(UNITS)}"),
        (len(figure.read) != len(figure.value), "expected as many numbers in `value` as there are keys in `read`"),
        (not figure.read and not figure.shown, "nothing is read, so `shown` has to say what the page shows"),
        (figure.quick and not figure.remade, "a quick figure needs `read`, or a test as its command"),
        (figure.tolerance not in recorded.tolerances, f"no tolerance has the name {figure.tolerance!r}"),
        (figure.machine not in ("", *recorded.machines), f"no machine has the name {figure.machine!r}"),
    ):
        if wrong:
            raise UserError(f"{where}: {says}")


def save(file: Path, recorded: Recorded) -> None:
    """Write the file whole or not at all, with its first comment."""
    old = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [line for line in old.partition("\n\n")[0].splitlines() if line.startswith("#")]
    lines += ["", "[machines]", *(f"{key} = {_toml(text)}" for key, text in recorded.machines.items())]
    for name, tolerance in recorded.tolerances.items():
        lines += ["", f"[tolerances.{name}]", *_table(tolerance)]
    for figure in recorded.figures:
        lines += ["", "[[figure]]", *_table(figure)]
    with written(file) as stream:
        stream.write(("\n".join(lines).lstrip("\n") + "\n").encode())


def _table(one: Any) -> list[str]:
    """Lines of TOML for a dataclass, without values that equal their default."""
    return [
        f"{field.name} = {_toml(getattr(one, field.name))}"
        for field in fields(one)
        if getattr(one, field.name) != field.default
    ]


def _toml(value: Any) -> str:
    # A JSON string, number, truth value or list of these is one of TOML too.
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


HEAD = """# Figures and their commands

Every figure of these pages, with the command that makes it, the version of psmpi that made it, and the day. The page
is generated from `psmpi/bench/figures.toml`.

```bash
psmpi bench figures --data-dir ~/data                 # make the quick ones again; exit status 1 if one has moved
psmpi bench figures --page results.md --all           # all accuracies of a page, slow ones too
psmpi bench figures --only digits --record            # write the new value, version and day into the file
psmpi bench figures --write docs/figures.md           # write this page
```

Figures whose data set is not in `--data-dir` are left out with a line. `quick` marks what the first command makes
again. Times depend on the machine: `--times` compares those that a program can read. Figures of version 0.1 are older
than this list; their day is the one that the page gave, or the one on which the page got the figure. `~/data` is the
folder of data sets. Seconds are processor seconds of all processes, their start included.

A figure has moved if it differs from the recorded value by more than its tolerance. A person compares figures without a
tolerance.

Other processors and libraries sum in another order, and rounding grows over the epochs. On one machine (m1, 2026-12-01)
`OPENBLAS_CORETYPE=Haswell`, `Sandybridge` and `Nehalem` end `digits-rmsprop` at 97.21, 97.77 and 97.49 %, and
`digits-lbfgs` at 94.15, 95.82 and 93.04 %. So a figure that moves on another machine need not be an error in psmpi.
"""


def page(recorded: Recorded) -> str:
    """The Markdown page of all figures, by page and in the order of the file."""
    lines = [HEAD]
    lines += ["| tolerance | difference | why |", "|---|---|---|"]
    for name, one in recorded.tolerances.items():
        if name == "none":
            continue
        lines.append(f"| {name} | {_width(one)} | {one.why} |")
    if recorded.machines:
        lines += ["", "Machines:", ""]
        lines += [f"- {name}: {text}" for name, text in recorded.machines.items()]
    for name in dict.fromkeys(figure.page for figure in recorded.figures):
        title = name.removesuffix(".md")
        # README.md lies above docs/, where the site has no page.
        lines += ["", f"## {title}" if name == "README.md" else f"## [{title}]({name})", ""]
        lines += ["| id | figure | value | tolerance | made by | command |", "|---|---|---|---|---|---|"]
        lines += [_row(figure) for figure in recorded.figures if figure.page == name]
    return "\n".join(lines) + "\n"


def _width(tolerance: Tolerance) -> str:
    parts = [f"{tolerance.within:g}"] if tolerance.within or not tolerance.share else []
    return " and ".join([*parts, *([f"{100 * tolerance.share:g} % of the value"] if tolerance.share else [])])


def _row(figure: Figure) -> str:
    marks = [figure.version, figure.date, *(["quick"] if figure.quick else [])]
    marks += [f"{figure.seconds:.3g} s"] if figure.seconds else []
    marks += [figure.machine] if figure.machine else []
    unit = f" {figure.unit}" if figure.unit and figure.read else ""
    command = figure.command.replace("{data}", "~/data").replace("|", "\\|")
    value, tolerance = figure.text + unit, figure.tolerance if figure.remade else ""
    return f"| `{figure.id}` | {figure.what} | {value} | {tolerance} | {', '.join(marks)} | `{command}` |"
