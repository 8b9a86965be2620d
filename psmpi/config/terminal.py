"""Settings of what a training prints; they are of a start, not of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psmpi.errors import UserError


@dataclass(frozen=True)
class Terminal:
    """Amount and form of what is printed."""

    quiet: bool = False
    """Print warnings and the last line alone."""
    verbose: bool = False
    """Print more: what takes memory, bytes and the ranks' shares of time in communication each epoch, checkpoints."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """bar: a progress bar, also where no terminal can be seen, as behind srun; lines: one every 30 s; auto: a bar where
    there is a terminal, behind mpirun too."""


def check_terminal(given: Terminal) -> None:
    """UserError for settings that go against each other."""
    if given.quiet and (given.verbose or given.progress == "bar"):
        other = "--verbose" if given.verbose else "--progress bar"
        raise UserError(f"--quiet and {other} cannot both be: leave out one of them")
