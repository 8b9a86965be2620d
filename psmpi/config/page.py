"""The page of the documentation on the configuration, in Markdown: every table with its settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from psmpi.config.options import Option, settings_options
from psmpi.config.tasks import about_of, title_of
from psmpi.config.tree import Config, kinds_of_settings

OPENING = """# Configuration

This page lists every setting of a training: its name in a TOML file, its option on the command line, its type, its
default and what it does. `psmpi train --help-all` prints the same by task. The command `python -m psmpi.config` prints
this page.

## A TOML file

<!-- file: run.toml -->
```toml
[data]
dataset = "digits"
validation = 0.1
batch_size = 50

[model]
model = "mlp"
widths = [100, 50]

[objective]
loss = "nll"

[optimization]
optimizer = "adamw"
lr = 1e-3
weight_decay = 0.01
schedule = "cosine"

[run]
epochs = 5
seed = 1
```

<!-- run -->
```bash
psmpi train --config run.toml --lr 2e-3 --out runs/first
```

Settings stand in tables; each section below is one table. Lists are written in brackets, switches as `true` or `false`.
A name that psmpi does not know is an error, which names the closest setting. A network of your own is a list of
`[[model.layers]]` tables, see [networks](networks.md).

Later sources override earlier ones:

1. the default of the setting;
2. the settings of the run that `--resume` continues;
3. the TOML file of `--config`;
4. the command line.

Epochs, minibatch size and learning rate fit the data set, the network and the optimizer where they are not given; see
[results](results.md). The resolved configuration, with all settings that the run uses, is `config.toml` in the run
directory and a copy of it in every checkpoint. `psmpi train --config RUN/config.toml` starts an equal run.

A setting that the chosen method, optimizer, schedule or loss does not use is an error on the command line and in a
file. Its message names the choices that use it.
"""
METHODS = """## Tables of the methods

A method reads its own table and the tables that it shares with others. Its settings are refused where another method is
chosen.
"""


def page() -> str:
    """The page as Markdown text."""
    config = Config()
    parts = [OPENING]
    for table, section in config.sections.items():
        parts += [f"## `[{table}]`\n", f"{_sentence(section)}\n", *_table(settings_options(type(section), section))]
    parts.append(METHODS)
    for table, kind in kinds_of_settings().items():
        parts += [f"### `[{table}]`\n", f"{title_of(table)}. {_about(kind)}\n"]
        parts += _table(settings_options(kind, kind()))
    return "\n".join(parts)


def _sentence(section: Any) -> str:
    return " ".join((type(section).__doc__ or "").split())


def _about(kind: type[Any]) -> str:
    """One line on the settings of a class, with the options of its usual network in code."""
    text, given, words = about_of(kind).partition(" is given: ")
    return f"{_code(text)}{given}`{words}`." if given else _code(text)


def _table(options: dict[str, Option]) -> Iterator[str]:
    """A Markdown table of settings, and below it a list of their choices."""
    yield "| setting | option | type | default | what it does |\n|---|---|---|---|---|"
    for name, one in options.items():
        cells = (f"`{name}`", f"`{one.words}`", one.kind, _default(one), _code(one.text))
        yield f"| {' | '.join(cells)} |"
    yield ""
    described = {name: one.choices for name, one in options.items() if any(one.choices.values())}
    for name, choices in described.items():
        yield f"- `{name}`:"
        yield from (f"    - `{choice}`: {_code(text)}" for choice, text in choices.items())
    if described:
        yield ""


def _default(one: Option) -> str:
    """The default as TOML has it; "" where it is empty or not given."""
    if isinstance(one.default, bool):
        return f"`{str(one.default).lower()}`"
    if isinstance(one.default, str) and one.default:
        return f'`"{one.default}"`'
    return f"`{one.default_text}`" if one.default_text else ""


def _code(text: str) -> str:
    """A text with options and tables of TOML in code, and no character that begins a tag or ends a cell."""
    text = re.sub(r"(?<![\w-])--[a-z][a-z0-9-]*|\[\[[\w.]+\]\]", lambda match: f"`{match[0]}`", text)
    return text.replace("<", "&lt;").replace("|", "\\|")
