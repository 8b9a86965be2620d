"""Lines at the start and at the end of a training: scores, folders, and the commands to type next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from psmpi import metrics
from psmpi.checkpoint import Progress
from psmpi.checkpoint.format import best
from psmpi.config import Config
from psmpi.errors import counted

# The message at the first signal.
STOPPING = "the run stops after the next step, and is saved; another signal ends it at once"
# A function that makes the command line of a psmpi command: its name, whether all ranks start it, its options.
Typed = Callable[[str, bool, list[str]], str]


def scores(rows: Sequence[dict[str, Any]]) -> str:
    """ "best test accuracy 97.49 % (epoch 52), last 97.21 % (epoch 60)"; "" before the first test."""
    summary = metrics.best(rows)
    if summary is None:
        return ""
    key, best = summary
    first, last = metrics.SCORES[key](best[key]), rows[-1]
    if last is best:
        return f"best and last {first} (epoch {best['epoch']})"
    value = metrics.SCORES[key](last[key]).removeprefix(f"{metrics.NAMES[key]} ")
    return f"best {first} (epoch {best['epoch']}), last {value} (epoch {last['epoch']})"


def begun(steps: int, epochs: int, ranks: int, stops: str) -> str:
    """The line before the first step; stops: the key or command that stops the run."""
    return f"training {counted(steps, 'step')}, to epoch {epochs}, on {counted(ranks, 'rank')}; {stops} stops and saves"


def at_signal(out: str, ends: bool, typed: Typed) -> str:
    """The line at the first signal. ends: whether the launcher may end the ranks before they have saved."""
    if not ends:
        return STOPPING
    again = typed("train", True, ["--resume", "auto", "--out", out])
    return f"the run stops after the next step, and is saved, if mpirun does not end it before; go on:\n{again}"


def ended(
    config: Config,
    progress: Progress,
    rows: Sequence[dict[str, Any]],
    share: float,
    typed: Typed,
    early: bool = False,
) -> list[str]:
    """The lines after a training that is done; under --quiet one. early: whether --patience has ended it.

    rows: of the metrics, with that of an unfinished last epoch; share: the part of the time spent in communication.
    """
    summary = scores(rows)
    first = f"done in {metrics.duration(progress.seconds)}{': ' if summary else ''}{summary}"
    out = config.run.out
    if config.terminal.quiet:
        return [f"{first}; in {out}"]
    sent = rows[-1]["bytes_sent"] if rows else progress.bytes_sent
    more = f"{counted(progress.step, 'step')}, {sent / 1e6:.1f} MB sent"
    if share:
        more += f", {100 * share:.0f} % communication"
    # `predict` and `inspect` take either.
    kept = str(best(Path(out))) if config.run.keep_best and out else out
    short = 0 < config.run.max_steps <= progress.step and progress.epoch < config.run.epochs
    further = ["--max-steps", "0"] if short else ["--epochs", str(2 * config.run.epochs)]
    if early:
        further = ["--patience", str(2 * config.run.patience)]
    return [
        first,
        f"{more}; in {out}",
        f"predict: {typed('predict', False, [kept])}",
        f"inspect: {typed('inspect', False, ['show', kept])}",
        f"go on:   {typed('train', True, ['--resume', 'auto', '--out', out, *further])}",
    ]


def stopped(config: Config, progress: Progress, signal: str, typed: Typed) -> list[str]:
    """The lines after a training that a signal has stopped. signal: its name, "" if another rank received it."""
    summary = scores(progress.rows)
    by = f" by {signal}" if signal else ""
    return [
        f"stopped{by} after step {progress.step}, and saved in {config.run.out}",
        *([summary] if summary else []),
        f"go on:   {typed('train', True, ['--resume', 'auto', '--out', config.run.out])}",
    ]
