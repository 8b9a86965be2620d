"""Help of the commands: options in groups, each with its text, choices and default, wrapped to the terminal."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from textwrap import wrap
from typing import Any

from psmpi.config.options import REQUIRED, Option, argument_options, sentences, settings_options
from psmpi.config.tasks import DESCRIBED, Group, all_groups, basic_groups
from psmpi.config.tree import FILE, Config
from psmpi.errors import counted
from psmpi.output import HELP_WIDTH, Stream, styled

# The words that ask for help.
SHORT, LONG = ("-h", "--help"), "--help-all"
# Column in which texts begin, the most columns of a line, and the characters that a last line has at least.
COLUMN, WIDEST, ORPHAN = 24, 100, 12
# The stand-in of a space at which no line is broken; length of the longest default that uses it.
HARD, LONGEST = "\0", 32
COLOURS = {"title": "\x1b[1m", "option": "\x1b[36m"}
RESET = "\x1b[0m"
PLAIN: Mapping[str, str] = {}

TRAINING = (
    "Train a neural network on one process, or on several ranks under mpirun or srun. Each rank computes the parts of "
    "the loss that the training method gives it."
)
EXAMPLES = (
    ("{}", "the embedded digits, on one process"),
    ("mpirun -n 4 {} --dataset my.csv --keep-best", "a table, on four ranks"),
    ("{} --out runs/first --resume auto", "continue the run in a folder"),
)
CONFIG = Option("config", "FILE", FILE, "")
HELP = Option("help", "", "Show this help.", False)
BASIC = Option("help", "", "Show the options that most people need.", False)
ALL = Option("help_all", "", "Show all options, with every choice.", False)


@dataclass(frozen=True)
class Page:
    """A help text: usage, paragraphs on what the command does, examples, groups of options, paragraphs at the end.

    examples: (command, its comment). long: whether options have their whole text, and every choice a line.
    """

    usage: str
    about: Sequence[str]
    groups: Sequence[Group]
    end: Sequence[str] = ()
    examples: Sequence[tuple[str, str]] = ()
    long: bool = False


def wants_help(words: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return not {*SHORT, LONG}.isdisjoint(words)


def show(page: Page) -> None:
    """Print a page in the width of the terminal, WIDEST columns at most, with colours on a terminal only."""
    width = min(WIDEST, max(HELP_WIDTH, shutil.get_terminal_size().columns))
    stream = Stream(sys.stdout)
    colours = COLOURS if styled(stream) and not os.environ.get("NO_COLOR") else {}
    for line in lines_of(page, width, colours):
        stream.write(f"{line}\n")
    stream.flush()


def lines_of(page: Page, width: int, colours: Mapping[str, str] = PLAIN) -> Iterator[str]:
    """The lines of a page; colours: codes for terminals, by the kind of a text."""
    yield from _wrapped(f"usage: {page.usage}", width, after="    ")
    for text in page.about:
        yield from ("", *_wrapped(text, width))
    if page.examples:
        yield from ("", _coloured("Examples", "title", colours))
    for command, what in page.examples:
        line = f"  {command}  # {what}"
        yield from [line] if len(line) <= width else [f"  # {what}", f"  {command}"]
    for group in page.groups:
        yield from ("", _coloured(group.title, "title", colours))
        if group.about:
            yield from _wrapped(group.about, width, before="  ", after="    ")
        for one in group.options:
            yield from option_lines(one, width, page.long, colours)
    for text in page.end:
        yield from ("", *_wrapped(text, width))


def option_lines(one: Option, width: int, long: bool, colours: Mapping[str, str] = PLAIN) -> Iterator[str]:
    """The lines of an option: its words, its text with the default, and each choice."""
    described = {name: text for name, text in one.choices.items() if text} if long or one.name in DESCRIBED else {}
    text = one.text if long else one.summary
    if one.only and not described:
        first, *others = sentences(text)
        text = " ".join([f"{first.removesuffix('.')}: {', '.join(one.choices)}.", *others])
    if one.default_text:
        default = f"(default: {one.default_text})"
        default = default.replace(" ", HARD) if len(default) <= LONGEST else default
        text = f"{text.removesuffix('.')} {default}"
    elif one.default is REQUIRED:
        text = f"{text.removesuffix('.')} (required)"
    elif len(sentences(text)) == 1:
        text = text.removesuffix(".")
    yield from _beside("  ", one.words, text, width, colours)
    for name, line in described.items():
        yield from _beside("      ", name, line, width, colours)


def _beside(indent: str, head: str, text: str, width: int, colours: Mapping[str, str]) -> Iterator[str]:
    """A text in the right column, with its head in the left column, or above if the head is too long."""
    lines, room = _wrapped(text, width, before=COLUMN * " "), COLUMN - len(indent) - len(head)
    head = f"{indent}{_coloured(head, 'option', colours)}"
    if room < 2 or not lines:
        yield head
    else:
        yield f"{head}{room * ' '}{lines.pop(0)[COLUMN:]}"
    yield from lines


def _coloured(text: str, kind: str, colours: Mapping[str, str]) -> str:
    return f"{colours[kind]}{text}{RESET}" if colours else text


def _wrapped(text: str, width: int, before: str = "", after: str | None = None) -> list[str]:
    """The lines of a paragraph, somewhat narrower if the last line would be a single short word."""

    def within(columns: int) -> list[str]:
        return wrap(
            text,
            columns,
            initial_indent=before,
            subsequent_indent=before if after is None else after,
            break_long_words=False,
            break_on_hyphens=False,
        )

    lines = within(width)
    for less in range(1, 2 * ORPHAN):
        narrower = within(width - less)
        if len(lines) < 2 or len(lines[-1].strip()) >= ORPHAN or len(narrower) > len(lines):
            break
        lines = narrower
    return [line.replace(HARD, " ") for line in lines]


def training_page(program: str, *, config: Config, long: bool = False, method: str = "") -> Page:
    """The help of a training; config: its settings are the defaults.

    method: name of the method that the command line or a file gives, whose options the short help has too; "" for none.
    """
    if long:
        groups = _training_groups(config)
        end = (
            "--no-NAME takes a switch --NAME back that a file or the resumed run has. "
            "Every option is a setting of --config FILE too."
        )
    else:
        groups = _with_common(basic_groups(config, method), BASIC, ALL)
        total = counted(sum(len(group.options) for group in _training_groups(config)), "option")
        end = (
            f"{program} {LONG} shows all {total} and every choice. "
            f"{program} --method NAME --help adds the options of a method."
        )
    examples = [(command.format(program), what) for command, what in EXAMPLES]
    return Page(f"{program} [OPTIONS]", [TRAINING], groups, [end], examples, long)


def _training_groups(config: Config) -> list[Group]:
    return _with_common(all_groups(config), BASIC, ALL)


def _with_common(groups: Iterable[Group], *last: Option) -> list[Group]:
    """Groups of a training, with --config first in that of the run's files and others first in that of the screen."""
    first = {"Run": (CONFIG,), "Screen": last}
    return [Group(one.title, [*first.get(one.title, ()), *one.options], one.about) for one in groups]


def command_page(kind: Any, program: str, long: bool) -> Page:
    """The help of a command, from the dataclass of its options or the function that runs it.

    A function that takes a training's options has the configuration of their defaults as its attribute `training`.
    """
    doc = (inspect.getdoc(kind) or "").partition("\nArgs:\n")[0]
    about = [" ".join(text.split()) for text in doc.split("\n\n") if text.strip()]
    settings: Any = kind if is_dataclass(kind) else None
    options = argument_options(kind) if settings is None else list(settings_options(settings).values())
    options.sort(key=lambda one: not one.positional)
    usage = " ".join([program, "[OPTIONS]", *(one.words for one in options if one.positional)])
    config = getattr(kind, "training", None)
    if config is None:
        return Page(usage, about, [Group("Options", [*options, HELP])], long=True)
    own = Group("Options", [*options, BASIC, ALL])
    if long:
        return Page(usage, about, [own, *_with_common(all_groups(config))], long=True)
    end = f"The options of psmpi train belong to this command too: {program} {LONG} shows them."
    return Page(usage, about, [own], [end], long=True)


def commands_page(commands: Iterable[Callable[..., Any]], program: str, description: str) -> Page:
    """The help of a command that has commands below it: one line or more on each."""
    options = [
        Option(name, name, (inspect.getdoc(one) or "").partition("\n")[0], False, positional=True)
        for one in commands
        for name in [one.__name__.rstrip("_")]
    ]
    end = f"{program} COMMAND --help shows the options of a command."
    return Page(f"{program} COMMAND [OPTIONS]", [description], [Group("Commands", options)], [end], long=True)
