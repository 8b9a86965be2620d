"""Settings of what a training prints; they are of a start, not of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psmpi.errors import UserError


@dataclass(frozen=True)
class Terminal:
    """Output of a training."""

    quiet: bool = False
    """Print warnings and the last line only."""
    verbose: bool = False
    """Print memory, bytes, communication, and checkpoints too."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """Form of the progress report.

    auto: a bar on a terminal, also behind mpirun; else a line every 30 s
    bar: a progress bar, also where no terminal can be seen, as behind srun
    lines: a line every 30 s
    """


def check_terminal(given: Terminal) -> None:
    """UserError for settings that go against each other."""
    if given.quiet and (given.verbose or given.progress == "bar"):
        other = "--verbose" if given.verbose else "--progress bar"
        raise UserError(f"--quiet and {other} cannot both be: leave out one of them")
