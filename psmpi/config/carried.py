"""Settings carried over by a resumed run, and settings changed at its start."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from psmpi.config.sections import DEEP, Data, LossSettings, NetworkSettings, Optimization, Parallel, Run, unused_of_loss
from psmpi.config.terminal import Terminal
from psmpi.config.text import given, tables_in
from psmpi.config.tree import Config
from psmpi.data.table import is_table
from psmpi.data.text import is_text
from psmpi.optim import ALL_OPTIMIZERS, Hyper, find_optimizer, unused_settings
from psmpi.registry import all_methods, find_method, method_names

# Settings of places and of a single start, which a resumed run does not take over.
ANEW = (
    "allow_external", "data_dir", "max_steps", "new_data", "out", "resume", "stall_abort", "stall_warn", "track",
    "track_dir", *(one.name for one in fields(Terminal)),
)  # fmt: skip
# Settings of GPUs, and settings that belong to the learning rate of an optimizer.
OF_DEVICE = ("compute", "convolution", "gpu_aware", "nccl")
OF_RATE = ("lr", "min_lr", "clip", *(one.name for one in fields(Hyper)))


def given_names(argv: Sequence[str], file: bool = True) -> set[str]:
    """Names of all settings on a command line; file: those in its --config file, too."""
    options = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    tables = tables_in(given(argv, "--config")) if file else {}
    keys = {key for table in tables.values() if isinstance(table, dict) for key in table}
    return options | {one.removeprefix("no_") for one in options} | keys


def with_names(config: Config, argv: Sequence[str]) -> Config:
    """`config` with the method, loss and optimizer of a command line, since its own may not be installed here."""
    parallel, objective, o = config.parallel, config.objective, config.optimization
    return replace(
        config,
        parallel=replace(parallel, method=given(argv, "--method") or parallel.method),
        objective=replace(objective, loss=given(argv, "--loss") or objective.loss),
        optimization=replace(o, optimizer=given(argv, "--optimizer") or o.optimizer),
    )


def with_usual(argv: Sequence[str], start: Config) -> list[str]:
    """Put the method's usual options before the command line, unless a network is named.

    start: the configuration of the --config file. Usual options that the command line or the file gives are left out.
    """
    said, method = given_names(argv), given(argv, "--method") or start.parallel.method
    if method not in method_names() or {"model", "layers", "resume"} & said:
        return list(argv)
    words: list[str] = []
    keeps = True
    for word in find_method(method).usual_options:
        if word.startswith("--"):
            keeps = word[2:].replace("-", "_") not in said
        words += [word] * keeps
    return [*words, *argv]


def without_unused(config: Config, base: Config, said: Collection[str]) -> Config:
    """`config` without the settings of `base` that its own method, optimizer, loss, network and backend do not use.

    Such settings are set to their defaults, except those named in `said`. With another optimizer, so are the learning
    rate and all settings of optimizers.
    """
    method = config.parallel.method
    if method not in all_methods():
        return config
    kind, o, before = find_method(method), config.optimization, base.optimization
    # Given settings of other methods stay, and are refused later.
    settings = [
        of if one in config.kinds else _by_default(of, one(), vars(of).keys() - set(said))
        for one, of in config.settings.items()
    ]
    used = kind.uses(config)
    names = {one.setting for one in unused_settings(o.optimizer, o.schedule, vars(o)) if one.setting not in used}
    if find_optimizer(o.optimizer).needs_closure:
        names.add("clip")
    if o.optimizer != before.optimizer:
        names |= set(OF_RATE)
    o = _by_default(o, Optimization(), names - set(said))
    loss = config.objective
    loss = _by_default(loss, LossSettings(), unused_of_loss(loss) - set(said))
    data, model, parallel = config.data, config.model, config.parallel
    if not is_text(data.dataset):
        data = _by_default(data, Data(), {"context"} - set(said))
    if not is_table(data.dataset):
        data = _by_default(data, Data(), {"label"} - set(said))
    if model.model != base.model.model:
        shape = {"widths", "blocks", "layers", "scale", "vocabulary", "heads", "domains", "halo", *DEEP}
        model = _by_default(model, NetworkSettings(), shape - set(said))
    if not model.scale and model.model != "custom":
        loss = _by_default(loss, LossSettings(), {"margin"} - set(said))
    if not kind.weighs_classes:
        loss = _by_default(loss, LossSettings(), {"class_weights"} - set(said))
    if not loss.margin:
        loss = _by_default(loss, LossSettings(), {"margin_kind"} - set(said))
    if parallel.backend != base.parallel.backend:
        parallel = _by_default(parallel, Parallel(), set(OF_DEVICE) - set(said))
    elif not kind.nccl:
        parallel = _by_default(parallel, Parallel(), {"nccl"} - set(said))
    run = config.run if "mlflow" in config.run.track else _by_default(config.run, Run(), {"track_dir"} - set(said))
    sections = {"data": data, "optimization": o, "objective": loss, "model": model, "parallel": parallel, "run": run}
    return replace(config, **sections).having(settings)


def without_anew(config: Config) -> Config:
    """`config` without the settings of a single start (ANEW), but with the number of steps."""
    names = {"new_data", "out", "resume", "stall_abort", "stall_warn", "track", "track_dir"}
    data = _by_default(config.data, Data(), {"allow_external"})
    return replace(config, data=data, run=_by_default(config.run, Run(), names), terminal=Terminal())


def _by_default(section: Any, plain: Any, names: Collection[str]) -> Any:
    return replace(section, **{name: getattr(plain, name) for name in names})


def changes(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """(name, value before, value now) of each setting that differs, without those in ANEW."""
    old, new = used_settings(before), used_settings(now)
    return [(name, old[name], value) for name, value in new.items() if name in old and value != old[name]]


def used_settings(config: Config) -> dict[str, Any]:
    """All settings in use by name, without those in ANEW, and without those of an optimizer that is not installed."""
    sections = [*config.sections.values(), *config.chosen.values()]
    used = {name: value for one in sections for name, value in asdict(one).items() if name not in ANEW}
    if config.optimization.optimizer in ALL_OPTIMIZERS:
        used |= find_optimizer(config.optimization.optimizer).chosen(config.optimization)
    used["dataset"] = Path(used["dataset"]).name
    return {name: value for name, value in used.items() if value is not None}
