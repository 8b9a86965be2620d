"""Suggestions for unknown names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from psmpi.config.ranges import option
from psmpi.config.tree import Config, kinds_of_settings
from psmpi.errors import nearest


def tables_of(config: Config) -> dict[str, Any]:
    """All tables of a configuration by name, also those of methods that are not chosen."""
    return {**config.sections, **{name: config.of(kind) for name, kind in kinds_of_settings().items()}}


def unknown_setting(key: str, table: str, tables: Mapping[str, Any], where: str) -> str:
    """The message for a setting `key` that is not in [table]: the table that has it, or the nearest name.

    tables: dataclasses by name.
    """
    owners = {field.name: name for name, one in tables.items() for field in fields(one)}
    said = f"{where}: unknown setting {key!r} in [{table}]"
    if key in owners:
        return f"{said}: it is of [{owners[key]}]"
    own = [name for name, owner in owners.items() if owner == table]
    meant = nearest(key, own) or nearest(key, owners)
    if meant:
        return f"{said}; did you mean {meant}{'' if meant in own else f', of [{owners[meant]}]'}?"
    return f"{said}; known are {', '.join(sorted(own)) or 'none'}"


def unknown_table(name: str, given: Any, tables: Mapping[str, Any], where: str) -> str:
    """The message for a setting outside of all tables, or an unknown table."""
    owners = {field.name: table for table, one in tables.items() for field in fields(one)}
    if not isinstance(given, Mapping) or name in owners:
        if name == "layers":
            return f"{where}: layers are those of a network: write [[model.layers]] for each"
        if name in owners:
            return f"{where}: {name} is a setting of [{owners[name]}]: write it below a line [{owners[name]}]"
        meant = "" if isinstance(given, list) else nearest(name, owners)
        if meant:
            return f"{where}: unknown setting {name!r}, in no table; did you mean {meant}, of [{owners[meant]}]?"
    meant = nearest(name, tables)
    hint = f"; did you mean [{meant}]?" if meant else f"; known are {', '.join(f'[{s}]' for s in tables)}"
    return f"{where}: unknown table [{name}]{hint}"


def unknown_options(words: Sequence[str], tables: Mapping[str, Any]) -> list[str]:
    """Messages for unknown options of a command line that have a similar known one."""
    known = {option(field.name) for one in tables.values() for field in fields(one)} | {"--config", "--help"}
    messages = []
    for word in (word.partition("=")[0] for word in words if word.startswith("--")):
        positive = f"--{word.removeprefix('--no-')}"
        meant = nearest(word.removeprefix("--"), (name.removeprefix("--") for name in known))
        if meant and not {word, positive, word.replace("_", "-")} & known:
            messages.append(f"{word} is no option; did you mean --{meant}?")
    return messages
