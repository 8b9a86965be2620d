"""Exceptions for mistakes of the user, and helpers for their messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """A mistake of the user. The message says what was wrong, where, and what to do instead; no traceback is shown."""


class LayersError(UserError):
    """A mistake in the tables of layers of a file. The message says where in the file."""


class DamagedError(UserError):
    """A file whose bytes are not those that were written. Reading it again does not help."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as "1 epoch" or "1,438 samples"; noun: the singular."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def unused_option(words: str, choice: str, users: Sequence[str], chosen: str, instead: str = "") -> UserError:
    """Return the error for an option that this run does not use.

    words: the option, with its value where other values are used; choice: the option that decides, with dashes; users:
    its values under which the option is used; chosen: its value in this run; instead: advice other than to use these.
    """
    instead = instead or ("choose one of these" if len(users) > 1 else f"use {choice} {users[0]}")
    return UserError(
        f"{words} is an option of {choice} {listed(users)}, and this run has {choice} {chosen}: leave it out, or "
        f"{instead}"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`; "" if none is.

    The initials of a name of several words (learning_rate: lr) and each of its words are tried first.
    """
    # Options have dashes where settings have underscores.
    names, plain = list(known), name.lower()
    words = [word for word in plain.replace("-", "_").split("_") if word]
    for short in ("".join(word[0] for word in words), *words):
        if len(words) > 1 and short in names:
            return short
    return next(iter(get_close_matches(plain, names, 1)), "")


def expanded(path: str | Path, label: str) -> Path:
    """A path with ~ replaced by the home folder; UserError, which begins with `label`, if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{label} {path}: there is no user of that name; write the folder out") from None


@contextmanager
def layers_in(file: str) -> Iterator[None]:
    """Turn a LayersError of the block into a UserError that names `file`, the file of the layers; "": not known."""
    try:
        yield
    except LayersError as error:
        raise UserError(f"{file}: {error}" if file else str(error)) from None
