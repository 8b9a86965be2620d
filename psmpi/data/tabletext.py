"""The text of a table: records of fields, separated by commas, semicolons or tabs, quoted as in Python's csv.

Array operations parse a block of records at once. If the block is not in order, its records are parsed one by one,
which handles quotes, and the error names the first record that is not a sample.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from psmpi.data.files import check_unpacked, described, reading
from psmpi.data.svmtext import (
    BLOCK,
    COLON,
    EXPONENT,
    INTEGER,
    KINDS,
    LARGEST,
    NEWLINE,
    NUMBER,
    OTHER,
    PACKED,
    POINT,
    SIGN,
    SPACE,
    are_numbers,
    shown,
)
from psmpi.errors import UserError

DELIMITERS = ",;\t"
# Most bytes of a record; a quoted field that is not closed makes a longer one.
LONG = 16 << 20
# Fields that stand for a missing value, in lower case; most bytes of a label.
MISSING = ("", "na", "n/a", "nan", "null", "?")
LABEL_BYTES = 400
TRUTH = {b"true": b"1   ", b"false": b"0    "}


class Form(NamedTuple):
    """Form of a table's records. delimiter: between fields. columns: names of the fields, "" for fields without a name.

    label: number of the field with the label, -1: none. textual: whether labels are text, not numbers.
    """

    delimiter: str
    columns: tuple[str, ...]
    label: int
    textual: bool = False

    def place(self, k: int) -> str:
        """Text that names column `k` (from 0) in messages, such as "column 3 (width)"."""
        name = self.columns[k]
        return f"column {k + 1}" + (f" ({name})" if name else "")


class Samples(NamedTuple):
    """Samples of some records: values (n, features) float32, labels (n,) float64 or bytes.

    real: whether a label is not written as an integer.
    """

    values: npt.NDArray[np.float32]
    labels: npt.NDArray[Any]
    real: bool


def records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield blocks of whole records: number of the first line, from 1, and bytes that end with a newline.

    Newlines of Windows become \\n, and a byte-order mark is left out. UserError for a compressed or binary file, and
    for a record that is too long.
    """
    packed, unpacked, line, rest = path.stat().st_size, 0, 1, b""
    with reading(path), cast(BinaryIO, PACKED.get(path.suffix.lower(), partial(open, mode="rb"))(path)) as stream:
        while True:
            data = stream.read(BLOCK)
            if b"\0" in data or (not unpacked and data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))):
                kind = described(path)
                raise UserError(f"{path}: {kind}, and no table in UTF-8: save it as CSV, UTF-8, or unpack it")
            if not unpacked:
                data = data.removeprefix(b"\xef\xbb\xbf")
            unpacked += len(data)
            check_unpacked(str(path), packed, unpacked, "unpack it first")
            text = (rest + data).replace(b"\r\n", b"\n")
            end = _end(text) if data else len(text)
            if not data and text and not text.endswith(b"\n"):
                text, end = text.rstrip(b"\r") + b"\n", len(text) + 1
            if len(text) - end > LONG:
                raise UserError(
                    f"{path}, line {line}: a record of more than {LONG >> 20} MB: is a quoted field not closed?"
                )
            block, rest = text[:end], text[end:]
            if block:
                yield line, block
                line += block.count(b"\n")
            if not data:
                return


def _end(text: bytes) -> int:
    """Offset after the last whole record, which ends with a newline outside of quotes."""
    if b'"' not in text:
        return text.rfind(b"\n") + 1
    letters = np.frombuffer(text, np.uint8)
    newlines = np.flatnonzero(letters == ord("\n"))
    outside = newlines[np.searchsorted(np.flatnonzero(letters == ord('"')), newlines) % 2 == 0]
    return int(outside[-1]) + 1 if len(outside) else 0


def fields_of(text: bytes, delimiter: str, name: str, first: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number of each record of a block and its fields, stripped of spaces.

    name: of the file; first: number of the block's first line. UserError for bytes that are not UTF-8 and for fields
    that are too long.
    """
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        line = first + text.count(b"\n", 0, error.start)
        raise UserError(
            f"{name}, line {line}: the byte {text[error.start]:#04x} is not UTF-8: save the table as UTF-8, or by the "
            "encoding that it has iconv -f LATIN1 -t UTF-8 OLD > NEW"
        ) from None
    reader, line = csv.reader(io.StringIO(decoded, newline=""), delimiter=delimiter, skipinitialspace=True), first
    try:
        for record in reader:
            yield line, [field.strip() for field in record]
            line = first + reader.line_num
    except csv.Error as error:
        raise UserError(f"{name}, line {line}: {error}: is a quoted field not closed?") from None


def delimiter_of(text: bytes) -> str:
    """The delimiter of a table: the most frequent one in its first line outside of quotes; a comma if there is none."""
    first = re.sub(rb'"[^"]*"', b"", text.lstrip(b"\n").partition(b"\n")[0]).decode(errors="replace")
    return max(DELIMITERS, key=first.count)


def fast(text: bytes, form: Form) -> Samples | None:
    """Parse a block of records by array operations; None if a record is not in order or needs its quotes."""
    room = np.frombuffer(bytearray(text), np.uint8)
    if b'"' in text:
        room = _unquoted(room, form.delimiter)
    table = KINDS.copy()
    table[ord(":")], table[ord(form.delimiter)] = OTHER, COLON
    kinds, columns = table[room], len(form.columns)
    ends = np.flatnonzero((kinds == NEWLINE) | (kinds == COLON))
    rows = len(ends) // columns
    if not rows or len(ends) % columns or np.count_nonzero(kinds == NEWLINE) != rows:
        return None
    edges = np.stack([np.concatenate([[0], ends[:-1] + 1]), ends]).reshape(2, rows, columns)
    if not (kinds[edges[1, :, -1]] == NEWLINE).all():
        return None
    labels: npt.NDArray[Any] = np.zeros(rows)
    decimal = False
    if form.textual:
        texts = _blanked(room, kinds, *edges[:, :, form.label])
        if texts is None:
            return None
        labels = texts
        edges = np.delete(edges, form.label, axis=2)
    elif form.label >= 0:
        places = edges[:, :, form.label]
        if _among(kinds == OTHER, places):
            return None
        decimal = _among((kinds == POINT) | (kinds == EXPONENT), places)
    numbers = _numbers(room, kinds, table, edges.reshape(2, -1), form.delimiter)
    if numbers is None:
        return None
    values = numbers.reshape(rows, -1)
    if form.label >= 0 and not form.textual:
        labels = values[:, form.label].copy()
        values = np.delete(values, form.label, axis=1)
    if np.abs(values).max(initial=0) > LARGEST:
        return None
    return Samples(values.astype(np.float32), labels, decimal)


def _among(marked: npt.NDArray[np.bool_], edges: npt.NDArray[np.int64]) -> bool:
    """Whether a marked byte is inside a field [edges[0], edges[1])."""
    before = np.searchsorted(np.flatnonzero(marked), edges)
    return bool((before[0] != before[1]).any())


def _unquoted(room: npt.NDArray[np.uint8], delimiter: str) -> npt.NDArray[np.uint8]:
    """Remove quotes from a block if each pair encloses a whole field without a delimiter; else return the block."""
    quotes = np.flatnonzero(room == ord('"'))
    if len(quotes) % 2:
        return room
    edges = np.flatnonzero((room == ord(delimiter)) | (room == ord("\n")))
    field = np.searchsorted(edges, quotes)
    # Each pair has to be the only one in its field, at both ends of the field.
    starts, ends = np.concatenate([[0], edges + 1])[field], edges[field]
    pairs = (field[0::2] == field[1::2]).all() and len(np.unique(field[0::2])) == len(quotes) // 2
    if pairs and (quotes[0::2] == starts[0::2]).all() and (quotes[1::2] == ends[1::2] - 1).all():
        return np.delete(room, quotes)
    return room


def _blanked(
    room: npt.NDArray[np.uint8],
    kinds: npt.NDArray[np.uint8],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
) -> npt.NDArray[Any] | None:
    """Return the fields [starts, ends) as (n,) bytes and set them to spaces in `room` and `kinds`.

    None if a field is empty, long, quoted or a missing value, which `by_record` handles.
    """
    width = int((ends - starts).max(initial=1))
    if width > LABEL_BYTES or (ends == starts).any():
        return None
    inside = np.arange(width) < (ends - starts)[:, None]
    at = np.minimum(starts[:, None] + np.arange(width), len(room) - 1)
    letters = np.where(inside, room[at], 0).astype(np.uint8)
    labels = letters.view(f"S{width}").reshape(-1)
    if (inside & (kinds[at] == SPACE)).any():
        labels = np.char.strip(labels)
    if (letters == ord('"')).any() or np.isin(np.char.lower(labels), np.array(MISSING, "S")).any():
        return None
    room[at[inside]], kinds[at[inside]] = ord(" "), SPACE
    return labels


def _numbers(
    room: npt.NDArray[np.uint8],
    kinds: npt.NDArray[np.uint8],
    table: npt.NDArray[np.uint8],
    edges: npt.NDArray[np.int64],
    delimiter: str,
) -> npt.NDArray[np.float64] | None:
    """Numbers (fields,) of the fields [edges[0], edges[1]), one in each; None if a field has other contents."""
    if (kinds == OTHER).any():
        text = _truths(room.tobytes(), re.escape(delimiter.encode()))
        room = np.frombuffer(text, np.uint8)
        kinds = table[room]
        if (kinds == OTHER).any():
            return None
    blank = np.concatenate([[True], kinds <= COLON])
    words = np.flatnonzero(blank[:-1] & ~blank[1:])
    # Each field has to contain one word.
    if len(words) != edges.shape[1] or (words < edges[0]).any() or (words >= edges[1]).any():
        return None
    special = np.flatnonzero(kinds >= SIGN)
    of = np.searchsorted(words, special, "right") - 1
    if not are_numbers(kinds, special, of, words, np.zeros(len(words), np.bool_)):
        return None
    text = room.tobytes().translate(bytes.maketrans(delimiter.encode(), b" "))
    numbers = np.fromstring(text, sep=" ", count=len(words))
    return numbers if len(numbers) == len(words) and (np.abs(numbers) < np.inf).all() else None


def _truths(text: bytes, delimiter: bytes) -> bytes:
    """Replace fields that are truth values by 1 and 0, padded with spaces to the same length."""
    pattern = rb"(?i)(?<![^%b\n ])(true|false)(?=[%b\n ])" % (delimiter, delimiter)
    return re.sub(pattern, lambda match: TRUTH[match[0].lower()], text)


def by_record(text: bytes, form: Form, name: str, first: int) -> Samples:
    """Parse records one by one; UserError for the first that is not a sample, TextualError for a label of text.

    name: of the file; first: number of the first line.
    """
    labels: list[Any] = []
    values, real, columns = [], False, len(form.columns)
    for line, record in fields_of(text, form.delimiter, name, first):
        where = f"{name}, line {line}"
        if not any(record):
            continue
        if len(record) != columns:
            raise UserError(
                f"{where}: {len(record)} fields, and the first line has {columns}: give all lines as many, and put "
                'quotes around fields with a delimiter in them, as "a, b"'
            )
        row = []
        for k, field in enumerate(record):
            if field.lower() in MISSING:
                raise UserError(
                    f"{where}, {form.place(k)}: the value is missing ({field!r}): fill it in, or take the line out"
                )
            if k == form.label and form.textual:
                labels.append(_label(f"{where}, {form.place(k)}", field))
            elif k == form.label:
                if NUMBER.fullmatch(field.encode()) is None:
                    raise TextualError
                real = real or INTEGER.fullmatch(field.encode()) is None
                labels.append(float(field))
            else:
                row.append(_value(where, form, k, field))
        values.append(row)
    targets: npt.NDArray[Any] = np.array(
        labels if form.label >= 0 else [0.0] * len(values), "S" if form.textual else "f8"
    )
    return Samples(np.array(values, np.float32).reshape(len(values), columns - (form.label >= 0)), targets, real)


def _label(where: str, field: str) -> bytes:
    text = field.encode()
    if len(text) > LABEL_BYTES:
        raise UserError(f"{where}: a label of {len(text):,} bytes; expected the name of a class")
    return text


class TextualError(Exception):
    """A label is text, and labels were expected to be numbers."""


def _value(where: str, form: Form, k: int, field: str) -> float:
    if field.lower() in ("true", "false"):
        return float(field.lower() == "true")
    if NUMBER.fullmatch(field.encode()) is None:
        if field.lower().lstrip("+-") in ("inf", "infinity"):
            raise UserError(f"{where}, {form.place(k)}: found {field!r}: write a finite number, or take the line out")
        name = form.columns[k] or str(k + 1)
        raise UserError(
            f"{where}, {form.place(k)}: found {shown(field.encode())}, and features are numbers: take the column out, "
            f"or make a column of 0 and 1 of each of its values (pandas.get_dummies); if it is the label: --label "
            f"{name}"
        )
    if abs(float(field)) > LARGEST:
        raise UserError(
            f"{where}, {form.place(k)}: found {shown(field.encode())}, beyond {LARGEST:.2g}: divide by a number"
        )
    return float(field)
