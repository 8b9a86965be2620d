"""Command line of psmpi: `psmpi COMMAND ...`, or `python -m psmpi COMMAND ...`.

A program that registers classes of its own calls `main`, and has the same commands: `python mine.py train`.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, redirect_stderr, suppress
from functools import partial, wraps
from importlib import import_module
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from psmpi.launcher import announced_rank, announced_size
from psmpi.output import dress_help, wide_help

if TYPE_CHECKING:
    from psmpi.config import Config
    from psmpi.config.help import Page

# Module whose `main` takes the remaining words, and what the command does.
COMMANDS = {
    "train": ("psmpi.train", "Train a partitioned network, on one process or under mpirun."),
    "plan": ("psmpi.plan", "Say what a training would be on so many ranks: memory, bytes and time of a step."),
    "predict": ("psmpi.predict", "Predict from a checkpoint, on one process or under mpirun."),
    "inspect": ("psmpi.inspect.__main__", "Show, compare, verify, export, cut and join checkpoints."),
    "plot": ("psmpi.plot", "Draw the curves of training runs."),
    "doctor": ("psmpi.doctor.__main__", "Say what of machine, MPI and ranks is good, and how to mend the rest."),
    "submit": ("psmpi.submit.__main__", "Write and submit jobs of a cluster that train."),
    "bench": ("psmpi.bench.__main__", "Measure computing, networks, memory, checkpoints and published accuracies."),
}


# The program that has called `main`; "" for psmpi itself.
_script = ""


def _is_script(path: str) -> bool:
    """Whether the file that Python was started with is a program outside psmpi."""
    return path.endswith(".py") and Path(path).absolute().parent != Path(__file__).absolute().parent


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` (`sys.argv[1:]` if not given) names; return its exit status, 1 for an unknown one."""
    global _script
    words = sys.argv[1:] if argv is None else argv
    _script = sys.argv[0] if argv is None and _is_script(sys.argv[0]) else ""
    if words and words[0] in COMMANDS:
        module, _ = COMMANDS[words[0]]
        try:
            return int(import_module(module).main(words[1:]))
        except ModuleNotFoundError as missing:
            error = missing
            return answer(lambda: _raise(error))
    return answer(lambda: _answer(words))


def _raise(error: Exception) -> int:
    raise error


def answer(command: Callable[[], int]) -> int:
    """Run a command that starts no MPI; return its exit status, 1 after a message about a wrong option."""
    from psmpi.comm.world import run

    def go() -> int:
        try:
            return command()
        except SystemExit as end:
            return 1 if end.code else 0

    return run(go)


def answer_help(parse: Callable[[], Any]) -> int:
    """The exit status of a command whose words ask for help; parse: prints the help, as `parsed` does, without MPI."""
    return answer(lambda: int(parse() is None))


def with_training_options(work: Callable[..., int], default: Config, words: Sequence[str]) -> Callable[..., int]:
    """Return a command that takes the options of training and those of `work`.

    The options of training become the first argument of `work`, a Config. default: configuration with the defaults of
    these options, such as that of a TOML file; words: the words of the command line.
    """
    from psmpi.config import check, command_line, from_command_line, given, given_names
    from psmpi.errors import layers_in
    from psmpi.training.usual import usual

    tree = command_line(default)
    by_default = tree()

    def command(config: Any = by_default, **more: Any) -> int:
        parsed_config = from_command_line(config)
        check(parsed_config, given_names(words, file=False))
        with layers_in(given(words, "--config")):
            return work(usual(parsed_config), **more)

    command.__name__, command.__doc__ = work.__name__, work.__doc__
    # For the help.
    vars(command)["training"] = default
    first, *others = signature(work).parameters.values()
    command.__annotations__ = {**work.__annotations__, "config": tree}
    command.__signature__ = Signature([first.replace(default=by_default), *others])  # type: ignore[attr-defined]
    return command


def parsed(
    kind: Any, words: Sequence[str], name: str, page: Callable[..., Page] | None = None, quiet: bool = False
) -> Any:
    """Parse `words` for `kind`: return an instance of a dataclass, or the result of a function called with them.

    name: the command's name, as `program` takes it. page(program, long=...): the help, made from `kind` if None. quiet:
    print no error. Raises SystemExit as argparse does, with status 0 after help.
    """
    from psmpi.config.help import LONG, command_page, wants_help

    if wants_help(words):
        long = LONG in words
        _show(page(program(name), long=long) if page is not None else command_page(kind, program(name), long))
    import tyro

    config = (tyro.conf.OmitArgPrefixes,)
    # tyro prints errors in values even with console_outputs=False.
    with wide_help(), redirect_stderr(io.StringIO()) if quiet else nullcontext():
        return tyro.cli(kind, prog=program(name), args=words, config=config)


def training_options(start: Config, words: Sequence[str], method: str = "") -> Config:
    """The configuration `start` with the options of a command line. method: the method of the help, "" for all.

    Raises SystemExit as argparse does.
    """
    from psmpi.config import Config, command_line, few_options, from_command_line, from_few_options, given_names
    from psmpi.config.help import training_page, wants_help
    from psmpi.config.unknown import tables_of, unknown_options

    if not wants_help(words):
        # The parser of all options has the messages, but takes its time.
        with suppress(SystemExit):
            return from_few_options(
                parsed(few_options(start, given_names(words, file=False)), words, "train", quiet=True), start
            )
    try:
        tree = parsed(command_line(start), words, "train", partial(training_page, config=start, method=method))
    except SystemExit as end:
        for hint in unknown_options(words, tables_of(Config())) if end.code else ():
            print(f"psmpi.train: {hint}", file=sys.stderr)
        raise
    return from_command_line(tree)


def chosen(
    commands: Iterable[Callable[..., int]], words: Sequence[str], name: str, description: str
) -> Callable[[], int]:
    """Parse `words` for the command that the first of them names; return a function that calls it with its options.

    name: the name of the group of commands, as `program` takes it. Raises SystemExit as argparse does.
    """
    from psmpi.config.help import LONG, command_page, commands_page, wants_help

    commands = tuple(commands)
    if wants_help(words):
        named = [command for command in commands if command.__name__.rstrip("_") == words[0]]
        if named:
            _show(command_page(named[0], f"{program(name)} {words[0]}", LONG in words))
        _show(commands_page(commands, program(name), description))
    from tyro.conf import OmitArgPrefixes
    from tyro.extras import SubcommandApp

    app = SubcommandApp()
    for command in commands:
        app.command(name=command.__name__.rstrip("_"))(_with_options(command))
    with wide_help():
        call: Callable[[], int] = app.cli(
            prog=program(name), description=description, args=words, config=(OmitArgPrefixes,)
        )
    return call


def _show(page: Page) -> NoReturn:
    """Print help, on the launcher's first rank only, and raise SystemExit."""
    from psmpi.config.help import show

    if announced_rank(os.environ) == 0:
        show(page)
    raise SystemExit(0)


def _with_options(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """Return a function with the parameters of `command` that returns a call of it: tyro calls what it parses for."""

    @wraps(command)
    def call(*positional: Any, **options: Any) -> Callable[[], int]:
        return partial(command, *positional, **options)

    return call


def program(command: str = "") -> str:
    """Words that started a command, for its help and its messages.

    `psmpi train`, `python -m psmpi train`, `python -m psmpi.train`, or `python mine.py train` of another program.
    """
    dress_help()
    if _script:
        return f"python {shlex.quote(_script)} {command}".rstrip()
    folder, file = os.path.split(sys.argv[0])
    script = file == "psmpi"
    if script or not command or (os.path.basename(folder), file) == ("psmpi", "__main__.py"):
        return f"{'psmpi' if script else 'python -m psmpi'} {command}".rstrip()
    return f"python -m psmpi.{command}"


def python_words(command: str) -> list[str]:
    """The words behind `python` that start a command from any folder: those of psmpi, or of the program."""
    return [os.path.abspath(_script), command] if _script else ["-m", f"psmpi.{command}"]


def typed(command: str, words: Iterable[str], ranks: int = 1) -> str:
    """Return a command line that starts `command` with `words` on `ranks` ranks in the way this process was started."""
    start = [program(command), *map(shlex.quote, words)]
    if ranks > 1:
        announced = announced_size(os.environ)
        start.insert(0, f"{'srun' if announced and announced[0].startswith('SLURM') else 'mpirun'} -n {ranks}")
    return " ".join(start)


def usage() -> str:
    """Help text of psmpi, with one line for each command."""
    width = max(map(len, COMMANDS))
    name = program()
    return "\n".join(
        [
            f"usage: {name} COMMAND ...",
            "",
            "Training of neural networks whose parts live on different MPI ranks.",
            "",
            *(f"  {command:{width}}  {does}" for command, (_, does) in COMMANDS.items()),
            "",
            f"  {name} COMMAND --help      lists the options of a command that most people need.",
            f"  {name} COMMAND --help-all  lists all of them.",
            f"  {name} --version           prints the version.",
        ]
    )


def _answer(words: list[str]) -> int:
    """Print help or the version on rank 0, known from the launcher's variables; UserError for an unknown command."""
    from psmpi.errors import UserError
    from psmpi.output import tell

    if not words:
        raise UserError(f"name a command: {', '.join(COMMANDS)}")
    word = words[0]
    first = announced_rank(os.environ) == 0
    if word in ("--help", "-h"):
        text = usage()
    elif word == "--version":
        from psmpi import __version__

        text = f"psmpi {__version__}"
    else:
        from difflib import get_close_matches

        near = get_close_matches(word, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"unknown command {word!r}: {hint}choose one of {', '.join(COMMANDS)}")
    if first:
        tell(text)
    return 0
