"""Layouts as plain data of a checkpoint, and checks of plain data from a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import isfinite
from typing import Any

from psmpi.layout import Block, Classes, Each, Layout, Parameter, Piece, Users
from psmpi.layout.classes import as_users

# Whole numbers below this are exact in float64, and products with item sizes fit 64 bits.
MOST = 2**53


def describe_layout(layout: Layout) -> dict[str, Any]:
    """A layout as plain data; a piece is [number of the parameter, first unit, stop unit, offset in flat vector]."""
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


def layout_of(table: Mapping[str, Any]) -> Layout:
    """The inverse of `describe_layout`. Missing or wrong entries raise an exception, such as ValueError or KeyError."""
    parameters = tuple(
        Parameter(_name(p["name"]), sizes(p["shape"]), whole(p["units"], "units")) for p in table["parameters"]
    )
    for p in parameters:
        # The number of units is the product of some leading axes.
        expect(p.units in accumulate(p.shape, lambda a, b: a * b), f"layout, {p.name}")
    expect(len({p.name for p in parameters}) == len(parameters), "layout, parameters")
    classes, at, units, bands = whole(table["classes"], "classes"), 0, [0] * len(parameters), []
    for b in table["blocks"]:
        start, stop = whole(b["start"], "blocks"), whole(b["stop"], "blocks")
        expect(start == at < stop, "layout, blocks")
        users = _users(b["classes"], b.get("each", False), classes)
        count = users.count if isinstance(users, Each) else 1
        step, remainder = divmod(stop - at, count)
        expect(remainder == 0, "layout, blocks")
        pieces = []
        for piece in b["pieces"]:
            k, first, last, offset = (whole(number, "pieces") for number in piece)
            expect(k < len(parameters) and first < last and (last - first) % count == 0, "layout, pieces")
            expect(offset == at, "layout, pieces")
            pieces.append(Piece(k, first, last, offset, count, step if count > 1 else 0))
            units[k] += last - first
            at += (last - first) // count * parameters[k].unit_size
        expect(start + step == at, "layout, blocks")
        at = stop
        bands.append(Block(users, start, stop, tuple(pieces)))
    expect(units == [p.units for p in parameters], "layout, pieces")
    layout = Layout(parameters, tuple(bands), classes)
    for pieces_of in layout.banded:
        # Each unit has to be in exactly one piece.
        expect(all(a.last == b.first for a, b in pairwise(pieces_of)), "layout, pieces")
    expect(classes > 0, "layout, classes")
    return layout


def _users(table: Sequence[Any], each: bool, classes: int) -> Users:
    """The users of a block from its table of ranges of classes; files of version 1 have a list of classes instead."""
    expect(isinstance(table, list) and isinstance(each, bool), "layout, classes")
    if table and isinstance(table[0], int):
        expect(all(whole(c, "classes") < classes for c in table), "layout, classes")
        return as_users(table)
    some = Classes(tuple((whole(first, "classes"), whole(last, "classes")) for first, last in table))
    ends = [-1, *(end for ends in some.ranges for end in ends), classes + 1]
    expect(all(a < b for a, b in pairwise(ends)), "layout, classes")
    expect(not each or len(some.ranges) == 1, "layout, classes")
    return Each(*some.ranges[0]) if each else as_users(some)


def _name(text: Any) -> str:
    """Return the name of a tensor; ValueError unless it can be the name of an HDF5 data set."""
    parts = text.split("/") if isinstance(text, str) else [""]
    expect(text.isprintable() and all(part not in ("", ".") for part in parts), "layout, names")
    return str(text)


def table_of(text: str) -> dict[str, Any]:
    """Parse a JSON object; ValueError for other JSON, and for numbers that are infinite or NaN."""
    table = read_json(text)
    expect(isinstance(table, dict), text[:40])
    return dict(table)


def read_json(text: str) -> Any:
    """Parse strict JSON; ValueError for Infinity and NaN, which Python would accept."""
    return json.loads(text, parse_constant=_no_number)


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def sizes(numbers: Any) -> tuple[int, ...]:
    """Return a list of whole numbers from 1 up as a tuple; ValueError for other values."""
    expect(isinstance(numbers, list) and all(whole(n, "sizes") > 0 for n in numbers), f"sizes {numbers}"[:80])
    return tuple(numbers)


def whole(number: Any, what: str) -> int:
    """Return a whole number in 0..MOST-1; ValueError, which names `what`, for another value."""
    expect(type(number) is int and 0 <= number < MOST, f"{what}: {number!r}"[:80])
    return int(number)


def finite(number: Any, what: str) -> float | int:
    """Return a finite number below 1e300; ValueError, which names `what`, for another value."""
    expect(type(number) in (int, float) and abs(number) < 1e300 and isfinite(number), f"{what}: {number!r}"[:80])
    return float(number) if isinstance(number, float) else int(number)


def expect(true: bool, what: str) -> None:
    """Raise ValueError(what) unless the condition is true."""
    if not true:
        raise ValueError(what)
