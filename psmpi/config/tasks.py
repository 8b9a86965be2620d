"""Settings of a training in groups by task, and the settings that most people need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from psmpi.config.options import Option, owner_of, settings_options
from psmpi.config.sections import (
    Data,
    LossSettings,
    NetworkSettings,
    OptimizerChoice,
    Parallel,
    Run,
)
from psmpi.config.terminal import Terminal
from psmpi.config.tree import Config, kinds_of_settings
from psmpi.errors import listed
from psmpi.optim import Hyper, NewtonSettings, ScheduleSettings
from psmpi.registry import all_methods, find_method


@dataclass(frozen=True)
class Task:
    """A group of settings.

    basic: names of the settings that most people need, in their order. of: classes whose other settings belong
    here too, unless another task names them. more: names of settings of other classes.
    """

    title: str
    basic: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    of: tuple[type[Any], ...] = ()


TASKS = (
    Task("Data", ("dataset", "data_dir", "label", "validation", "augment"), of=(Data,)),
    Task("Network", ("model", "widths"), of=(NetworkSettings,)),
    Task("Loss", ("loss", "class_weights"), of=(LossSettings,)),
    Task(
        "Training",
        ("epochs", "batch_size", "optimizer", "lr", "schedule", "weight_decay", "seed"),
        more=("shuffle", "max_steps", "on_nan"),
        of=(OptimizerChoice, ScheduleSettings),
    ),
    Task("Settings of optimizers", of=(Hyper,)),
    Task("Partitioned quasi-Newton methods (plbfgs, plsr1, plse)", of=(NewtonSettings,)),
    Task("Ranks", ("method", "threads", "backend"), of=(Parallel,)),
    Task("Run", ("out", "resume", "patience", "keep_best", "checkpoint_every", "track"), of=(Run,)),
    Task("Screen", ("quiet", "verbose"), of=(Terminal,)),
)
# Settings of methods in the short help if no method is given.
OF_METHODS = ("partition", "replicas", "placement", "masters", "colocate")
# The groups of methods follow the group of this task.
BEFORE_METHODS = "Ranks"
# Settings whose choices have a line each in the short help.
DESCRIBED = ("model", "loss", "method")


@dataclass(frozen=True)
class Group:
    """Options below one title."""

    title: str
    options: list[Option]
    about: str = ""


def basic_groups(config: Config, method: str = "") -> Iterator[Group]:
    """The options that most people need, by task, with defaults of a configuration.

    method: the name of a method all of whose options are to be shown, "" for none.
    """
    known = {name: one for name, one, _ in _settings(config)}
    for task in TASKS:
        if task.basic:
            yield Group(task.title, [known[name] for name in task.basic])
        if task.title == BEFORE_METHODS:
            chosen = method or config.parallel.method
            options = [one for kind in find_method(chosen).settings for one in options_of(config, kind)]
            shown = options if method else [one for one in options if one.name in OF_METHODS]
            if shown:
                yield Group(f"Method {chosen}", shown, method and about_of(find_method(chosen).settings[0]))


def all_groups(config: Config) -> Iterator[Group]:
    """All options by task, each once, with defaults of a configuration; groups of methods follow that of ranks."""
    every = list(_settings(config))
    known = {name: one for name, one, _ in every}
    named = {name for task in TASKS for name in (*task.basic, *task.more)}
    for task in TASKS:
        rest = [name for name, _, owner in every if owner in task.of and name not in named]
        yield Group(task.title, [known[name] for name in (*task.basic, *task.more, *rest)])
        if task.title == BEFORE_METHODS:
            yield from method_groups(config)


def method_groups(config: Config) -> Iterator[Group]:
    """The options of methods by the table of their settings."""
    for table, kind in kinds_of_settings().items():
        yield Group(title_of(table), options_of(config, kind), about_of(kind))


def users_of(kind: type[Any]) -> list[str]:
    """The names of the methods that have a class of settings."""
    return [name for name, method in all_methods().items() if kind in method.settings]


def title_of(table: str) -> str:
    """The title of the settings in a table: the method that has them alone, or those that share them."""
    users = users_of(kinds_of_settings()[table])
    return f"Method{'s' * (len(users) > 1)} {listed(users)}"


def about_of(kind: type[Any]) -> str:
    """One line on the settings of a class, and the network that its method trains where none is named."""
    users = users_of(kind)
    own = [all_methods()[name] for name in users if all_methods()[name].settings[0] is kind]
    text = own[0].summary if own else (kind.__doc__ or "").partition("\n")[0].rstrip(".")
    words = " ".join(own[0].usual_options) if own else ""
    return f"{text[:1].upper()}{text[1:]}." + f" If no --model is given: {words}" * bool(words)


def options_of(config: Config, kind: type[Any]) -> list[Option]:
    """The options of the class of settings of a method."""
    return list(settings_options(kind, config.of(kind)).values())


def _settings(config: Config) -> Iterable[tuple[str, Option, type[Any]]]:
    """Every setting outside of methods: name, option, and the class that declares it."""
    for section in config.sections.values():
        for name, one in settings_options(type(section), section).items():
            yield name, one, owner_of(type(section), name)
