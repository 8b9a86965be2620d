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

# Options of data sets in files, which do not apply to arrays.
OF_FILES = ("dataset", "data_dir", "context", "private_data")
# Default model, and default loss of a regression.
MODEL: Literal["mlp"] = "mlp"
VALUES = "squared"


def _owners() -> dict[str, str]:
    """The TOML table of each setting by name. Not cached: the program may register more settings between two calls."""
    return {each.name: table for table, section in tables_of(Config()).items() for each in fields(section)}


def check_names(settings: Mapping[str, Any]) -> None:
    """Raise UserError for a keyword that is not a setting, or is a setting of data sets in files."""
    owners = _owners()
    for name in settings:
        if name in OF_FILES:
            raise UserError(
                f"{name} applies to data sets in files, and the samples here are arrays: leave it out, or train with "
                "psmpi train"
            )
        if name not in owners:
            meant = nearest(name, owners)
            hint = f"did you mean {meant}?" if meant else "psmpi train --help-all lists all, with - in the place of _"
            raise UserError(f"unknown setting {name!r}; {hint}")


def configured(settings: Mapping[str, Any], task: str) -> tuple[Config, str]:
    """The configuration that keywords give, and the path of the resumed run's settings, "" for a new run.

    Settings without a keyword are those of the resumed run. In a new run they are the defaults, with the model mlp and,
    if `task` is "regression", the squared loss. UserError for a value of a wrong type or if there is no run to resume.
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
    """A value in the types of a TOML file: paths as text, NumPy numbers as Python's, sequences as lists."""
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, list, range, np.ndarray)):
        return [_plain(each) for each in value]
    return value


def as_keywords(message: str) -> str:
    """A message with options of the command line replaced by keywords: batch_size for --batch-size."""

    owners = _owners()

    def keyword(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return name if name in owners else match[0]

    return re.sub(r"--([a-z][a-z0-9-]*[a-z0-9])", keyword, message)


@contextmanager
def raised() -> Iterator[None]:
    """Run a block and raise its errors for Python: a UserError names keywords, a FloatingPointError becomes one too."""
    try:
        yield
    except (UserError, FloatingPointError) as error:
        message = as_keywords(str(error))
        raise UserError(message) from (error if isinstance(error, FloatingPointError) else None)
