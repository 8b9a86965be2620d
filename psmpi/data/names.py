"""Names of classes: strings, truth values, and integers other than 0..C-1 as labels, numbered in sorted order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.data.arrays import Header, is_text
from psmpi.data.labels import MAX_CLASSES
from psmpi.errors import UserError, counted

# Most classes that can have names, and most characters of a name.
MOST, LONGEST = 1 << 16, 100
# From this many different integers on, gaps between them are classes without samples.
MANY = 100
TRUTH = ("False", "True")
# Names of classes: None: take them from the data; (): no names, labels are numbers; else those of a trained network.
Names = tuple[str, ...] | None


def with_numbers(
    path: Path, headers: dict[str, Header], given: Names = None
) -> tuple[dict[str, Header], tuple[str, ...]]:
    """Replace the labels y and y_test by numbers of classes; return the headers and the names, () for labels 0..C-1.

    Labels are strings, truth values or integers (n,); other targets stay as they are. Names are the distinct labels of
    both arrays, sorted; integers get names unless they are 0..C-1, or so many that some classes may have no samples.
    given: names that number the labels; (): labels are integers and stay.

    UserError for strings that cannot be names, for too many of them, for labels of two kinds, and for a label that is
    not in `given`.
    """
    named = {key: labels for key, labels in headers.items() if key in ("y", "y_test") and _is_named(labels)}
    if not named:
        return headers, ()
    values = {key: _plain(f"{path}, {key}", key, header) for key, header in named.items()}
    kinds = {_kind(labels) for labels in values.values()}
    if len(kinds) > 1:
        raise UserError(f"{path}: y has {_kind(values['y'])} and y_test {_kind(values['y_test'])}: save the same kind")
    whole = np.concatenate([*values.values()])
    distinct, codes = np.unique(whole, return_inverse=True)
    if given is None:
        names = _names_of(path, distinct)
    elif given or _kind(whole) != "strings":
        names = given
    else:
        raise UserError(
            f"{path}: the labels are strings, as {str(distinct[0])!r}, and the network knows numbers of classes alone:"
            " save these as y"
        )
    if not names:
        return _replaced(headers, named, {key: labels.astype(np.int64) for key, labels in values.items()}), ()
    numbers = _looked_up(path, distinct, names)
    ends = np.cumsum([len(labels) for labels in values.values()])[:-1]
    parts = np.split(numbers[codes.reshape(-1)], ends)
    return _replaced(headers, named, dict(zip(values, parts, strict=True))), names


def check_names(names: Sequence[Any]) -> tuple[str, ...]:
    """Return the names as a tuple; ValueError unless they are distinct printable strings, at most MOST, each short."""
    if not 0 < len(names) <= MOST or len(set(names)) < len(names):
        raise ValueError("too many names, or one of them twice")
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST or not name.isprintable():
            raise ValueError(f"a name that is none: {str(name)[:LONGEST]!r}")
    return tuple(names)


def listed(names: Sequence[str], most: int = 5) -> str:
    """Text that lists names, such as "a, b, c and 20 more"; most: names that are listed."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _is_named(header: Header) -> bool:
    return len(header.shape) == 1 and 0 not in header.shape and (header.dtype.kind in "biuSU" or is_text(header.dtype))


def _kind(values: npt.NDArray[Any]) -> str:
    return {"b": "truth values", "i": "integers", "u": "integers"}.get(values.dtype.kind, "strings")


def _plain(where: str, key: str, header: Header) -> npt.NDArray[Any]:
    """Read labels as an array of int64, bool or str; UserError for other labels."""
    values = header.values()
    if values.dtype.kind == "b":
        return values
    if values.dtype.kind in "iu":
        if values.max() >= 1 << 63:
            raise UserError(f"{where}: found the label {values.max()}; expected integers below 2^63")
        return values.astype(np.int64)
    # In an array of fixed width a single long string would make all of them take its memory.
    longest = max(map(len, values.tolist())) if values.dtype.hasobject else values.dtype.itemsize
    if longest > 4 * LONGEST * (4 if values.dtype.kind == "U" else 1):
        raise UserError(f"{where}: labels of {longest:,} bytes; expected names of {LONGEST} characters at most")
    if values.dtype.kind != "U":
        values = np.array([_decoded(where, key, label) for label in values.tolist()])
    return values


def _decoded(where: str, key: str, text: bytes | str) -> str:
    try:
        return text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError:
        raise UserError(f"{where}: the label {text!r} is not UTF-8: save np.char.decode({key}, 'latin-1')") from None


def _names_of(path: Path, distinct: npt.NDArray[Any]) -> tuple[str, ...]:
    """Names of distinct labels; () for integers that are numbers of classes."""
    if distinct.dtype.kind == "b":
        return TRUTH
    if distinct.dtype.kind == "i" and _are_numbers(distinct):
        return ()
    if len(distinct) > MOST:
        raise UserError(
            f"{path}: {counted(len(distinct), 'different label')}, of which there can be {MOST:,}: are they classes? "
            "For a regression save floating point numbers"
        )
    names = tuple(map(str, distinct))
    try:
        return check_names(names)
    except ValueError:
        bad = next(name for name in names if not 0 < len(name) <= LONGEST or not name.isprintable())
        fault = f"the label {bad[:40]!r}" if bad else "an empty label"
        raise UserError(
            f"{path}: {fault}; expected names of 1 to {LONGEST} printable characters: name the class so, or take such "
            "samples out"
        ) from None


def _are_numbers(distinct: npt.NDArray[np.int64]) -> bool:
    """Whether sorted distinct integers are numbers of classes: 0..C-1, or many, with gaps for unused classes."""
    low, high, count = int(distinct[0]), int(distinct[-1]), len(distinct)
    gaps = high - low >= count
    return count > MOST or (low == 0 and not gaps) or (count >= MANY and gaps and low >= 0 and high < MAX_CLASSES)


def _looked_up(path: Path, distinct: npt.NDArray[Any], names: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Numbers of the distinct labels among the names of a network; UserError for a label without such a name."""
    places = {name: k for k, name in enumerate(names)}
    unknown = [label for label in map(str, distinct) if label not in places]
    if unknown:
        raise UserError(
            f"{path}: found the label {unknown[0][:LONGEST]!r}, and the network was trained on the classes "
            f"{listed(names)}: give samples of these, or take the labels out and add --split all"
        )
    return np.array([places[str(label)] for label in distinct], np.int64)


def _replaced(
    headers: dict[str, Header], named: dict[str, Header], numbers: dict[str, npt.NDArray[np.int64]]
) -> dict[str, Header]:
    replaced = {
        key: replace(header, dtype=np.dtype(np.int64), values=lambda labels=numbers[key]: labels)  # type: ignore[misc]
        for key, header in named.items()
    }
    return headers | replaced
