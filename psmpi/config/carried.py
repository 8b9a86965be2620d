"""Settings that a run which goes on carries over, and those that differ from the ones it had."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from psmpi.config.sections import NetworkSettings, Optimization
from psmpi.config.tree import Config
from psmpi.optim import find_optimizer, unused_settings
from psmpi.registry import all_methods, find_method

# Where things are, and what is said anew at each start.
ANEW = ("data_dir", "max_steps", "new_data", "out", "resume")


def without_unused(config: Config, base: Config) -> Config:
    """`config` without the settings of `base` that its own method, optimizer, schedule and network do not use.

    Of a run that goes on in another way, nobody gave these settings: they are as by default. Those that differ from
    `base` were given, and stay.
    """
    method = config.parallel.method
    if method not in all_methods():
        return config
    kind, o, before = find_method(method), config.optimization, base.optimization
    settings = {one: of for one, of in config.settings.items() if one in kind.settings or of != base.of(one)}
    usual, used = Optimization(), kind.uses(config)
    names = [one.setting for one in unused_settings(o.optimizer, o.schedule, vars(o)) if one.setting not in used]
    if find_optimizer(o.optimizer).needs_closure:
        names.append("clip")
    if o.optimizer != before.optimizer:
        # A rate is one for an optimizer.
        names.append("lr")
    o = replace(o, **{name: getattr(usual, name) for name in names if getattr(o, name) == getattr(before, name)})
    model, parallel = config.model, config.parallel
    if model.model != base.model.model:
        plain, theirs = vars(NetworkSettings()), vars(base.model)
        names = [name for name in ("widths", "blocks", "layers") if vars(model)[name] == theirs[name]]
        model = replace(model, **{name: plain[name] for name in names})
    if parallel.nccl and base.parallel.nccl and not kind.nccl:
        parallel = replace(parallel, nccl=False)
    return replace(config, optimization=o, model=model, parallel=parallel, settings=settings)


def changes(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """The settings that differ, but for what each start says anew: name, value before, value now."""
    old, new = _values(before), _values(now)
    return [(name, old[name], value) for name, value in new.items() if name in old and value != old[name]]


def _values(config: Config) -> dict[str, Any]:
    """All settings that are used, by name, with the numbers that stand for what is not given."""
    sections = [*config.sections.values(), *config.chosen.values()]
    found = {name: value for one in sections for name, value in asdict(one).items() if name not in ANEW}
    found |= find_optimizer(config.optimization.optimizer).chosen(config.optimization)
    found["dataset"] = Path(found["dataset"]).name
    return {name: value for name, value in found.items() if value is not None}
