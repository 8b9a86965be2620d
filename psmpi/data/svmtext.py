"""The text format of SVMlight and LIBSVM: one sample in a line, its label, then `index:value` with ascending indices.

Array operations parse a block of lines at once. If the block is not in order, its lines are parsed one by one, and the
error names the first wrong line.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from psmpi.data.files import check_unpacked, described, reading
from psmpi.errors import UserError

# Bytes that are read at a time; parsing needs a few times as many besides the result.
BLOCK = 1 << 20
# Largest index: columns are int32.
MAX_INDEX = (1 << 31) - 1
# Whole numbers up to WHOLE are exact in float64; LARGEST is the largest value of float32.
WHOLE, LARGEST = 1 << 53, float(np.finfo(np.float32).max)

PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}
NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
INTEGER = re.compile(rb"[+-]?\d+")
COMMENT = re.compile(rb"#[^\n]*")
COLONS = bytes.maketrans(b":", b" ")

# Kinds of bytes; a byte of kind OTHER is not part of a sample.
SPACE, NEWLINE, COLON, DIGIT, SIGN, POINT, EXPONENT, OTHER = range(8)
KINDS = np.full(256, OTHER, np.uint8)
for kind, named in enumerate((b" \t\r\v\f", b"\n", b":", b"0123456789", b"+-", b".", b"eE")):
    KINDS[list(named)] = kind


class Lines(NamedTuple):
    """The samples of some lines.

    labels: (n,) float64. real_line: first line, from 1, whose label is not written as an integer; 0: none. lengths:
    (n,) int64, entries of each sample. indices: (entries,) int32. values: (entries,) float32.
    """

    labels: npt.NDArray[np.float64]
    real_line: int
    lengths: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


class Growing:
    """A vector that grows: `add` appends values, `array` returns all of them."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._room, self._size = np.empty(1 << 12, dtype), 0

    def add(self, values: npt.NDArray[Any]) -> None:
        """Append values."""
        size = self._size + len(values)
        if size > len(self._room):
            # For large memory the operating system moves pages and copies nothing.
            self._room.resize(max(size, len(self._room) * 3 // 2), refcheck=False)
        self._room[self._size : size] = values
        self._size = size

    def array(self) -> npt.NDArray[Any]:
        """Return all values. Call it after the last `add`, since it shrinks the vector to its size."""
        self._room.resize(self._size, refcheck=False)
        return self._room


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples of a file: the fields of `Lines`, with `starts` (n + 1,) int64 instead of lengths."""

    labels: npt.NDArray[np.float64]
    real_line: int
    starts: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


def read_text(path: Path) -> Samples:
    """Read all samples of a file, compressed or not; UserError for the first wrong line or if there is no sample."""
    labels, lengths, real_line = Growing(np.float64), Growing(np.int64), 0
    indices, values = Growing(np.int32), Growing(np.float32)
    with reading(path):
        for first, text in _blocks(path):
            lines = fast(text)
            if lines is None:
                lines = by_line(text, str(path), first)
            real_line = real_line or (lines.real_line and first - 1 + lines.real_line)
            for vector, more in ((labels, lines.labels), (lengths, lines.lengths), (indices, lines.indices)):
                vector.add(more)
            values.add(lines.values)
    if not len(labels.array()):
        raise UserError(f"{path}: there is no sample in the file: write one a line, as 1 3:0.5 17:2")
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths.array())])
    return Samples(labels.array(), real_line, starts, indices.array(), values.array())


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield blocks of whole lines without comments: number of the first line, from 1, and text."""
    packed, unpacked, line, rest = path.stat().st_size, 0, 1, b""
    with cast(BinaryIO, PACKED.get(path.suffix.lower(), partial(open, mode="rb"))(path)) as stream:
        while True:
            data = stream.read(BLOCK)
            if b"\0" in data or (not unpacked and data.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))):
                raise UserError(f"{path}: {_kind(path, data)}, and no text of samples: is it another file?")
            if not unpacked:
                data = data.removeprefix(b"\xef\xbb\xbf")
            unpacked += len(data)
            check_unpacked(str(path), packed, unpacked, "unpack it first")
            end = data.rfind(b"\n") + 1 if data else 0
            text = rest + data[:end] if end else rest + b"\n" if rest and not data else b""
            rest = data[end:] if end else rest + data
            if text:
                count = text.count(b"\n")
                yield line, COMMENT.sub(b"", text) if b"#" in text else text
                line += count
            if not data:
                return


def _kind(path: Path, data: bytes) -> str:
    """Text about the format of a file by its first bytes, or by its name if that says that it is compressed."""
    if path.suffix.lower() not in PACKED:
        for magic, end in ((b"\x1f\x8b", ".gz"), (b"BZh", ".bz2"), (b"\xfd7zXZ", ".xz")):
            if data.startswith(magic):
                return f"it is packed as {end}, with which its name has to end then"
    return described(path) if path.suffix.lower() not in PACKED else "it unpacks to bytes of an unknown format"


def fast(text: bytes) -> Lines | None:
    """Parse whole lines without comments by array operations; None if a line is not in order."""
    kinds = KINDS[np.frombuffer(text, np.uint8)]
    if (kinds == OTHER).any():
        return None
    blank = np.concatenate([[True], kinds <= NEWLINE, [True]])
    # First byte of each word, and the byte after its last one.
    edges = np.flatnonzero(blank[1:] != blank[:-1])
    starts, ends = edges[0::2], edges[1::2]
    if not len(starts):
        return by_line(b"", "", 1)
    line = np.searchsorted(np.flatnonzero(kinds == NEWLINE), starts)
    label = np.diff(line, prepend=-1) > 0
    colons, entries = np.flatnonzero(kinds == COLON), ~label
    # Each word but a label has one colon inside: there are as many colons as such words, each between its edges.
    if len(colons) != np.count_nonzero(entries):
        return None
    if (colons <= starts[entries]).any() or (colons >= ends[entries] - 1).any():
        return None
    first, index = _tokens(starts, label, colons)
    special = np.flatnonzero(kinds >= SIGN)
    of = np.searchsorted(first, special, "right") - 1
    if not are_numbers(kinds, special, of, first, index):
        return None
    numbers = np.fromstring(text.translate(COLONS), sep=" ", count=len(first))
    if len(numbers) != len(first) or not (np.abs(numbers) < np.inf).all():
        return None
    number, value = numbers[index], numbers[np.concatenate([[False], index[:-1]])]
    rows = line[entries]
    if (number > MAX_INDEX).any() or (np.abs(value) > LARGEST).any():
        return None
    if ((np.diff(number) <= 0) & (rows[1:] == rows[:-1])).any():
        return None
    at = np.flatnonzero(label)
    lengths = np.diff(at, append=len(label)) - 1
    is_label = ~(index | np.concatenate([[False], index[:-1]]))
    written = of[kinds[special] > SIGN]
    written = written[is_label[written]]
    # Line of the first label with a point or an exponent: a label is a number that begins with its word.
    real_line = int(line[np.searchsorted(starts, first[written[0]])]) + 1 if len(written) else 0
    return Lines(numbers[is_label], real_line, lengths, number.astype(np.int32), value.astype(np.float32))


def _tokens(
    starts: npt.NDArray[np.int64], label: npt.NDArray[np.bool_], colons: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Offset of each number in the text, in order, and the mask of numbers that are indices."""
    size = np.where(label, 1, 2)
    begin = np.cumsum(size) - size
    first, index = np.empty(len(starts) + len(colons), np.int64), np.zeros(len(starts) + len(colons), np.bool_)
    first[begin] = starts
    first[begin[~label] + 1] = colons + 1
    index[begin[~label]] = True
    return first, index


def are_numbers(
    kinds: npt.NDArray[np.uint8],
    special: npt.NDArray[np.int64],
    of: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    index: npt.NDArray[np.bool_],
) -> bool:
    """Whether NUMBER matches all numbers, and indices consist of digits only.

    kinds: kind of each byte. special: offsets of signs, points and exponents. of: number that contains each of these.
    first: offsets of the numbers. index: mask of numbers that are indices.
    """
    if index[of].any():
        return False
    kind = kinds[special]
    # special + 1 is inside the text, which ends with a newline.
    before, after = np.where(special > 0, kinds[special - 1], SPACE), kinds[special + 1]
    begins = special == first[of]
    sign, point, exponent = kind == SIGN, kind == POINT, kind == EXPONENT
    if (sign & ~begins & (before != EXPONENT)).any() or (sign & begins & (after != DIGIT) & (after != POINT)).any():
        return False
    if (point & (begins | (before != DIGIT)) & (after != DIGIT)).any():
        return False
    second = kinds[np.minimum(special + 2, len(kinds) - 1)]
    powered = (after == DIGIT) | ((after == SIGN) & (second == DIGIT))
    if (exponent & (begins | ((before != DIGIT) & (before != POINT)) | ~powered)).any():
        return False
    # A number has at most one point and one exponent, and the point comes first.
    both = ~sign
    number, which = of[both], kind[both]
    same = number[1:] == number[:-1]
    if (same & ~((which[:-1] == POINT) & (which[1:] == EXPONENT))).any():
        return False
    return not (same[1:] & same[:-1]).any()


def by_line(text: bytes, name: str, first: int) -> Lines:
    """Parse lines one by one; UserError for the first wrong one. name: of the file; first: number of the first line."""
    labels, lengths, indices, values, real_line = [], [], [], [], 0
    for number, line in enumerate(text.split(b"\n"), first):
        words = list(re.finditer(rb"[^ \t\r\v\f]+", line))
        if not words:
            continue
        where = f"{name}, line {number}"
        labels.append(_label(where, words[0][0]))
        if not real_line and INTEGER.fullmatch(words[0][0]) is None:
            real_line = number - first + 1
        row = [_entry(f"{where}, column {word.start() + 1}", word[0]) for word in words[1:]]
        for (before, _), (index, _), word in zip(row, row[1:], words[2:], strict=False):
            if index <= before:
                fault = "twice" if index == before else f"after {before}"
                raise UserError(
                    f"{where}, column {word.start() + 1}: found the index {index} {fault}; indices of a line have to "
                    "ascend: sort them, and add up the values of equal ones"
                )
        lengths.append(len(row))
        indices += [index for index, _ in row]
        values += [value for _, value in row]
    arrays = (np.array(lengths, np.int64), np.array(indices, np.int32), np.array(values, np.float32))
    return Lines(np.array(labels, np.float64), real_line, *arrays)


def _label(where: str, word: bytes) -> float:
    if b":" in word:
        raise UserError(
            f"{where}: found {shown(word)} in the place of the label: begin the line with 0 where none is known"
        )
    if b"," in word:
        raise UserError(
            f"{where}: found the labels {shown(word)}; a sample has one label here, and no list of them: write a file "
            "for each of them, with 0 and 1"
        )
    return _number(where, "label", word)


def _entry(where: str, word: bytes) -> tuple[int, float]:
    index, colon, value = word.partition(b":")
    if index == b"qid":
        raise UserError(
            f"{where}: found {shown(word)}: samples are ranked within queries there, which psmpi does not learn; take "
            "the qid out to learn the labels: sed 's/ qid:[0-9]*//' OLD > NEW"
        )
    if not colon or not value or not index.isdigit():
        raise UserError(f"{where}: found {shown(word)}; expected index:value, as 17:0.5")
    if int(index) > MAX_INDEX:
        raise UserError(
            f"{where}: found the index {shown(index)}; expected {MAX_INDEX:,} at most: number features anew"
        )
    number = _number(where, "value", value)
    if abs(number) > LARGEST:
        raise UserError(f"{where}: found the value {shown(value)}, beyond {LARGEST:.2g}: divide the values by a number")
    return int(index), number


def _number(where: str, what: str, word: bytes) -> float:
    if NUMBER.fullmatch(word) is None:
        finite = word.lower().lstrip(b"+-") not in (b"nan", b"inf", b"infinity")
        fix = "a number, as -0.5 or 1e-3" if finite else "a finite number: correct the sample, or take the line out"
        raise UserError(f"{where}: found the {what} {shown(word)}; expected {fix}")
    number = float(word)
    if abs(number) == np.inf:
        raise UserError(f"{where}: found the {what} {shown(word)}, which float64 does not hold: divide by a number")
    return number


def shown(word: bytes) -> str:
    """A word in quotes for messages, shortened if it is long."""
    text = word.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
