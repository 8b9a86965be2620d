"""Ranges and choices of settings, beside their types: `Annotated[int, Least(0)]`, `Annotated[str, OneOf(LOSSES)]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from math import isfinite
from typing import Any, NamedTuple, get_type_hints

from psmpi.errors import UserError
from psmpi.registry import Registry


class Least(NamedTuple):
    """The least value of a setting that is a whole number."""

    bound: int


@dataclass(frozen=True, eq=False)
class Choices:
    """Choices of a setting whose names are in a registry; lines: a function that returns a line of text for each."""

    lines: Callable[[], Mapping[str, str]]


@dataclass(frozen=True, eq=False)
class OneOf:
    """The registry whose names a setting may have; lines: a function that returns a line of text for each name."""

    registry: Registry[Any]
    lines: Callable[[], Mapping[str, str]]
    # Returns all names, if they are more than the registry's.
    all_names: Callable[[], tuple[str, ...]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the choices."""
        return self.all_names() if self.all_names else self.registry.names


def one_of(hint: Any) -> OneOf | None:
    """The registry in the annotations of a setting's type; None without one."""
    return next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, OneOf)), None)


def option(name: str) -> str:
    """The option of the command line that gives the setting called `name`."""
    return f"--{name.replace('_', '-')}"


def hints_of(section: Any) -> Mapping[str, Any]:
    """The types of the settings of a section, an instance or its class, by name, with their bounds."""
    kind: Any = section if isinstance(section, type) else type(section)
    return _hints(kind)


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


def check_ranges(section: Any) -> None:
    """UserError for a value of a dataclass of settings below its range, and for a number that is not finite."""
    hints = hints_of(section)
    for one in fields(section):
        value = getattr(section, one.name)
        for bound in getattr(hints[one.name], "__metadata__", ()):
            if isinstance(bound, Least) and value is not None and value < bound.bound:
                raise UserError(f"{option(one.name)} {value}: expected a whole number from {bound.bound} up")
        if isinstance(value, float) and not isfinite(value):
            raise UserError(f"{option(one.name)} {value}: expected a finite number")
