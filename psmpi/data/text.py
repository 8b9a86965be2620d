"""Texts: windows of characters as sequences of tokens; the target of each step is the next character."""

from __future__ import annotations

from codecs import BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from psmpi.data.files import CHUNK_BYTES, reading
from psmpi.data.rows import ArrayRows
from psmpi.data.split import Dataset, Split
from psmpi.errors import UserError, counted

SUFFIX = ".txt"
# Default number of steps of a window.
CONTEXT = 64
# Most distinct characters of a text, whose numbers are int16; the scripts of most languages have fewer.
MOST = 1 << 15
# The last 1 / TENTH of the characters is for testing.
TENTH = 10
POINTS = 0x110000

Codes = npt.NDArray[np.int8] | npt.NDArray[np.int16]


def is_text(name: str) -> bool:
    """Whether a name is that of a text."""
    return Path(name).suffix.lower() == SUFFIX


def open_text(name: str, path: Path, context: int = CONTEXT, characters: str = "") -> Dataset:
    """Open a text as a data set: tokens (1, context) and labels (context,), int8 or int16, one class a character.

    Token k is the k-th of the text's distinct characters in the order of their code points, or the k-th of `characters`
    if given. The last tenth of the text is for testing. Both parts are cut into consecutive windows; characters after
    the last whole window are left out, and no window has characters of both parts. All characters of the file count,
    also the \\r of Windows' newlines, except a byte-order mark at the start. The splits are views of one array with one
    or two bytes a character.

    UserError for a text that is not UTF-8 or too short, with one distinct character only or more than MOST, and with a
    character that is not in `characters`.
    """
    codes, characters = _read(path, characters)
    tests = len(codes) // TENTH
    if tests <= context:
        fits = f"use --context {tests - 1} or less, or" if tests > 1 else "use"
        raise UserError(
            f"{path}: {counted(len(codes), 'character')}, of which the last tenth, {tests}, are for testing; a window "
            f"of --context {context} takes {context + 1}: {fits} a text of {TENTH * (context + 1):,} or more"
        )
    train, test = (_windows(some, context, characters) for some in (codes[:-tests], codes[-tests:]))
    return Dataset(name, len(characters), train.shape, train, test)


def open_whole_text(path: Path, context: int = CONTEXT, characters: str = "") -> Split:
    """All windows of a text as one split; parameters and errors as in `open_text`."""
    codes, characters = _read(path, characters)
    if len(codes) <= context:
        raise UserError(
            f"{path}: {counted(len(codes), 'character')}, and a window of {context} takes {context + 1}: give a longer "
            "text"
        )
    return _windows(codes, context, characters)


def encode(text: str, characters: str) -> npt.NDArray[np.int16]:
    """Tokens (len(text),) int16 of a text; UserError for a character that is not in `characters`."""
    places = {character: k for k, character in enumerate(characters)}
    unknown = next((character for character in text if character not in places), "")
    if unknown:
        raise UserError(
            f"the character {named(unknown)} is not among the {len(characters)} that the network has been trained on: "
            "leave it out"
        )
    return np.array([places[character] for character in text], np.int16)


def named(character: str) -> str:
    """Text that names a character in messages, such as 'é' (U+00E9)."""
    return f"{character!r} (U+{ord(character):04X})"


def _windows(codes: Codes, context: int, characters: str) -> Split:
    count = (len(codes) - 1) // context
    x, labels = (codes[at : at + count * context].reshape(count, context) for at in (0, 1))
    shape = (1, context)
    return Split(labels, shape, 1.0, ArrayRows(x), vocabulary=len(characters), characters=characters)


def _read(path: Path, characters: str) -> tuple[Codes, str]:
    """Read the tokens of a text and its characters: `characters`, or if that is "" its distinct characters."""
    is_used, count = np.zeros(POINTS, np.bool_), 0
    for points in _code_points(path):
        is_used[points] = True
        count += len(points)
    used = np.flatnonzero(is_used)
    alphabet = np.array([ord(character) for character in characters]) if characters else used
    if not count:
        raise UserError(f"{path}: the text is empty: give one of {TENTH * (CONTEXT + 1):,} characters or more")
    if len(alphabet) < 2:
        raise UserError(
            f"{path}: all {count:,} characters are {named(chr(used[0]))}: there is nothing to tell apart; give "
            "another text"
        )
    if len(alphabet) > MOST:
        raise UserError(
            f"{path}: {len(alphabet):,} distinct characters; expected {MOST:,} at most: is it a text? Replace rare ones"
        )
    unknown = np.setdiff1d(used, alphabet)
    if len(unknown):
        raise UserError(
            f"{path}: the character {named(chr(unknown[0]))} is not among the {len(alphabet)} that the network has "
            "been trained on: give a text without it"
        )
    numbers = np.full(POINTS, -1, np.int16)
    numbers[alphabet] = np.arange(len(alphabet))
    codes: Codes = np.full(count, -1, np.int8 if len(alphabet) <= 128 else np.int16)
    at = 0
    for points in _code_points(path):
        codes[at : at + len(points)] = numbers[points[: count - at]]
        at += len(points)
    if at != count or codes.min() < 0:
        raise UserError(f"{path}: the file was changed while it was read: start again")
    codes.flags.writeable = False
    return codes, "".join(map(chr, alphabet))


def _code_points(path: Path) -> Iterator[npt.NDArray[np.uint32]]:
    """Yield the code points of a text in pieces, without a byte-order mark at its start."""
    decoder, count, start = getincrementaldecoder("utf-8")(), 0, True
    with reading(path), path.open("rb") as file:
        while True:
            data = file.read(CHUNK_BYTES)
            if start and data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
                raise UserError(
                    f"{path}: the text is UTF-16 or UTF-32 and not UTF-8: save it so, or iconv -f UTF-16 -t UTF-8 OLD "
                    "> NEW"
                )
            count += len(data)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = count - len(error.object) + error.start
                raise UserError(
                    f"{path}: byte {at:,} (counted from 0) is {error.object[error.start]:#04x}, which is not UTF-8 "
                    "there: save the text as UTF-8, or by the encoding that it has iconv -f LATIN1 -t UTF-8 OLD > NEW"
                ) from None
            if start and text:
                text, start = text.removeprefix("\ufeff"), False
            if text:
                yield np.frombuffer(text.encode("utf-32-le"), "<u4")
            if not data:
                return
