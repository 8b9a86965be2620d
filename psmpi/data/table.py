"""Data sets in tables of comma-separated values: a sample a line, its features in columns, and one of its label."""

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
# Columns of labels where no other is named, in small letters, the likeliest first.
USUAL = ("label", "class", "target", "y")


def is_table(name: str) -> bool:
    """Whether a data set is a table, by its name: own.csv, own.csv.gz, ..."""
    return _NAME.fullmatch(Path(name).name) is not None


def read_table(
    path: Path, label: str = "", features: int = 0, whole: bool = False, known: tuple[str, ...] = ()
) -> tuple[list[str], dict[str, Header]]:
    """The arrays x and y of a table, and x_test and y_test of the one beside it, own_test.csv, if there is one.

    A first line with text where the second has numbers, or in all fields, has the names of columns. label: the column
    of labels, by its name or its number from 1 on; "": one called label, class, target or y, else the last. Labels that
    are text, or integers, are classes; with a decimal point in one of them all are values. Features are float32.
    features: of a network that has been trained, 0 for none: of so many columns none has labels. whole: leave the table
    beside it out. known: the names of the network's features, which come in their order wherever the table has them; a
    table without names has them by position.

    UserError for a feature that is missing, for columns that are neither features nor the label, for the first line
    that is no sample, see psmpi.data.tabletext, and for a table without samples.
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
    """The form of a table, and whether its first line has the names of columns."""
    text = b""
    for _, block in records(path):
        text += block
        if _behind(text, 2) < len(text):
            break
    delimiter, found = delimiter_of(text), []
    for _, fields in fields_of(text[: _behind(text, 2)], delimiter, str(path), 1):
        if any(fields):
            found.append(fields)
    if not found:
        raise UserError(f"{path}: there is no sample in the file: write one a line, its features and its label")
    first = found[0]
    named = (label in first and not label.isdigit() and label != "") or _is_header(
        first, found[1] if len(found) > 1 else []
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


def _behind(text: bytes, count: int) -> int:
    """The offset behind the first records of a block, of which `count` are not blank."""
    end = len(text) - len(text.lstrip(b"\n"))
    for _ in range(count):
        end = text.find(b"\n", end) + 1 or len(text)
        while end < len(text) and text.count(b'"', 0, end) % 2:
            end = text.find(b"\n", end) + 1 or len(text)
    return end


def _is_number(field: str) -> bool:
    return NUMBER.fullmatch(field.encode()) is not None


def _is_header(first: list[str], second: list[str]) -> bool:
    """Whether a first line has names: text where the second has numbers, or nothing but text, or a usual label's."""
    if any(field.lower() in USUAL for field in first) or not any(map(_is_number, first)):
        return True
    return any(not _is_number(one) and _is_number(two) for one, two in zip(first, second, strict=False) if one)


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
    """The column of labels, from 0, or -1 for none."""
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
    """The column of labels, from 0, or -1 for none, of a table that has the features of a network by their names."""
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
    """The arrays of a table, `end` behind their names."""
    try:
        values, labels = _read(path, form, named)
    except TextualError:
        values, labels = _read(path, form._replace(textual=True), named)
    columns = tuple(name for k, name in enumerate(form.columns) if k != form.label) if any(form.columns) else ()
    if columns and known and columns != known:
        values, columns = np.ascontiguousarray(values[:, [columns.index(name) for name in known]]), known
    # Read-only, as what is read of files.
    values.flags.writeable = labels.flags.writeable = False
    headers = {f"x{end}": Header(values.shape, values.dtype, lambda: ArrayRows(values), lambda: values, columns)}
    if form.label >= 0:
        headers[f"y{end}"] = Header(labels.shape, labels.dtype, lambda: ArrayRows(labels[:, None]), lambda: labels)
    return headers


def _read(path: Path, form: Form, named: bool) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The values (n, features) float32 and labels (n,), int64, float64 or bytes; TextualError for unexpected text."""
    values, labels, real, skip = Growing(np.float32), [], False, named
    for line, block in records(path):
        text, first = block, line
        if skip:
            end = _behind(block, 1)
            text, first = block[end:], line + block.count(b"\n", 0, end)
            skip = not block.strip(b"\n")
        found = fast(text, form)
        if (
            found is None
            and not form.textual
            and form.label >= 0
            and fast(text, form._replace(textual=True)) is not None
        ):
            raise TextualError
        found = by_record(text, form, str(path), first) if found is None else found
        values.add(found.values.reshape(-1))
        labels.append(found.labels)
        real = real or found.real
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
