"""What a person sees: lines, tables and a progress bar on standard output, whatever that is and whoever reads it.

A file gets no escape codes, a terminal without Unicode plain ASCII. Where nothing can be written any more, a command
that only looks ends as other Unix tools do, and training goes on.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast
from weakref import WeakSet

from psmpi.errors import UserError
from psmpi.launcher import columns_of, reads_output, shown_on

if TYPE_CHECKING:
    from rich.progress import Progress

# The exit status of a command whose reader has gone: what a shell shows for a tool that SIGPIPE ended.
CLOSED = 141

# Columns of output that is no terminal, where nothing is to be cut, those that a terminal has at least, and those that
# help has at least: on fewer, words are broken.
WIDE, NARROW, HELP_WIDTH = 10_000, 40, 60

# What stands for characters that an encoding lacks.
PLAIN = {"•": "-", "…": "...", "×": "x", "–": "-", "—": "-", "“": '"', "”": '"', "‘": "'", "’": "'"}

# Characters of codes for terminals, and of such as turn the direction of a text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

# Errors after which a stream may take more later: no space, or not at this moment.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)

# Streams that have lost something that training printed, which is said once of each.
_lost: WeakSet[Any] = WeakSet()


class ClosedError(Exception):
    """Whoever read the output has seen enough."""


def printable(text: str) -> str:
    """A text without control characters but tabs and ends of lines: names in files may bring codes for terminals."""
    return CONTROLS.sub(lambda one: one[0].encode("unicode_escape").decode(), text)


def tell(text: str) -> None:
    """Print a line, with the errors of `Stream`."""
    stream = Stream(sys.stdout)
    stream.write(f"{printable(text)}\n")
    stream.flush()


def complain(text: str) -> None:
    """Print a line to standard error, if that can be."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # There is nobody left to tell.
        return


def legible(text: str) -> str:
    """A text that UTF-8 can hold: a file name's bytes that Python could not decode are UTF-8, or are replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Stream:
    """A text stream that raises ClosedError where its reader has gone, UserError where it cannot be written.

    goes_on: what goes on where these are no reason to end.
    """

    def __init__(self, stream: Any, goes_on: str = "") -> None:
        self.stream: Any = stream.stream if isinstance(stream, Stream) else stream
        self.goes_on = goes_on

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return not self.stream.closed and bool(self.stream.isatty())

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except (OSError, ValueError) as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def _fail(self, error: OSError | ValueError) -> None:
        if isinstance(error, ValueError) and not self.stream.closed:
            raise error
        if not (isinstance(error, OSError) and error.errno in PASSING):
            _discard(self.stream)
        if not self.goes_on:
            if isinstance(error, BrokenPipeError):
                raise ClosedError from None
            raise UserError(f"standard output: {_reason(error)}; send it elsewhere") from None
        if self.stream not in _lost:
            _lost.add(self.stream)
            complain(f"psmpi: warning: standard output: {_reason(error)}; lines are lost, {self.goes_on}")


class Screen:
    """Standard output for lines and tables.

    quiet: print nothing. goes_on: as of `Stream`. bar: whether `bar` shows one; None: on terminals.
    """

    def __init__(self, *, quiet: bool = False, goes_on: str = "", bar: bool | None = None) -> None:
        from rich.console import Console

        class Plain(Console):
            """A console whose texts have no control characters; those of styles are not texts."""

            def render(self, renderable: Any, options: Any = None) -> Iterator[Any]:
                for segment in super().render(renderable, options):
                    yield segment if segment.control else segment._replace(text=printable(segment.text))

        stream: Any = Stream(sys.stdout, goes_on)
        self.styled, self.behind = (False, "") if quiet else (styled(stream), terminal_behind(stream))
        seen = self.styled and bool(stream.isatty() or self.behind)
        self.live = not quiet and (seen if bar is None else bar)
        # Names in files may look like markup, or like :names: of pictures.
        self.console = Plain(
            file=stream,
            quiet=quiet,
            force_terminal=self.styled or self.live,
            no_color=not self.styled or None,
            markup=False,
            emoji=False,
        )
        # A program that is killed could not show it again.
        vars(self.console)["show_cursor"] = lambda show=True: False
        if not (stream.isatty() or self.behind):
            self.console.width = shutil.get_terminal_size().columns if self.live else WIDE
        elif self.console.width < NARROW:
            self.console.width = NARROW
        self.fit()

    @property
    def ascii(self) -> bool:
        """Whether the output takes ASCII alone."""
        return self.console.options.ascii_only

    def tell(self, text: str, style: str | None = None) -> None:
        """Print a line as it is."""
        self.console.print(text, style=style, highlight=False, soft_wrap=True)

    def print(self, *things: Any, **options: Any) -> None:
        """Print tables, trees and the like, as rich's Console does, but cut no word: a narrow terminal breaks lines."""
        room = self.console.options.update(width=WIDE)
        for one in things:
            # A line of text breaks anywhere.
            least = 0 if isinstance(one, str) else self.console.measure(one, options=room).minimum
            if least > self.console.width:
                self.console.width = least
        self.console.print(*things, **options)

    def bar(self) -> Progress:
        """A progress bar in steps: words before it, the text `pace` after it."""
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[pace]}"))
        return Progress(*columns, console=self.console, transient=True, disable=not self.live, expand=True)

    def fit(self) -> None:
        """Take the width that the terminal behind a launcher has by now."""
        if self.behind:
            self.console.width = max(NARROW, columns_of(self.behind))


def terminal_behind(stream: Any, environ: Mapping[str, str] = os.environ) -> str:
    """The terminal on which a launcher shows what a stream gets, as of `psmpi.launcher.shown_on`."""
    if not reads_output(environ):
        return ""
    try:
        return shown_on(stream.fileno())
    except (OSError, ValueError):
        return ""


def styled(stream: Any, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream gets colours: a person's terminal does, and anything by FORCE_COLOR, but no TERM=dumb.

    What a launcher reads, through a pseudo-terminal too, may end in a file: only where it is seen to show it on a
    terminal does it get any.
    """
    kind = environ.get("TERM", "").lower()
    if kind in ("dumb", "unknown"):
        return False
    if environ.get("FORCE_COLOR"):
        return True
    shown = bool(terminal_behind(stream, environ)) if reads_output(environ) else stream.isatty()
    return bool(kind and shown)


@contextmanager
def prepared() -> Iterator[None]:
    """Standard streams that raise no UnicodeError, whatever prints; standard output is a `Stream` meanwhile."""
    _open_closed()
    codecs.register_error("psmpi", _plain)
    given, made = sys.stdout, Stream(sys.stdout)
    changed = [(one, one.errors) for one in (given, sys.stderr) if isinstance(one, io.TextIOWrapper)]
    for one, _ in changed:
        one.reconfigure(errors="psmpi")
    sys.stdout = cast(Any, made)
    try:
        yield
    finally:
        if sys.stdout is made:
            sys.stdout = given
        for one, errors in changed:
            if not one.closed:
                one.reconfigure(errors=errors)


def dress_help() -> None:
    """No escape codes from tyro, which prints help to one stream and errors to the other, where one is no terminal."""
    plain = os.environ.get("NO_COLOR") or not (styled(sys.stdout) and styled(sys.stderr))
    if plain and "tyro" in sys.modules:
        sys.modules["tyro"]._experimental_options["ansi_codes"] = False


@contextmanager
def wide_help() -> Iterator[None]:
    """At least HELP_WIDTH columns for what tyro prints, however narrow the terminal is."""
    given = shutil.get_terminal_size
    if given().columns >= HELP_WIDTH:
        yield
        return
    # Tyro asks this function alone. COLUMNS would be seen by tables and by processes that a command starts.
    shutil.get_terminal_size = lambda fallback=(80, 24): os.terminal_size((HELP_WIDTH, given(fallback).lines))
    try:
        yield
    finally:
        shutil.get_terminal_size = given


def finish(status: int) -> int:
    """Write what still waits to be; the exit status, which is another one where that cannot be."""
    stream = Stream(sys.stdout)
    try:
        stream.stream.flush()
    except (OSError, ValueError) as error:
        _discard(stream.stream)
        if stream.stream not in _lost and isinstance(error, BrokenPipeError):
            status = CLOSED
        elif stream.stream not in _lost:
            complain(f"psmpi: error: standard output: {_reason(error)}; send it elsewhere")
            status = status or 1
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        _discard(sys.stderr)
    return status


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """In place of a character that an encoding lacks: one like it, else its number; a file name's bytes as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return PLAIN.get(character, character.encode("ascii", "backslashreplace").decode()), error.start + 1


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _discard(stream: IO[str]) -> None:
    """Let what a stream still gets, and what waits in its buffer, go nowhere."""
    try:
        number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError):
        return
    os.dup2(nowhere, number)
    os.close(nowhere)


def _open_closed() -> None:
    """Open standard streams that are closed, to nowhere: a file would get their numbers, and what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python has none in the place of those that were closed when it started.
    given: tuple[Any, Any] = (sys.stdout, sys.stderr)
    nowhere = [None if stream is not None else open(os.devnull, "w") for stream in given]  # noqa: SIM115
    sys.stdout, sys.stderr = given[0] or nowhere[0], given[1] or nowhere[1]


def check_files(plot: str = "", **others: str) -> None:
    """UserError where a picture `plot`, or a file of another option by its name, could not be written in the end."""
    for option, name in {**others, "plot": plot}.items():
        if name and not Path(name).absolute().parent.is_dir():
            raise UserError(f"--{option} {name}: there is no such folder as {Path(name).parent}")
        if name and Path(name).is_dir():
            raise UserError(f"--{option} {name}: expected the name of a file, and this is a folder")
    if plot:
        if Path(plot).suffix not in (".png", ".pdf", ".svg"):
            raise UserError(f"--plot {plot}: expected a name that ends in .png, .pdf or .svg")
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install 'psmpi[plot]'") from None
