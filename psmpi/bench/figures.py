"""The figures of the documents, made again by their commands and compared with the recorded ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

import psmpi
from psmpi.bench import recorded, remake
from psmpi.bench.recorded import Figure, Recorded
from psmpi.errors import UserError, counted, nearest
from psmpi.output import Screen, check_files, tell


def figures(
    only: tuple[str, ...] = (),
    page: str = "",
    all: bool = False,
    times: bool = False,
    data_dir: str = "",
    record: bool = False,
    limit: int = 600,
    file: str = "",
    write: str = "",
) -> int:
    """Make figures of the documents again by their commands, and compare them with the recorded ones.

    Without options, the quick accuracies, losses and counts. Each command runs in a temporary folder. Exit status 1 if
    a figure has moved by more than its tolerance, or if its command fails. The order of sums depends on the processor
    and its libraries: accuracies may move on another machine than the recorded one without any error in psmpi.

    Args:
        only: Figures with these ids, or with ids that begin so.
        page: Figures of this page, such as results.md.
        all: Slow figures too.
        times: Times and ratios of times, in place of accuracies, losses and counts.
        data_dir: Folder that holds the data sets' files; figures of data sets that it lacks are left out.
        record: Write the new values, with this version and today's date, into the file.
        limit: Seconds after which a command is ended.
        file: File of figures, that of this installation if not given.
        write: Write the Markdown page of all figures into this file, and run nothing.
    """
    if limit < 1:
        raise UserError(f"--limit {limit}: expected a whole number of seconds from 1 up")
    check_files(write=write)
    path = Path(file) if file else recorded.FILE
    known = recorded.load(path)
    if write:
        Path(write).write_text(recorded.page(known), encoding="utf-8")
        tell(f"{write} has {counted(len(known.figures), 'figure')}")
        return 0
    chosen = _chosen(known.figures, only, page, all, times)
    results = []
    screen = Screen()
    for one in _made(known, chosen, data_dir, limit, screen):
        results.append(one)
        if record and not one.failed:
            # After each figure, so that an interrupted command keeps its results.
            known = known.changed([one.as_recorded()], remake.machine())
            recorded.save(path, known)
    _show(screen, known, results)
    return 1 if any(not one.agrees for one in results) else 0


@dataclass(frozen=True)
class Result:
    """A remade figure: new values, processor seconds, whether it held, and the error of a failed command."""

    figure: Figure
    values: tuple[float, ...]
    seconds: float
    agrees: bool
    failed: str = ""

    @property
    def word(self) -> str:
        return "FAILED" if self.failed else "held" if self.agrees else "MOVED"

    def as_recorded(self) -> Figure:
        """The figure with its new values, of this version and day."""
        version, today = psmpi.__version__, time.strftime("%Y-%m-%d")
        return replace(self.figure, value=self.values, version=version, date=today, seconds=round(self.seconds, 1))


def _chosen(known: Sequence[Figure], only: Sequence[str], page: str, slow: bool, times: bool) -> list[Figure]:
    """The figures that the options select. UserError if there are none."""
    for word in only:
        if not any(figure.id.startswith(word) for figure in known):
            near = nearest(word, [figure.id for figure in known])
            raise UserError(f"--only {word}: no figure has such an id" + (f"; did you mean {near}?" if near else ""))
    pages = dict.fromkeys(figure.page for figure in known)
    if page and page not in pages:
        raise UserError(f"--page {page}: choose one of {', '.join(pages)}")
    exact = {word for word in only if any(figure.id == word for figure in known)}
    selected = []
    for figure in known:
        if page and figure.page != page:
            continue
        if only:
            named = figure.id in exact or any(figure.id.startswith(word) for word in set(only) - exact)
        else:
            named = figure.remade and (figure.kind == "time") == times and (figure.quick or slow or times)
        if named:
            selected.append(figure)
    return selected


def _made(known: Recorded, chosen: Sequence[Figure], data_dir: str, limit: int, screen: Screen) -> Iterator[Result]:
    """Run each command once, and print a line for each figure."""
    made: dict[str, remake.Made | str] = {}
    for figure in chosen:
        why = remake.missing(figure, data_dir)
        if why:
            screen.tell(f"{figure.id}: left out, {why}")
            continue
        if figure.command not in made:
            try:
                made[figure.command] = remake.make(figure.command, data_dir, limit)
            except UserError as error:
                made[figure.command] = str(error)
        result = _result(known, figure, made[figure.command])
        screen.tell(f"{figure.id}: {result.word}")
        yield result


def _result(known: Recorded, figure: Figure, made: remake.Made | str) -> Result:
    if isinstance(made, str):
        return Result(figure, (), 0.0, False, made)
    try:
        values = made.numbers(figure)
    except UserError as error:
        return Result(figure, (), made.seconds, False, str(error))
    return Result(figure, values, made.seconds, known.agrees(figure, values))


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="figures", title_justify="left")
    for name in ("figure", "recorded", "now", "", "seconds"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for one in results:
        unit = f" {one.figure.unit}" if one.figure.unit and one.values else ""
        now = recorded.numbers(one.values) or ("passes" if one.agrees else "")
        table.add_row(one.figure.id, one.figure.text + unit, now + unit, one.word, f"{one.seconds:.1f}")
    return table


def _show(screen: Screen, known: Recorded, results: Sequence[Result]) -> None:
    """Print the table, errors of commands, and a note if moved figures were recorded on another machine."""
    screen.print(_table(results))
    for one in results:
        if one.failed:
            screen.tell(f"{one.figure.id}: {one.failed}")
    held = sum(one.agrees for one in results)
    screen.tell(f"{held} of {counted(len(results), 'figure')} held; seconds are of the processor")
    here = remake.machine()
    elsewhere = [
        one.figure.id
        for one in results
        if not one.agrees and not one.failed and known.machines.get(one.figure.machine) != here
    ]
    if elsewhere:
        screen.tell(
            "note: other processors and libraries sum in another order; moved, and recorded on another machine than "
            f"this one ({here}): {', '.join(elsewhere)}"
        )
