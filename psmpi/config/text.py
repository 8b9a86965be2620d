"""Configurations as TOML text, and back."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli_w

from psmpi.config.ranges import hints_of, one_of
from psmpi.config.sections import Data
from psmpi.config.tree import Config, kinds_of_settings
from psmpi.config.unknown import unknown_setting, unknown_table
from psmpi.errors import UserError, expanded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Tables of files of earlier versions, whose settings are now in tables of the methods.
FORMER = ("parallel", "replicated", "alignment", "subnets", "synthetic")
# Values of settings that older checkpoints lack, where the former behaviour was not today's default.
UNSAID = Config(data=Data(split_seed=-1))

# Byte-order marks of other encodings than UTF-8; the mark of UTF-32 begins like that of UTF-16.
WIDE = {
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML text; names of files in it become Python's. ValueError for malformed text."""
    try:
        tables: dict[str, Any] = _each_text(tomllib.loads(text), _with_bytes)
    except RecursionError:
        raise tomllib.TOMLDecodeError("values in values in values, deeper than any setting is") from None
    return tables


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Apply a function to all strings in a value of a TOML text."""
    if isinstance(value, dict):
        return {key: _each_text(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def _without_bytes(text: str) -> str:
    """Encode the name of a file for TOML: a byte that is not UTF-8 becomes NUL and two hex digits.

    No name has a NUL. Bytes of UTF-8 that the locale did not let Python decode become characters.
    """
    plain = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda byte: f"\0{ord(byte[0]) - 0xDC00:02x}", plain)


def _with_bytes(text: str) -> str:
    """Decode `_without_bytes`: bytes that are not UTF-8 become Python's surrogates."""
    return re.sub("\0([89a-f][0-9a-f])", lambda byte: chr(0xDC00 + int(byte[1], 16)), text)


def given(argv: Sequence[str], name: str) -> str:
    """The value of an option such as "--config" on a command line that is not parsed yet; "" without one.

    The last of several values counts.
    """
    value = ""
    for at, word in enumerate(argv):
        if word == name and at + 1 < len(argv):
            value = argv[at + 1]
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
    return value


def defaults(argv: Sequence[str], base: Config | None = None) -> Config:
    """The configuration before the options of a command line: `base` with the settings of the --config file.

    base: the defaults if None. UserError for a wrong file.
    """
    path, base = given(argv, "--config"), base or Config()
    return read_file(path, base) if path else base


def from_table(table: Mapping[str, Any], base: Config, where: str, foreign: bool = False) -> Config:
    """`base` with the settings of a TOML table; UserError names an unknown table or setting, or one of a wrong type.

    foreign: the table may be of a method, loss or optimizer that is not installed here: unknown tables are skipped, and
    unknown names of methods, losses and optimizers are kept.
    """
    sections, kinds = base.sections, kinds_of_settings()
    settings = {name: base.of(kind) for name, kind in kinds.items()}
    known = {**sections, **settings}
    changes: dict[str, dict[str, Any]] = {}
    for name, given in table.items():
        if isinstance(given, Mapping) and name not in known and name not in FORMER and foreign:
            continue
        if not isinstance(given, Mapping) or (name not in known and name not in FORMER):
            raise UserError(unknown_table(name, given, known, where))
        for key, value in given.items():
            moved = (s for s, one in settings.items() if name in FORMER and hasattr(one, key))
            owner = name if name in known and _has(known[name], key) else next(moved, "")
            if not owner:
                raise UserError(unknown_setting(key, name, known, where))
            label = f"{where}: [{name}] {key} = {value!r}"
            changes.setdefault(owner, {})[key] = _checked(value, known[owner], key, label, foreign)
    made = {name: replace(known[name], **values) for name, values in changes.items()}
    changed = replace(base, **{name: made[name] for name in made.keys() & sections.keys()})
    return changed.having(made[name] for name in made.keys() & settings.keys())


def _has(section: Any, key: str) -> bool:
    return any(one.name == key for one in fields(section))


def _checked(value: Any, section: Any, key: str, where: str, foreign: bool) -> Any:
    """Convert a value to the type of a setting of a section. foreign: see `from_table`."""
    hint, like = hints_of(section)[key], getattr(section, key)
    names = one_of(hint)
    if names is not None and isinstance(value, str) and value not in names.names and not foreign:
        raise UserError(f"{where}: choose one of {names.registry.choices(names.names)}")
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise UserError(f"{where}: choose one of {', '.join(get_args(hint))}")
    if type(None) in get_args(hint):
        like = next(kind for kind in get_args(hint) if kind is not type(None))()
    if isinstance(like, tuple):
        if not isinstance(value, list):
            raise UserError(f"{where}: expected a list")
        return tuple(value)
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(like):
        raise UserError(f"{where}: expected {type(like).__name__}, got {type(value).__name__}")
    return value


def read_file(path: str, base: Config | None = None) -> Config:
    """`base` (the defaults if None) with the settings of a TOML file. UserError for a file that cannot be read."""
    return from_table(tables_in(path), base or Config(), path)


def tables_in(path: str, option: str = "--config") -> dict[str, Any]:
    """The tables of a TOML file; {} for the path "". UserError for a file that cannot be read."""
    if not path:
        return {}
    try:
        return parse_toml(_decoded(expanded(path, option).read_bytes(), f"{option} {path}"))
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; give the path of a TOML file") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{option} {path}: not valid TOML: {error}") from None


def _decoded(data: bytes, place: str) -> str:
    """Decode a TOML file: UTF-8, with or without a byte-order mark. UserError for another encoding."""
    wide = next((name for name, marks in WIDE.items() if data.startswith(marks)), "")
    if not wide and b"\0" in data:
        wide = "UTF-32" if b"\0\0" in data else "UTF-16"
    if wide:
        file = place.partition(" ")[2]
        raise UserError(f"{place} is {wide} text, and TOML is UTF-8: save it so, or iconv -f {wide} -t UTF-8 {file}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{place}, line {line}: the byte {data[error.start]:#x} is not UTF-8, as TOML is: save it as UTF-8"
        ) from None


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML text, which read_file and from_toml read back."""
    # TOML has no None: settings without a value are left out.
    tables = {
        name: {key: value for key, value in asdict(one).items() if value is not None}
        for name, one in (config.sections | config.chosen).items()
    }
    return tomli_w.dumps(_each_text(tables, _without_bytes))


def from_toml(text: str, where: str, foreign: bool = False) -> Config:
    """The reverse of to_toml; `where` names the text in errors.

    foreign: the text is of a checkpoint. Its settings may be of a method that is not installed here, and newer settings
    may be missing; settings that name other files have no effect.
    """
    parsed = from_table(parse_toml(text), UNSAID if foreign else Config(), where, foreign)
    return replace(parsed, data=replace(parsed.data, allow_external=False)) if foreign else parsed
