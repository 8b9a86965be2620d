"""The one exception that stands for a mistake of the user's, and what may have been meant by a wrong name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error of the user: says what was wrong, where, and what to do instead; shown without a traceback."""


class DamagedError(UserError):
    """A file that is not what was once written: it will not get better."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, or made of the initials of its words (learning_rate: lr); "" where none is."""
    # Options have dashes where settings have underscores.
    names, plain = list(known), name.lower()
    words = [word for word in plain.replace("-", "_").split("_") if word]
    for short in ("".join(word[0] for word in words), *words):
        if len(words) > 1 and short in names:
            return short
    return next(iter(get_close_matches(plain, names, 1)), "")
