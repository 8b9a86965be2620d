"""The configuration: the sections of every run, and the settings of training methods by their class."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from tyro.conf import arg

from psmpi.config.ranges import check_ranges, hints_of, one_of, option
from psmpi.config.sections import Data, LossSettings, NetworkSettings, Optimization, Parallel, Run, unused_of_loss
from psmpi.config.terminal import Terminal, check_terminal
from psmpi.data.text import CONTEXT, is_text
from psmpi.errors import UserError, listed, unused_option
from psmpi.nn.losses import LOSSES
from psmpi.nn.margin import LARGEST
from psmpi.optim import ALL_OPTIMIZERS, find_optimizer, unused_settings
from psmpi.registry import METHODS, all_methods, find_method, method_names


class Settings(Protocol):
    """A frozen dataclass of a method's settings, of some that several methods share, or of a loss or an optimizer.

    Its docstring is the title of the help, the docstring of a field its help text. table: name of the TOML table;
    results: whether other values change weights by more than rounding, so that a resumed run reports them.
    """

    table: ClassVar[str]
    results: ClassVar[bool]
    __dataclass_fields__: ClassVar[dict[str, Any]]


S = TypeVar("S")
SECTIONS = ("data", "model", "objective", "parallel", "optimization", "run", "terminal")


@dataclass(frozen=True)
class Config:
    """The whole configuration. settings: of methods, losses and optimizers, by class, unless all are defaults."""

    data: Data = field(default_factory=Data)
    model: NetworkSettings = field(default_factory=NetworkSettings)
    objective: LossSettings = field(default_factory=LossSettings)
    parallel: Parallel = field(default_factory=Parallel)
    optimization: Optimization = field(default_factory=Optimization)
    run: Run = field(default_factory=Run)
    terminal: Terminal = field(default_factory=Terminal)
    settings: Mapping[type, Any] = field(default_factory=dict)

    def of(self, kind: type[S]) -> S:
        """The settings of class `kind`."""
        settings: S = self.settings.get(kind) or kind()
        return settings

    def changed(self, kind: type[Any], **values: Any) -> Config:
        """A copy with other values of some settings of class `kind`."""
        return self.having([replace(self.of(kind), **values)])

    def having(self, several: Iterable[Any]) -> Config:
        """A copy with `several` settings in place of those of the same classes."""
        made = {**self.settings, **{type(one): one for one in several}}
        return replace(self, settings={kind: one for kind, one in made.items() if one != kind()})

    @property
    def sections(self) -> dict[str, Any]:
        """The sections of every run by the names of their tables."""
        members = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: section for name, section in members.items() if is_dataclass(section)}

    @property
    def kinds(self) -> tuple[type[Any], ...]:
        """The classes of settings of the method, the loss and the optimizer, as far as these are installed."""
        method = METHODS.get(self.parallel.method)
        others = (LOSSES.get(self.objective.loss), ALL_OPTIMIZERS.get(self.optimization.optimizer))
        options = [one.options for one in others if one is not None and one.options is not None]
        return (*(method.settings if method is not None else ()), *options)

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings of the method, the loss and the optimizer by the names of their tables; see `kinds`."""
        return {kind.table: self.of(kind) for kind in self.kinds}


def users_of_settings() -> dict[type[Any], tuple[str, list[str]]]:
    """For each class of settings the option (--method, --loss or --optimizer) and the names that use it."""
    users: dict[type[Any], tuple[str, list[str]]] = {}
    for word, names in (("--loss", LOSSES), ("--optimizer", ALL_OPTIMIZERS)):
        for name, one in names.items():
            if one.options is not None:
                users.setdefault(one.options, (word, []))[1].append(name)
    for name, method in all_methods().items():
        for kind in method.settings:
            users.setdefault(kind, ("--method", []))[1].append(name)
    return users


def kinds_of_settings() -> dict[str, type[Any]]:
    """The classes of settings of methods, losses and optimizers, by table. UserError if two share a table."""
    tables: dict[str, type[Any]] = {}
    for kind, (word, names) in users_of_settings().items():
        if tables.setdefault(kind.table, kind) is not kind or kind.table in SECTIONS:
            raise UserError(f"{word} {names[0]} has a table [{kind.table}], which is there already: it needs another")
    return tables


def check(config: Config, said: Collection[str] = ()) -> None:
    """UserError for a value that is invalid with any data and ranks, and for a setting that nothing uses.

    said: names of settings on the command line, which must be used even if they have their default values.
    """
    method = config.parallel.method
    find_method(method)
    LOSSES.find(config.objective.loss)
    find_optimizer(config.optimization.optimizer)
    chosen = {
        "--method": method, "--loss": config.objective.loss, "--optimizer": config.optimization.optimizer
    }  # fmt: skip
    for kind, (choice, users) in users_of_settings().items():
        one = config.of(kind)
        for name in (f.name for f in fields(one)) if kind not in config.kinds else ():
            if name in said or getattr(one, name) != getattr(kind(), name):
                raise unused_option(_word(name, said), choice, users, chosen[choice])
    for section in (*config.sections.values(), *config.settings.values()):
        check_ranges(section)
    check_terminal(config.terminal)
    run, model, o, parallel = config.run, config.model, config.optimization, config.parallel
    loss = config.objective
    if o.lr is not None and not o.lr > 0:
        raise UserError(f"--lr {o.lr}: expected a number above 0")
    if not 0 < model.init_gain <= 1e3:
        raise UserError(f"--init-gain {model.init_gain}: expected a number above 0 and up to 1000")
    _check_used(config, said)
    if o.history > 1000:
        raise UserError(f"--history {o.history}: expected 1000 pairs at most")
    if not is_text(config.data.dataset) and ("context" in said or config.data.context != CONTEXT):
        raise UserError(
            f"--context {config.data.context} is an option of texts (--dataset FILE.txt), and this run has --dataset "
            f"{config.data.dataset}: leave it out"
        )
    sized = (
        "mlp",
        "head",
        "resnet",
        "deep",
        "deep-conv",
        "radix",
        "rnn",
        "gru",
        "lstm",
        "transformer",
        "factors",
        "slabs",
    )
    if model.widths and model.model not in sized:
        raise UserError(f"--widths are those of --model {listed(sized)}; --model {model.model} has its own")
    if not 0 < model.final_time <= 1e6:
        raise UserError(f"--final-time {model.final_time:g}: expected a number above 0, up to 1e6")
    if not 0 <= model.scale <= 1e6:
        raise UserError(
            f"--scale {model.scale:g}: expected a number above 0 up to 1e6, usually 16 to 64, or 0 for none"
        )
    if not 0 <= loss.margin <= LARGEST[loss.margin_kind]:
        what = "an angle from 0 to pi/2" if loss.margin_kind == "arcface" else "a number from 0 to 2"
        raise UserError(f"--margin {loss.margin:g}: expected {what} with --margin-kind {loss.margin_kind}")
    if not loss.margin and ("margin_kind" in said or loss.margin_kind != LossSettings().margin_kind):
        raise UserError("--margin-kind is of a margin: add --margin 0.5, or leave it out")
    if not o.clip >= 0:
        raise UserError(f"--clip {o.clip}: expected 0 (no clipping) or a number above it")
    if run.on_nan == "skip" and not find_method(method).skips:
        raise UserError(
            f"--on-nan skip: --method {method} cannot leave out a single step; use --on-nan rollback, or stop"
        )
    if run.on_nan == "rollback" and not find_optimizer(o.optimizer).rated:
        raise UserError(
            f"--on-nan rollback halves the learning rate, and --optimizer {o.optimizer} has none; use --on-nan skip"
        )
    if not 0 <= run.checkpoint_gzip <= 9:
        raise UserError(f"--checkpoint-gzip {run.checkpoint_gzip}: expected 0 (none) to 9")
    for name in ("stall_warn", "stall_abort"):
        if getattr(run, name) < 0:
            raise UserError(f"{option(name)} {getattr(run, name):g}: expected 0 or a number of seconds")
    if 0 < run.stall_abort <= run.stall_warn:
        raise UserError(
            f"--stall-abort {run.stall_abort:g} is to be more than --stall-warn {run.stall_warn:g}, after which it is "
            "told who is waited for: give more, or 0 to wait for ever"
        )
    if parallel.compute != "float32" and model.dtype != "float32":
        raise UserError(
            f"--compute {parallel.compute} is for float32 weights, not --dtype {model.dtype}: leave one out"
        )
    if parallel.convolution != "own" and parallel.compute not in ("float32", "tf32"):
        raise UserError(
            f"--convolution {parallel.convolution} computes with float32 and tf32, not --compute "
            f"{parallel.compute}: leave one out"
        )
    if parallel.threads > 1024:
        raise UserError(f"--threads {parallel.threads}: expected 1024 at most")
    if parallel.nccl and not find_method(method).nccl:
        raise unused_option("--nccl", "--method", [name for name, known in all_methods().items() if known.nccl], method)


def _word(name: str, said: Collection[str]) -> str:
    """The option of a setting: --no-NAME if that one is among `said`, else --NAME."""
    return option(f"no_{name}" if f"no_{name}" in said else name)


def _check_used(config: Config, said: Collection[str]) -> None:
    """UserError for a setting that neither the chosen optimizer, schedule and loss nor the method use."""
    o, method = config.optimization, find_method(config.parallel.method)
    used = method.uses(config)
    for one in unused_settings(o.optimizer, o.schedule, vars(o), said):
        if one.setting not in used:
            chosen = getattr(o, one.choice)
            raise unused_option(_word(one.setting, said), f"--{one.choice}", one.users, chosen)
    loss = config.objective
    for name in sorted(unused_of_loss(loss)):
        if name in said or getattr(loss, name) != getattr(LossSettings(), name):
            users = [known for known, kind in LOSSES.items() if name in kind.settings]
            raise unused_option(option(name), "--loss", users, loss.loss)
    weights = loss.psl_weights
    if weights != "none" and find_optimizer(o.optimizer).needs_closure:
        raise UserError(
            f"{option('psl_weights')} {weights} weighs samples anew in each step, and --optimizer {o.optimizer} "
            "compares the values of one objective: use another optimizer (adam, sgd, ...), or --loss nll"
        )
    if weights == "remembered" and not method.remembers:
        users = [name for name, known in all_methods().items() if known.remembers]
        words, instead = f"{option('psl_weights')} {weights}", f"use {option('psl_weights')} current, or --loss nll"
        raise unused_option(words, "--method", users, config.parallel.method, instead)
    given = o.clip != Optimization().clip or "clip" in said
    if o.clip and given and find_optimizer(o.optimizer).needs_closure:
        raise UserError(f"--clip {o.clip} is not for --optimizer {o.optimizer}, which bounds its steps: leave it out")


FILE = "TOML file of settings. Options on the command line override it."
_FILE: Any = Annotated[str, arg(metavar="FILE.toml", help=FILE)]


def command_line(default: Config) -> Any:
    """A tree of dataclasses from which tyro makes the parser, with defaults; see `from_command_line`."""
    # Before the parser, whose messages are less clear.
    find_method(default.parallel.method)
    LOSSES.find(default.objective.loss)
    find_optimizer(default.optimization.optimizer)
    sections: dict[str, Any] = {name: _with_choices(section) for name, section in default.sections.items()}
    # Layers have no option: they come from tables of a file.
    layers, sections["model"] = default.model.layers, replace(default.model, layers=())
    last = {name: sections.pop(name) for name in ("optimization", "run", "terminal")}
    for table, settings in kinds_of_settings().items():
        sections[table] = default.of(settings)
    sections.update(last)
    _check_names(sections)
    given: list[Any] = [
        # Without a help text, tyro looks for one in the source.
        (name, type(value), field(default_factory=partial(replace, value), metadata={"help": name}))
        for name, value in sections.items()
    ]
    return make_dataclass("Options", [*given, ("config", _FILE, "")], frozen=True, namespace={"layers": layers})


def _check_names(sections: Mapping[str, Any]) -> None:
    """UserError if two tables have a setting of the same name, since a name is one option."""
    owners: dict[str, str] = {}
    for table, section in sections.items():
        for one in fields(section):
            if owners.setdefault(one.name, table) != table:
                raise UserError(
                    f"the setting {one.name} of [{table}] is one of [{owners[one.name]}] too: give it another name"
                )


def _with_names(name: str, hint: Any) -> Any:
    """The type of a setting; the choices of one that names a method, or an entry of a registry, are the present names.

    name, hint: name and type of the setting.
    """
    registry = one_of(hint)
    if registry is not None:
        choice: Any = Literal[registry.names]
        return Annotated[choice, registry]
    # All names, also of methods that cannot be imported: `check` reports these.
    return Literal[tuple(method_names())] if name == "method" else hint


def _with_choices(section: Any) -> Any:
    """A copy of a section whose settings have the types of `_with_names`."""
    typed = ((name, hint, _with_names(name, hint)) for name, hint in hints_of(section).items())
    chosen = [(name, with_names) for name, hint, with_names in typed if with_names is not hint]
    if not chosen:
        return section
    kind = type(section)
    made: Any = make_dataclass(kind.__name__, chosen, bases=(kind,), frozen=True, namespace={"__doc__": kind.__doc__})
    return made(**vars(section))


def from_command_line(tree: Any) -> Config:
    """The configuration in a tree of `command_line`."""
    # Back from classes with choices to the plain ones.
    sections = {name: type(plain)(**vars(getattr(tree, name))) for name, plain in Config().sections.items()}
    sections["model"] = replace(sections["model"], layers=tree.layers)
    return Config(**sections).having(getattr(tree, table) for table in kinds_of_settings())


def few_options(default: Config, names: Collection[str]) -> Any:
    """A dataclass of the settings in `names` alone, with defaults; see `from_few_options`. Other names are ignored.

    The time in which tyro makes a parser grows with the number of settings.
    """
    chosen: list[Any] = [("config", _FILE, "")]
    for section in (*default.sections.values(), *map(default.of, kinds_of_settings().values())):
        hints = hints_of(section)
        for one in fields(section):
            if one.name not in names or one.name == "layers":
                continue
            value = field(default=getattr(section, one.name), metadata={"help": one.name})
            chosen.append((one.name, _with_names(one.name, hints[one.name]), value))
    return make_dataclass("Options", chosen, frozen=True)


def from_few_options(options: Any, default: Config) -> Config:
    """The configuration `default` with the settings of an instance of `few_options`."""
    values = vars(options)

    def changed(section: Any) -> Any:
        return replace(section, **{one.name: values[one.name] for one in fields(section) if one.name in values})

    config = replace(default, **{name: changed(section) for name, section in default.sections.items()})
    return config.having(changed(default.of(kind)) for kind in kinds_of_settings().values())
