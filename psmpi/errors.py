"""The one exception that stands for a mistake of the user's, and what helps to tell of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """An error of the user: says what was wrong, where, and what to do instead; shown without a traceback."""


class LayersError(UserError):
    """A mistake in the tables of layers of a file, which says where it is in that file."""


class DamagedError(UserError):
    """A file that is not what was once written: it will not get better."""


def counted(number: int, noun: str) -> str:
    """ "1 epoch", "1,438 samples"; noun: of one."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, or made of the initials of its words (learning_rate: lr); "" where none is."""
    # Options have dashes where settings have underscores.
    names, plain = list(known), name.lower()
    words = [word for word in plain.replace("-", "_").split("_") if word]
    for short in ("".join(word[0] for word in words), *words):
        if len(words) > 1 and short in names:
            return short
    return next(iter(get_close_matches(plain, names, 1)), "")


def expanded(path: str | Path, what: str) -> Path:
    """A path whose ~ is a home folder; UserError, which names `what` it is of, where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{what} {path}: there is no user of that name; write the folder out") from None


@contextmanager
def layers_in(file: str) -> Iterator[None]:
    """Say in a LayersError which file has the tables of layers, where that is known."""
    try:
        yield
    except LayersError as error:
        raise UserError(f"{file}: {error}" if file else str(error)) from None
