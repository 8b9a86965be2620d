"""Settings as keywords: options of the command line by their names in Python, such as batch_size for --batch-size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from os import PathLike, fspath
from typing import Any, Literal

import numpy as np

from psmpi.config import Config, NetworkSettings, from_table, without_unused
from psmpi.config.unknown import tables_of
from psmpi.data import ARRAYS
from psmpi.errors import UserError, nearest
from psmpi.training.resume import own_settings

# Options that say where samples are, which here are arrays, and those of ranks with samples of their own.
OF_FILES = ("dataset", "data_dir", "context", "private_data")
# What a training is whose settings do not say it: of labels, and of values.
MODEL: Literal["mlp"] = "mlp"
VALUES = "squared"


def _owners() -> dict[str, str]:
    """The table of each setting; the program may have registered more since the last call."""
    return {one.name: table for table, section in tables_of(Config()).items() for one in fields(section)}


def check_names(settings: Mapping[str, Any]) -> None:
    """UserError for a keyword that is no setting, or one that arrays have no use for."""
    owners = _owners()
    for name in settings:
        if name in OF_FILES:
            raise UserError(
                f"{name} is of data sets in files, and the samples here are arrays: leave it out, or train with psmpi "
                "train"
            )
        if name not in owners:
            meant = nearest(name, owners)
            hint = f"did you mean {meant}?" if meant else "psmpi train --help lists all, with - in the place of _"
            raise UserError(f"unknown setting {name!r}; {hint}")


def configured(settings: Mapping[str, Any], task: str) -> tuple[Config, str]:
    """The configuration that keywords say for a task, and the path that the settings of a run that goes on are from.

    Settings are those of that run, else the defaults, but a network and a loss for arrays. UserError for a value of a
    wrong type, and where there is nothing to go on from.
    """
    check_names(settings)
    tables: dict[str, dict[str, Any]] = {}
    owners = _owners()
    for name, value in settings.items():
        tables.setdefault(owners[name], {})[name] = _plain(value)
    base = own_settings(str(_plain(settings.get("resume", ""))), str(_plain(settings.get("out", ""))))
    start = Config() if base is None else base.config
    if base is None:
        start = replace(start, model=NetworkSettings(MODEL))
        if task == "regression":
            start = replace(start, objective=replace(start.objective, loss=VALUES))
    start = replace(start, data=replace(start.data, dataset=ARRAYS))
    config = from_table(tables, start, "psmpi.fit")
    if base is not None or config.optimization.optimizer != start.optimization.optimizer:
        config = without_unused(config, start, settings.keys())
    return config, "" if base is None else base.path


def _plain(value: Any) -> Any:
    """A value as a TOML file has it."""
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, list, range, np.ndarray)):
        return [_plain(one) for one in value]
    return value


def as_keywords(message: str) -> str:
    """A message with keywords in the place of options of the command line, batch_size for --batch-size."""

    owners = _owners()

    def keyword(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return name if name in owners else found[0]

    return re.sub(r"--([a-z][a-z0-9-]*[a-z0-9])", keyword, message)


@contextmanager
def raised() -> Iterator[None]:
    """Raise what is wrong in words for Python; a training whose numbers went wrong is a UserError too."""
    try:
        yield
    except (UserError, FloatingPointError) as error:
        said = as_keywords(str(error))
        raise UserError(said) from (error if isinstance(error, FloatingPointError) else None)
