"""The output of a training: the table of ranks, a bar on a terminal or a line every 30 s, and a line an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.table import Table

from psmpi import metrics
from psmpi.checkpoint import Progress
from psmpi.config import Config
from psmpi.output import Screen
from psmpi.training.method import Place

# Seconds between two lines, and between two updates of the bar.
LINE, DRAW = 30.0, 0.1
# Number of entries of `Report.numbers`, which the poll sums over ranks.
NUMBERS = 4


def show_places(console: Screen, places: list[tuple[int, str, Place]]) -> None:
    """Print the table of ranks: role, classes, parameters and memory."""
    table = Table(title="placement", title_justify="left")
    devices = any(place.device for _, _, place in places)
    for name in ("rank", "host", *(("device",) if devices else ()), "role", "classes"):
        table.add_column(name)
    for name in ("computes with", "optimizes", "memory"):
        table.add_column(name, justify="right")
    for rank, host, place in places:
        memory = f"{place.nbytes / 1e6:.1f} MB"
        where = (host, place.device) if devices else (host,)
        table.add_row(
            str(rank), *where, place.role, place.classes, f"{place.computes_with:,}", f"{place.owned:,}", memory
        )
    console.print(table)


class Report:
    """The report of a start; all ranks have one, and rank 0 prints.

    batch: samples in a minibatch; number_sums: the sums of `numbers` over ranks as of some steps ago, zeros at first;
    waited: returns the seconds that this rank has spent in communication.
    """

    def __init__(
        self,
        screen: Screen,
        config: Config,
        batch: int,
        number_sums: np.ndarray,
        waited: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.screen, self.config, self.batch, self.number_sums = screen, config, batch, number_sums
        self.waited, self.clock = waited, clock
        self.brief, self.detailed = config.terminal.quiet, config.terminal.verbose
        self.total = self.first = 0
        self.begun = self.printed = self.drawn = clock()
        self.before = waited()
        # The row of the last measured epoch, which may be unfinished.
        self.last: dict[str, Any] | None = None
        self.bar: Any = None
        self.task: Any = None

    @property
    def share(self) -> float:
        """Share of communication in the time of all ranks since the start; 0 on one rank, and at first."""
        return float(self.number_sums[1] / self.number_sums[2]) if self.number_sums[2] else 0.0

    @contextmanager
    def showing(self, progress: Progress, total: int) -> Iterator[None]:
        """Show the bar during the block, in which a run trains from `progress` to step `total`."""
        self.total, self.first = total, progress.step
        self.begun = self.printed = self.drawn = self.clock()
        self.before = self.waited()
        if self.brief or self.screen.console.quiet or not self.screen.live:
            yield
            return
        with self.screen.bar() as self.bar:
            words, pace = self._state(progress)
            self.task = self.bar.add_task(words, total=total, completed=progress.step, pace=pace)
            yield
        self.bar = None

    def numbers(self, loss: float, samples: float) -> tuple[float, float, float, float]:
        """This rank's terms of `number_sums`: loss, seconds in communication, seconds, and samples of the loss."""
        return loss, self.waited() - self.before, self.clock() - self.begun, samples

    def step(self, progress: Progress) -> None:
        """Update the bar, or print a line if it is time, after a step."""
        if self.brief or self.screen.console.quiet:
            return
        now = self.clock()
        if now - (self.drawn if self.bar is not None else self.printed) < (DRAW if self.bar is not None else LINE):
            return
        self.drawn = self.printed = now
        words, pace = self._state(progress)
        if self.bar is not None:
            self.screen.fit()
            self.bar.update(self.task, completed=progress.step, description=words, pace=pace)
        else:
            self.screen.tell(f"{words}  step {progress.step}  {pace}")

    def _state(self, progress: Progress) -> tuple[str, str]:
        """Two texts: the epoch; loss, samples a second, time left and share of communication."""
        epochs, done, seconds = self.config.run.epochs, progress.step - self.first, self.clock() - self.begun
        words = f"epoch {min(progress.epoch + 1, epochs)}/{epochs}"
        loss, _, _, samples = self.number_sums
        pace = [f"loss {loss / samples:.5g}"] if samples > 0 else []
        if done and seconds:
            pace.append(f"{done * self.batch / seconds:.0f} samples/s")
            pace.append(f"{metrics.duration(seconds / done * (self.total - progress.step))} left")
        if self.share:
            pace.append(f"comm {100 * self.share:.0f} %")
        return words, "  ".join(pace)

    def epoch(self, row: dict[str, Any], shares: np.ndarray) -> None:
        """Print the line of an epoch. row: of its metrics; shares: of communication in each rank's time."""
        self.last = row
        if self.brief:
            return
        self.screen.tell(metrics.describe(row, self.config.run.epochs))
        if not self.detailed:
            return
        parts = [
            f"step {row['step']}",
            metrics.duration(row["seconds"]),
            f"{row['samples_per_second']:.0f} samples/s",
            f"{row['bytes_sent'] / 1e6:.1f} MB sent",
        ]
        if shares.any():
            parts.append(f"comm {_percent(shares)}")
        self.screen.tell(f"  {'  '.join(parts)}")

    def rows(self, progress: Progress) -> tuple[dict[str, Any], ...]:
        """The rows of all epochs, with that of an unfinished last one."""
        part = [] if self.last is None or self.last["epoch"] <= progress.epoch else [self.last]
        return (*progress.rows, *part)

    def detail(self, text: str) -> None:
        """Print a line under --verbose."""
        if self.detailed:
            self.screen.tell(text)


def _percent(shares: np.ndarray) -> str:
    """ "30 %", or "12-58 %" for the least and the largest share of all ranks."""
    least, most = f"{100 * shares.min():.0f}", f"{100 * shares.max():.0f}"
    return f"{least} %" if least == most else f"{least}-{most} %"
