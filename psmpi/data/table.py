"""Data sets in tables of comma-separated values: one sample in a line, with columns of features and one of labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.arrays import Header
from psmpi.data.rows import ArrayRows
from psmpi.data.svmtext import NUMBER, WHOLE, Growing
from psmpi.data.tabletext import Form, TextualError, by_record, delimiter_of, fast, fields_of, records
from psmpi.errors import UserError, counted, nearest

_NAME = re.compile(r"(.+)(\.csv|\.tsv)((?:\.gz|\.bz2|\.xz)?)", re.IGNORECASE)
# Usual names of the column of labels, in lower case, the likeliest first.
USUAL = ("label", "class", "target", "y")


def is_table(name: str) -> bool:
    """Whether a name is that of a table, such as own.csv and own.csv.gz."""
    return _NAME.fullmatch(Path(name).name) is not None


def read_table(
    path: Path, label: str = "", features: int = 0, whole: bool = False, known: tuple[str, ...] = ()
) -> tuple[list[str], dict[str, Header]]:
    """Read a table: names and headers of x and y, and of x_test and y_test if there is a table own_test.csv beside it.

    A first line that is all text, or has text where the second has numbers, gives the names of columns. label: column
    of labels, by its name or its number from 1; "": a column called label, class, target or y, else the last one.
    Labels that are text or integers are classes; if one of them has a decimal point, all are values. Features are
    float32. features: number of features of a trained network; a table with that many columns has no labels; 0: no
    network. whole: leave out the table own_test.csv. known: names of the network's features, which give the order of
    the columns; a table without names has its features by position.

    UserError for a missing feature, for columns that are neither features nor the label, for the first line that is
    not a sample, see psmpi.data.tabletext, and for a table without samples.
    """
    form, first = _form(path, label, features, known)
    headers = _arrays(path, "", form, first, known)
    match = _NAME.fullmatch(path.name)
    assert match is not None
    beside = path.with_name(f"{match[1]}_test{match[2]}{match[3]}")
    if beside.is_file() and not whole:
        other, first = _form(beside, label, features, known)
        if other.columns != form.columns and len(other.columns) != len(form.columns):
            raise UserError(
                f"{beside} has {counted(len(other.columns), 'column')}, {path.name} {len(form.columns)}: write "
                "both alike"
            )
        if any(other.columns) and any(form.columns) and other.columns != form.columns:
            differ = next(k for k, (a, b) in enumerate(zip(form.columns, other.columns, strict=True)) if a != b)
            raise UserError(f"{beside}: {other.place(differ)}, in {path.name} {form.place(differ)}: write both alike")
        headers |= _arrays(beside, "_test", other, first, known)
    return list(headers), headers


def _form(path: Path, label: str, features: int, known: tuple[str, ...]) -> tuple[Form, bool]:
    """The form of a table, and whether its first line gives the names of columns."""
    text = b""
    for _, block in records(path):
        text += block
        if _end_of(text, 2) < len(text):
            break
    delimiter, rows = delimiter_of(text), []
    for _, fields in fields_of(text[: _end_of(text, 2)], delimiter, str(path), 1):
        if any(fields):
            rows.append(fields)
    if not rows:
        raise UserError(f"{path}: there is no sample in the file: write one a line, its features and its label")
    first = rows[0]
    named = (label in first and not label.isdigit() and label != "") or _is_header(
        first, rows[1] if len(rows) > 1 else []
    )
    columns = tuple(first) if named else ("",) * len(first)
    if named:
        _check_columns(path, columns)
    at = (
        _beside_known(path, columns, label, known) if named and known else _label_column(path, columns, label, features)
    )
    if len(columns) - (at >= 0) < 1:
        raise UserError(
            f"{path}: {counted(len(columns), 'column')}; expected features and a label, with commas between"
        )
    return Form(delimiter, columns, at), named


def _end_of(text: bytes, count: int) -> int:
    """Offset after the first `count` records of a block that are not blank."""
    end = len(text) - len(text.lstrip(b"\n"))
    for _ in range(count):
        end = text.find(b"\n", end) + 1 or len(text)
        while end < len(text) and text.count(b'"', 0, end) % 2:
            end = text.find(b"\n", end) + 1 or len(text)
    return end


def _is_number(field: str) -> bool:
    return NUMBER.fullmatch(field.encode()) is not None


def _is_header(first: list[str], second: list[str]) -> bool:
    """Whether a first line gives names: it has a usual name of labels, only text, or text above a number."""
    if any(field.lower() in USUAL for field in first) or not any(map(_is_number, first)):
        return True
    return any(not _is_number(name) and _is_number(below) for name, below in zip(first, second, strict=False) if name)


def _check_columns(path: Path, columns: tuple[str, ...]) -> None:
    for k, name in enumerate(columns):
        if not name:
            raise UserError(
                f"{path}: column {k + 1} has no name in the first line: if it numbers the rows, save the table without "
                "it (pandas: to_csv(NAME, index=False)), else name it"
            )
        if columns.index(name) < k:
            raise UserError(
                f"{path}: the columns {columns.index(name) + 1} and {k + 1} are both called {name!r}: rename one"
            )


def _label_column(path: Path, columns: tuple[str, ...], label: str, features: int) -> int:
    """Number of the column of labels, from 0; -1: none."""
    if label and label in columns:
        return columns.index(label)
    if features and len(columns) == features:
        return -1
    if label:
        if re.fullmatch(r"[1-9]\d{0,8}", label) and int(label) <= len(columns):
            return int(label) - 1
        has = f"columns {_few(columns)}" if any(columns) else "no names"
        near = nearest(label, columns)
        meant = f"did you mean {near}? Give" if near else "give"
        raise UserError(
            f"--label {label}: {path} has {counted(len(columns), 'column')} ({has}): {meant} the name of "
            "one, or its number from 1"
        )
    small = [name.lower() for name in columns]
    return next((small.index(name) for name in USUAL if name in small), len(columns) - 1)


def _beside_known(path: Path, columns: tuple[str, ...], label: str, known: tuple[str, ...]) -> int:
    """Number of the column of labels, from 0, beside the features `known` of a network; -1: none."""
    missing = [name for name in known if name not in columns]
    others = [name for name in columns if name not in known]
    if missing or (len(others) > 1 and label not in others):
        fault = (
            f"no column {missing[0]!r}" if missing else f"found {counted(len(others), 'column')} more, {_few(others)}"
        )
        raise UserError(
            f"{path}: {fault}; the network was trained on {_few(known)}, and the table has {_few(columns)}: name the "
            "columns as there, and leave out what is neither one of them nor the label"
        )
    if len(others) > 1:
        extra = next(name for name in others if name != label)
        raise UserError(f"{path}: the column {extra!r} is no feature of the network, {_few(known)}: leave it out")
    return columns.index(others[0]) if others else -1


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"


def _arrays(path: Path, end: str, form: Form, named: bool, known: tuple[str, ...]) -> dict[str, Header]:
    """Headers of the arrays of a table, named x and y with the suffix `end`."""
    try:
        values, labels = _read(path, form, named)
    except TextualError:
        values, labels = _read(path, form._replace(textual=True), named)
    columns = tuple(name for k, name in enumerate(form.columns) if k != form.label) if any(form.columns) else ()
    if columns and known and columns != known:
        values, columns = np.ascontiguousarray(values[:, [columns.index(name) for name in known]]), known
    # Read-only, as all arrays from files.
    values.flags.writeable = labels.flags.writeable = False
    headers = {f"x{end}": Header(values.shape, values.dtype, lambda: ArrayRows(values), lambda: values, columns)}
    if form.label >= 0:
        headers[f"y{end}"] = Header(labels.shape, labels.dtype, lambda: ArrayRows(labels[:, None]), lambda: labels)
    return headers


def _read(path: Path, form: Form, named: bool) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Read values (n, features) float32 and labels (n,) int64, float64 or bytes; TextualError for unexpected text.

    named: whether the first line gives the names of columns.
    """
    values, labels, real, skip = Growing(np.float32), [], False, named
    for line, block in records(path):
        text, first = block, line
        if skip:
            end = _end_of(block, 1)
            text, first = block[end:], line + block.count(b"\n", 0, end)
            skip = not block.strip(b"\n")
        samples = fast(text, form)
        if (
            samples is None
            and not form.textual
            and form.label >= 0
            and fast(text, form._replace(textual=True)) is not None
        ):
            raise TextualError
        samples = by_record(text, form, str(path), first) if samples is None else samples
        values.add(samples.values.reshape(-1))
        labels.append(samples.labels)
        real = real or samples.real
    targets: npt.NDArray[Any] = np.concatenate(labels)
    if not len(targets):
        raise UserError(f"{path}: there is no sample in the file but the names of columns: write one a line")
    if not form.textual and not real and form.label >= 0:
        if np.abs(targets).max() > WHOLE:
            raise UserError(
                f"{path}: found the label {targets[np.abs(targets).argmax()]:.0f}; expected integers below 2^53"
            )
        targets = targets.astype(np.int64)
    return values.array().reshape(len(targets), -1), targets
