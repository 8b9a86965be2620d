"""Output for people: lines, tables and a progress bar on standard output.

A file gets no escape codes, and a terminal without Unicode gets plain ASCII. When standard output can no longer be
written, a command that only prints ends as other Unix tools do, and training goes on.
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

# Exit status of a command whose output is no longer read: the status that a shell shows for a tool ended by SIGPIPE.
CLOSED = 141

# Columns of output to a file, where nothing is cut; least columns of a terminal; least columns of help, below which
# words would be broken.
WIDE, NARROW, HELP_WIDTH = 10_000, 40, 60

# Replacements for characters that an encoding lacks.
PLAIN = {"•": "-", "…": "...", "×": "x", "–": "-", "—": "-", "“": '"', "”": '"', "‘": "'", "’": "'"}

# Control characters for terminals, and characters that change the direction of text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

# Errors after which a later write may succeed: no space, no quota, or try again.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)

# Streams that have lost lines of a training; each prints one warning.
_lost: WeakSet[Any] = WeakSet()


class ClosedError(Exception):
    """The reader of standard output has closed it, as `head` does."""


def printable(text: str) -> str:
    """Escape control characters in a text, except tabs and newlines: names in files may contain terminal codes."""
    return CONTROLS.sub(lambda control: control[0].encode("unicode_escape").decode(), text)


def tell(text: str) -> None:
    """Print a line; raises ClosedError or UserError as `Stream` does."""
    stream = Stream(sys.stdout)
    stream.write(f"{printable(text)}\n")
    stream.flush()


def complain(text: str) -> None:
    """Print a line to standard error; a failure to write is ignored."""
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # No other stream is left for the message.
        return


def legible(text: str) -> str:
    """A text that UTF-8 can encode: bytes of a file name that Python did not decode are read as UTF-8 or replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class Stream:
    """A text stream that raises ClosedError if its reader has closed it, and UserError if it cannot be written.

    goes_on: end of a warning, such as "training goes on". With it nothing is raised: lines are lost, and the first
    loss prints the warning.
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

    quiet: print nothing. goes_on: as in `Stream`. bar: whether to show a progress bar; None: on terminals only.
    """

    def __init__(self, *, quiet: bool = False, goes_on: str = "", bar: bool | None = None) -> None:
        from rich.console import Console

        class Plain(Console):
            """A console that escapes control characters in texts and keeps rich's own control codes."""

            def render(self, renderable: Any, options: Any = None) -> Iterator[Any]:
                for segment in super().render(renderable, options):
                    yield segment if segment.control else segment._replace(text=printable(segment.text))

        stream: Any = Stream(sys.stdout, goes_on)
        self.styled, self.terminal = (False, "") if quiet else (styled(stream), launcher_terminal(stream))
        on_terminal = self.styled and bool(stream.isatty() or self.terminal)
        self.live = not quiet and (on_terminal if bar is None else bar)
        # Names in files may look like rich's markup or like :names: of emoji.
        self.console = Plain(
            file=stream,
            quiet=quiet,
            force_terminal=self.styled or self.live,
            no_color=not self.styled or None,
            markup=False,
            emoji=False,
        )
        # Never hide the cursor: a killed program could not show it again.
        vars(self.console)["show_cursor"] = lambda show=True: False
        if not (stream.isatty() or self.terminal):
            self.console.width = shutil.get_terminal_size().columns if self.live else WIDE
        elif self.console.width < NARROW:
            self.console.width = NARROW
        self.fit()

    @property
    def ascii(self) -> bool:
        """Whether the output takes ASCII only."""
        return self.console.options.ascii_only

    def tell(self, text: str, style: str | None = None) -> None:
        """Print a line as it is."""
        self.console.print(text, style=style, highlight=False, soft_wrap=True)

    def print(self, *things: Any, **options: Any) -> None:
        """Print tables, trees and the like with rich, but cut no word: a narrow terminal breaks the lines instead."""
        room = self.console.options.update(width=WIDE)
        for thing in things:
            # A line of text may break anywhere.
            least = 0 if isinstance(thing, str) else self.console.measure(thing, options=room).minimum
            if least > self.console.width:
                self.console.width = least
        self.console.print(*things, **options)

    def bar(self) -> Progress:
        """Return a progress bar that counts steps: the task's description before it, its field `pace` after it."""
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[pace]}"))
        return Progress(*columns, console=self.console, transient=True, disable=not self.live, expand=True)

    def fit(self) -> None:
        """Update the width to the present one of the launcher's terminal, which may have been resized."""
        if self.terminal:
            self.console.width = max(NARROW, columns_of(self.terminal))


def launcher_terminal(stream: Any, environ: Mapping[str, str] = os.environ) -> str:
    """Path of the terminal on which a launcher shows a stream, see `psmpi.launcher.shown_on`; "": none."""
    if not reads_output(environ):
        return ""
    try:
        return shown_on(stream.fileno())
    except (OSError, ValueError):
        return ""


def styled(stream: Any, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream gets colours: a terminal does, and any stream with FORCE_COLOR, but none with TERM=dumb.

    A launcher may write the output that it reads to a file, even if it reads through a pseudo-terminal. Its ranks get
    colours only if the launcher is known to print to a terminal.
    """
    kind = environ.get("TERM", "").lower()
    if kind in ("dumb", "unknown"):
        return False
    if environ.get("FORCE_COLOR"):
        return True
    shown = bool(launcher_terminal(stream, environ)) if reads_output(environ) else stream.isatty()
    return bool(kind and shown)


@contextmanager
def prepared() -> Iterator[None]:
    """Run a block with standard streams that raise no UnicodeError, and with standard output as a `Stream`."""
    _open_closed()
    codecs.register_error("psmpi", _plain)
    original, wrapped = sys.stdout, Stream(sys.stdout)
    changed = [(stream, stream.errors) for stream in (original, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    for stream, _ in changed:
        stream.reconfigure(errors="psmpi")
    sys.stdout = cast(Any, wrapped)
    try:
        yield
    finally:
        if sys.stdout is wrapped:
            sys.stdout = original
        for stream, errors in changed:
            if not stream.closed:
                stream.reconfigure(errors=errors)


def dress_help() -> None:
    """Turn off tyro's escape codes unless standard output, for help, and standard error, for errors, get colours."""
    plain = os.environ.get("NO_COLOR") or not (styled(sys.stdout) and styled(sys.stderr))
    if plain and "tyro" in sys.modules:
        sys.modules["tyro"]._experimental_options["ansi_codes"] = False


@contextmanager
def wide_help() -> Iterator[None]:
    """Run a block in which tyro formats help for at least HELP_WIDTH columns, even on a narrower terminal."""
    original = shutil.get_terminal_size
    if original().columns >= HELP_WIDTH:
        yield
        return
    # tyro reads the width from this function only. The variable COLUMNS would also affect tables and child processes.
    shutil.get_terminal_size = lambda fallback=(80, 24): os.terminal_size((HELP_WIDTH, original(fallback).lines))
    try:
        yield
    finally:
        shutil.get_terminal_size = original


def finish(status: int) -> int:
    """Flush the standard streams; return the exit status: `status`, unless standard output could not be written."""
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
    """Codec error handler: replace a character by a similar one, else by its escape; keep a file name's bytes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return PLAIN.get(character, character.encode("ascii", "backslashreplace").decode()), error.start + 1


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _discard(stream: IO[str]) -> None:
    """Redirect a stream, with the text in its buffer, to the null device."""
    try:
        number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError):
        return
    os.dup2(nowhere, number)
    os.close(nowhere)


def _open_closed() -> None:
    """Open closed standard streams on the null device: the next opened file would get their numbers and the output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python sets a standard stream to None if it was closed at the start.
    streams: tuple[Any, Any] = (sys.stdout, sys.stderr)
    nowhere = [None if stream is not None else open(os.devnull, "w") for stream in streams]  # noqa: SIM115
    sys.stdout, sys.stderr = streams[0] or nowhere[0], streams[1] or nowhere[1]


def check_files(plot: str = "", **others: str) -> None:
    """Check before a long run that its output files can be written: `plot`, a picture, and others by their options.

    UserError if a folder is missing, a name is that of a folder, or a picture has an unknown format or no matplotlib.
    """
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
