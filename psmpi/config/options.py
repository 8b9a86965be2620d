"""Options of a command, read from dataclasses of settings and from functions: names, types, defaults and help texts.

The help text of a dataclass field is the string below it; that of an argument is its entry under `Args:`. The first
paragraph says what the option does. Lines `NAME: TEXT` in a second paragraph describe the choices.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional, Suppress

from psmpi.config.ranges import Choices, OneOf, hints_of, one_of, option

# Words that stand for values of a type.
WORDS = {int: "N", float: "X", str: "TEXT", Path: "FILE"}
TYPES = {int: "integer", float: "number", str: "string", bool: "switch", Path: "string"}
# Words that stand for texts, by the name of the option.
NAMED = {
    **dict.fromkeys(("activate", "goal", "json", "links", "plot", "save", "script", "trace"), "FILE"),
    **dict.fromkeys(("data_dir", "folder"), "FOLDER"),
}
REQUIRED: Any = MISSING
POSITIONAL = get_args(Positional[int])[1]


@dataclass(frozen=True)
class Option:
    """One option of a command, or one of its positional arguments.

    value: word that stands for its value, "" for a switch. default: REQUIRED where one must be given. choices: one line
    of text for each choice, "" where there is none; only: whether other values are refused. kind: name of its type.
    """

    name: str
    value: str
    text: str
    default: Any
    choices: Mapping[str, str] = field(default_factory=dict)
    only: bool = False
    positional: bool = False
    kind: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The words of the option, such as `--lr X`."""
        if self.positional:
            return self.value
        if self.default is True:
            return f"{option(self.name)}, {option(f'no_{self.name}')}"
        return ", ".join([*self.aliases, f"{option(self.name)} {self.value}".rstrip()])

    @property
    def default_text(self) -> str:
        """The default as on a command line; "" if it is empty, None or False."""
        if self.default is REQUIRED or self.default is None or self.default is False:
            return ""
        if self.default is True:
            return option(self.name)
        values = self.default if isinstance(self.default, tuple) else (self.default,)
        return " ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values)

    @property
    def summary(self) -> str:
        """The first sentence of the text, and the sentence that begins with "If not given"."""
        first, *others = sentences(self.text)
        return " ".join([first, *(one for one in others if one.startswith("If not given"))])


def sentences(text: str) -> list[str]:
    """The sentences of a text; [""] for an empty one."""
    return re.split(r"(?<! al\.)(?<=[^.]\.)\s+(?=[A-Z0-9\[{-])", text)


def settings_options(kind: type[Any], section: Any = None) -> dict[str, Option]:
    """The options of a dataclass of settings by name; section: an instance, whose values are then the defaults."""
    hints, options = hints_of(kind), {}
    for one in fields(kind):
        if Suppress in getattr(hints[one.name], "__metadata__", ()):
            continue
        default = one.default if section is None else getattr(section, one.name)
        if default is MISSING and one.default_factory is not MISSING:
            default = one.default_factory()
        options[one.name] = _option_of(one.name, hints[one.name], default, field_text(kind, one))
    return options


def owner_of(kind: type[Any], name: str) -> type[Any]:
    """The class among a dataclass and its bases that declares a field."""
    return next(one for one in kind.__mro__ if name in inspect.get_annotations(one))


def argument_options(function: Callable[..., Any]) -> list[Option]:
    """The options and positional arguments of a function, without those of a training."""
    hints, parameters = get_type_hints(function, include_extras=True), inspect.signature(function).parameters
    texts = argument_texts(inspect.getdoc(function) or "")
    options = []
    for name, one in parameters.items():
        if name != "config" or not hasattr(function, "training"):
            default = REQUIRED if one.default is one.empty else one.default
            positional = one.kind is one.POSITIONAL_ONLY
            options.append(_option_of(name, hints[name], default, texts.get(name, ""), positional))
    return options


def _option_of(name: str, hint: Any, default: Any, text: str, positional: bool = False) -> Option:
    """The option of a setting of type `hint`; text: its whole help text, choices included."""
    about, described = split_text(text)
    value, several, registered, aliases = "", False, False, ()
    for extra in _annotations(hint):
        value = getattr(extra, "metavar", None) or value
        about = getattr(extra, "help", None) or about
        positional = positional or extra is POSITIONAL
        aliases = tuple(getattr(extra, "aliases", None) or aliases)
        if isinstance(extra, Choices | OneOf):
            described, registered = {**described, **extra.lines()}, True
    kind, registry = _plain(hint), one_of(hint)
    if get_origin(kind) is tuple:
        kind, several = _plain(get_args(kind)[0]), True
    literal = get_origin(kind) is Literal or registry is not None
    if literal:
        names = registry.names if registry is not None else get_args(kind)
        described = {one: described.get(one, "") for one in names if one}
    if kind is not bool:
        named = NAMED.get(name, "TEXT") if kind is str else WORDS.get(kind, "TEXT")
        value = (value or ("NAME" if literal else named)) + " ..." * several
    type_name = "choice" if literal or registered else TYPES.get(kind, "")
    type_name = f"list of {type_name}s" if several else type_name
    return Option(name, value, about, default, described, literal, positional, type_name, aliases)


def _plain(hint: Any) -> Any:
    """A type without annotations and without None."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return _plain(next(one for one in get_args(hint) if one is not type(None)))
    return hint


def _annotations(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is Annotated:
        first, *extra = get_args(hint)
        yield from extra
        yield from _annotations(first)


def split_text(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph of a help text, and the texts of choices in the second one."""
    about, _, lines = inspect.cleandoc(text).partition("\n\n")
    choices: dict[str, str] = {}
    last = ""
    for line in lines.splitlines():
        match = re.match(r"(\S+): +(\S.*)", line)
        if match:
            last = match[1]
            choices[last] = match[2]
        elif last and line.strip():
            choices[last] += f" {line.strip()}"
    return " ".join(about.split()), choices


def argument_texts(doc: str) -> dict[str, str]:
    """The texts below `Args:` in a docstring, by argument."""
    texts: dict[str, str] = {}
    last = ""
    for line in doc.partition("\nArgs:\n")[2].splitlines():
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            last = start[1]
            texts[last] = start[2]
        elif last:
            texts[last] += f"\n{line}"
    return texts


def field_text(kind: type[Any], one: Field[Any]) -> str:
    """The help text of a field of a dataclass: the string below it, "" where there is none or no source."""
    owner = owner_of(kind, one.name)
    return _field_texts(owner.__module__).get((owner.__name__, one.name), "")


@cache
def _field_texts(module: str) -> dict[tuple[str, str], str]:
    """The strings below the fields of the classes of a module, by class and field."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {
        (owner.name, one.target.id): below.value.value
        for owner in classes
        for one, below in pairwise(owner.body)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(below.value.value, str)
    }
